"""``fold_`` puts batch norms into convolutions for inference, ``unfold_`` takes them out again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from . import folded, folded_choice
from ._block import BlockState, FusedBlock
from ._folding import NOTHING_BEFORE
from ._matching import is_norm, norm_reason
from ._shadow import KEY
from .folded import WHERE_FASTER
from .fuse import Fuser, ReportEntry, table

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass
class FoldReport:
    """What ``fold_`` did: one entry for every normalisation layer of the model."""

    folded: list[ReportEntry] = field(default_factory=list)
    """Those that are part of ``the convolution before it``, or are ``in shapes where that is
    measured to be faster``."""
    skipped: list[ReportEntry] = field(default_factory=list)
    """The others, each with the reason."""
    measured: list[str] = field(default_factory=list)
    """What was chosen for whole units in this process so far, a line for each problem."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers of each kind, and of skipped ones."""
        counts = dict(Counter(entry.reason for entry in self.folded))
        return counts | {"skipped": len(self.skipped)}

    @property
    def names(self) -> list[str]:
        """Of those folded."""
        return [entry.name for entry in self.folded]

    def __str__(self) -> str:
        lines = table([("folded", self.folded), ("skipped", self.skipped)], self.counts)
        return "\n".join([*lines, *(f"  {line}" for line in self.measured)])


def fold_(model: nn.Module) -> FoldReport:
    """Fold batch norms into the convolutions before them, for inference on a CPU.

    Acts in the blocks that ``fuse_`` fused and in the units and networks of this package. In
    evaluation with gradients off a batch norm that alone reads a convolution's result becomes a
    scale of its weights, with the ReLU in oneDNN's own pass. Where kernels of our own compete, in
    full pre-activation units and where one convolution feeds the next, that is done in shapes for
    which it is clearly faster: the first call of each shape measures it on its own operands (10
    seconds a process at most to begin another; ``PREACT_TUNE=off`` leaves those as they are), and
    processes after it remember. Dense blocks, and poolings behind a norm, keep theirs.

    Parameters, buffers and ``state_dict`` stay as they are; training, and evaluation with
    gradients, run unfolded. The folded weights take as much memory again as those they came from.
    They are made at the first call, and again after a change that PyTorch's version counters see:
    writes to ``tensor.data`` in place they do not see, so call ``unfold_`` and ``fold_`` after
    those. Of inference tensors, which count no writes, they are made at every call. torch.compile
    does not fold. oneDNN's ReLU, as in torch.compile's frozen graphs, makes 0 of a NaN where
    PyTorch's keeps it: look for a diverged model's NaNs unfolded.

    Returns what is folded and what is not, and why. ``unfold_`` undoes it, ``unfuse_`` too.
    """
    return _set_folds(model, True)


def unfold_(model: _Model) -> _Model:
    """Undo ``fold_``. Returns ``model``."""
    _set_folds(model, False)
    return model


def _set_folds(model: nn.Module, folds: bool) -> FoldReport:
    fuser = Fuser(model, None, False)
    found: dict[nn.Module, str] = {}
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, FusedBlock):
            old = module.__dict__[KEY]  # which a shallow copy of the block may share
            state = BlockState(old.save_activation, old.closed, folds)
            module.__dict__[KEY] = state
            for plan in fuser.plans(module, state)[0]:
                found.update(plan.folded)
                reasons = plan.unfolded | reasons  # the outer block's, whose code runs
    for module, norms in folded.set_folds(model, folds).items():
        found.update(norms)
        inside = filter(is_norm, module.modules())
        reasons.update(dict.fromkeys(inside, "not an inner norm of a full pre-activation unit"))
    folded.forget(model.modules())
    report = FoldReport(measured=folded_choice.describe())
    for module, names in fuser.names.items():
        if not is_norm(module):
            continue
        name = ", ".join(names)
        reason = _reason(module, found, reasons)
        if reason is None:
            report.folded.append(ReportEntry(name, found[module]))
        else:
            report.skipped.append(ReportEntry(name, reason))
    return report


def _reason(
    norm: nn.Module, found: dict[nn.Module, str], reasons: dict[nn.Module, str]
) -> str | None:
    """Why a norm is not folded."""
    if norm not in found:
        outside = f"in no block that is fused, or {NOTHING_BEFORE}"
        return norm_reason(norm) or reasons.get(norm, outside)
    mean = norm.running_mean
    if not isinstance(mean, Tensor):
        return "it keeps no running statistics"
    if found[norm] == WHERE_FASTER and mean.device.type != "cpu":
        return f"in a unit or a chain, which are folded on a CPU alone, not on {mean.device.type}"
    return None
