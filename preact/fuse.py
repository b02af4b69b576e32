"""``fuse_`` puts the fused prefixes under an existing model, ``unfuse_`` takes them out again."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from . import backends, choice, plans
from ._block import BlockState, FusedBlock, Plan, become, fused_class
from ._matching import is_norm, norm_reason
from ._shadow import KEY, original_class
from ._symbols import Signature
from .folded import set_folds

Filter = Callable[[str, nn.Module], bool]
_Model = TypeVar("_Model", bound=nn.Module)


class ReportEntry(NamedTuple):
    """One normalisation layer of a model."""

    name: str
    """Its qualified name, or its names where the model holds it more than once."""
    reason: str
    """As what it is fused, or why it is not."""


@dataclass
class FusionReport:
    """What ``fuse_`` did: one entry for every normalisation layer of the model.

    ``fused`` entries give the kind as reason: ``batch_norm_relu`` (batch norm and ReLU, the
    activation being used elsewhere too), ``batch_norm_relu_conv2d`` (with the convolution),
    ``batch_norm_relu_convs2d`` (with all the convolutions that share the activation),
    ``batch_norm_relu_pool2d`` and ``batch_norm_relu_conv2d_pool2d`` (with a pooling that reads the
    activation, or as a mean a pointwise convolution of it),
    ``residual_unit`` (with the whole unit, its addition included), ``dense_block`` (with a whole
    dense block, its concatenations included), or ``already: ...``.
    """

    fused: list[ReportEntry] = field(default_factory=list)
    skipped: list[ReportEntry] = field(default_factory=list)
    backend: str = ""
    """What runs the fused operations where the model is now, and why if that is eager PyTorch."""
    plan: str = ""
    """How convolutions are chosen there, ours or the library's, and what was chosen so far."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers of each kind, and of skipped ones."""
        counts = dict(Counter(entry.reason for entry in self.fused))
        return counts | {"skipped": len(self.skipped)}

    def __str__(self) -> str:
        states = [("fused", self.fused), ("skipped", self.skipped)]
        lines = [*table(states, self.counts), f"backend: {self.backend}"]
        return "\n".join([*lines, f"plan: {self.plan}"] if self.plan else lines)


def table(
    states: Sequence[tuple[str, Sequence[ReportEntry]]], counts: Mapping[str, int]
) -> list[str]:
    """The lines of a report: what became of each layer, and how often that happened."""
    rows = [(state, *entry) for state, entries in states for entry in entries]
    width = max((len(name) for _, name, _ in rows), default=0)
    lines = [f"{state:8}{name:{width}}  {reason}" for state, name, reason in rows]
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return [*lines, f"{len(rows)} normalisation layers: {summary}"]


class Fuser:
    """One pass over a model, from the innermost modules out."""

    def __init__(self, model: nn.Module, filter_fn: Filter | None, save_activation: bool) -> None:
        self.model = model
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.filter_fn = filter_fn
        self.save_activation = save_activation
        self.fused: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.filtered: set[nn.Module] = set()
        self.visited: set[nn.Module] = set()

    def visit(self, module: nn.Module) -> None:
        if module in self.visited:
            return
        self.visited.add(module)
        if _is_own(module):
            self.visit_own(module)
            return
        for child in module.children():
            self.visit(child)
        if any(is_norm(m) for m in module.modules() if m is not module):
            self.visit_block(module)

    def visit_own(self, module: nn.Module) -> None:
        """A module of this package says itself which of its norms run in eager PyTorch."""
        for inner in reversed([m for m in module.modules() if _is_own(m)]):
            reasons: dict[nn.Module, str] = getattr(inner, "unfused_norms", dict)()
            self.reasons.update(reasons)
            kind = f"already: {type(inner).__name__}"
            for norm in filter(is_norm, inner.modules()):
                if norm not in self.reasons:
                    self.fused.setdefault(norm, kind)

    def visit_block(self, block: nn.Module) -> None:
        cls = original_class(block)
        special = isinstance(block, (torch.jit.ScriptModule, fx.GraphModule))
        if cls.__module__.startswith("torch.") and cls is not nn.Sequential and not special:
            return
        already = isinstance(block, FusedBlock)
        name = self.names[block][0]
        if not already and self.filter_fn is not None and not self.filter_fn(name, block):
            self.filtered.add(block)
            self.explain(block, "left out by filter_fn")
            return
        reason = self.refusal(block)
        if reason is None:
            closed = [path for path, module in block.named_modules() if module in self.filtered]
            state = block.__dict__.get(KEY) or BlockState(self.save_activation, frozenset(closed))
            plans, reason = self.plans(block, state)
            useful = [plan for plan in plans if plan.run is not None]
            if useful and not already:
                reason = self.install(block, state)
            if useful and reason is None:
                prefix = "already: " if already else ""
                kinds = {m: prefix + kind for m, kind in useful[0].fused.items()}
                # What only the other mode fuses here says nothing about what runs now.
                now = useful[0] is plans[0]
                self.fused = self.fused | kinds if now else kinds | self.fused
        if reason is not None:
            self.explain(block, f"{cls.__name__} is left alone: {reason}")

    def explain(self, block: nn.Module, reason: str) -> None:
        """``reason`` for everything below ``block`` that has none yet."""
        for module in block.modules():
            if is_norm(module):
                self.reasons.setdefault(module, reason)

    def refusal(self, block: nn.Module) -> str | None:
        """Why a block is not even looked at."""
        if isinstance(block, (torch.jit.ScriptModule, fx.GraphModule)):
            return "its code is made by TorchScript or torch.fx"
        if "forward" in block.__dict__:
            return "its forward is replaced on the object"
        return None

    def plans(self, block: nn.Module, state: BlockState) -> tuple[list[Plan], str | None]:
        """Plans for what the block is likely to be called with, and why there are none.

        Those for the other training mode and, where the forward tells tensors from lists, for a
        list are made now too, because torch.compile cannot make any.
        """
        state.plans.clear()
        tensors = _signature(block)
        lists = Signature((list, *tensors.args[1:]), ())
        plans: list[Plan] = []
        failure: str | None = None
        for signature in (tensors, lists):
            plan, analysis, reason = state.build(block, signature)
            if analysis is None or reason:
                failure = failure or reason
                continue
            self.reasons.update(analysis.reasons)
            plans.append(plan)
            if analysis.trace.depends_on_training:
                plans.append(state.build(block, signature, not block.training)[0])
            if not analysis.trace.asked_type:
                break
        return plans, None if plans else failure

    def install(self, block: nn.Module, state: BlockState) -> str | None:
        """Gives the block its fused class; returns why it will not have it."""
        try:
            become(block, fused_class(type(block)))
        except Exception as error:  # metaclasses and __init_subclass__ run here, and may refuse
            return f"its class cannot be extended ({error})"
        block.__dict__[KEY] = state
        return None

    def report(self) -> FusionReport:
        report = FusionReport(backend=_backend(self.model), plan=_plan(self.model))
        for module, names in self.names.items():
            if not is_norm(module):
                continue
            name = ", ".join(names)
            if module in self.fused:
                report.fused.append(ReportEntry(name, self.fused[module]))
            else:
                reason = norm_reason(module) or self.reasons.get(module, "no forward reaches it")
                report.skipped.append(ReportEntry(name, reason))
        return report


def _is_own(module: nn.Module) -> bool:
    """Whether a module's forward calls the fused functions itself."""
    return original_class(module).__module__.startswith(("preact.modules", "preact.models."))


def _device_type(model: nn.Module) -> str:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return "cpu" if tensor is None else tensor.device.type


def _plan(model: nn.Module) -> str:
    """Empty where eager PyTorch runs."""
    device = _device_type(model)
    try:
        return "" if backends.choose(device) == "reference" else plans.describe(device)
    except RuntimeError:
        return ""


def _backend(model: nn.Module) -> str:
    device = _device_type(model)
    try:
        chosen = backends.choose(device)
    except RuntimeError as error:
        return str(error)
    if chosen == backends.AUTO:
        first = f"auto on {device}: proved and measured at the first call of each problem"
        return "\n".join([first, *(f"  {line}" for line in choice.describe(device))])
    reason = backends.why_eager(device)
    if chosen == "reference" and reason:
        return f"eager PyTorch on {device}: {reason}"
    return f"{chosen} on {device}"


def _signature(block: nn.Module) -> Signature:
    """A tensor for every argument that a block's forward must be given, and for one at least."""
    parameters = list(inspect.signature(original_class(block).forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return Signature((Tensor,) * max(len(required), 1), ())


def fuse_(
    model: nn.Module, filter_fn: Filter | None = None, *, save_activation: bool = False
) -> FusionReport:
    """Fuse batch norm, ReLU and convolution in an existing model, in place.

    Every block (a module with modules below it) is traced on its own with torch.fx, and what its
    graph proves safe is fused: a block's class becomes a subclass of itself whose forward runs the
    rewritten code. Parameters, buffers, ``state_dict`` and results stay as they are; copies and
    pickles stay fused. A change that the code depends on (training mode, an attribute that the
    forward reads, a replaced child, a hook on a module inside) is noticed at the next call, and the
    block is looked at again. What cannot be proved safe is left alone and reported.

    Args:
        model: any module; blocks fused before are kept as they are.
        filter_fn: called with the qualified name of each block and the block; where it returns
            False the block's own operations are left alone, those of blocks below are not.
        save_activation: keep the activations for backward, which takes less time and more memory
            than computing them again. Blocks fused before keep their choice.

    Returns:
        What is fused and what is not, and why.
    """
    fuser = Fuser(model, filter_fn, save_activation)
    fuser.visit(model)
    return fuser.report()


def unfuse_(model: _Model) -> _Model:
    """Undo ``fuse_``: every block gets its own class back. Returns ``model``."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            become(module, original_class(module))
            module.__dict__.pop(KEY, None)
    set_folds(model, False)
    return model
