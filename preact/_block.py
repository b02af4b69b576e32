"""A fused block: the user's module, given a subclass whose forward runs rewritten code.

The code comes from the graph of the block's own forward with the matched operations replaced, and
runs on the block itself, so parameters, buffers and children stay where they are. It is a *plan*,
made for arguments of certain kinds and under guards: whatever the traced forward depended on. While
no plan's guards hold, a new one is made; where none can be, the original forward runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import remembered, serving
from ._folding import find_folds, insert_folds
from ._matching import UNIT, match
from ._prefix import BATCH_NORM_RELU, PREFIX, SHARED_PREFIX
from ._rewriting import rewrite, to_function
from ._shadow import KEY, MISSING, TracingError, original_class, same
from ._symbols import Signature, kind_of
from ._tracing import trace
from .hooks import GLOBAL_HOOKS

_MAX_PLANS = 8
_MAX_CALLS = 256
_COUNTED = {BATCH_NORM_RELU, PREFIX, SHARED_PREFIX, UNIT}
_FREE_BUILDS = 32


class Plan:
    """Code for the calls of one signature, and the guards under which it may run."""

    def __init__(
        self,
        signature: Signature,
        run: Callable[..., Any] | None,
        fused: dict[nn.Module, str],
        guards: tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]],
    ) -> None:
        self.signature = signature
        self.run = run
        """The code, None where the original forward is to run."""
        self.fused = fused
        """The batch norms that the code fuses, and as what."""
        self.checks, self.sizes, self.hooks = guards
        self.folded: dict[nn.Module, str] = {}
        """The batch norms that are part of the convolution before them, and when."""
        self.unfolded: dict[nn.Module, str] = {}
        """Why others are not."""
        self.prefixes = 0
        """How many prefixes the code runs, alone or in units, where it fuses nothing else."""
        self.eager: set[object] = set()
        """Calls in which all of them ran as eager PyTorch, their maps being small: the original
        forward does the same for less."""

    def note_eager(self, call: object) -> None:
        if call is None:
            return
        if len(self.eager) >= _MAX_CALLS:
            self.eager.clear()
        self.eager.add(call)

    def holds(self) -> bool:
        """Whether everything the traced forward depended on is as it was."""
        for hooks in self.hooks:
            if hooks:
                return False
        for owner, size in self.sizes:
            if len(owner) != size:
                return False
        for owner, name, value in self.checks:
            now = owner.get(name, MISSING)
            if now is not value and not same(now, value):
                return False
        return True


class Analysis:
    """What one block's forward offers, before anything is changed.

    Args:
        block: the block, fused or not.
        signature: kinds of the arguments.
        closed: paths below ``block`` that must stay calls.
        training: stands in for the modules' flags, unless None.

    Raises:
        TracingError: where the block cannot be traced.
    """

    def __init__(
        self,
        block: nn.Module,
        signature: Signature,
        closed: frozenset[str] = frozenset(),
        training: bool | None = None,
    ) -> None:
        self.block = block
        self.signature = signature
        self._closed = closed
        self._training = training
        try:
            self.trace = trace(block, signature, None, closed, training)
        except TracingError:
            self.trace = trace(block, signature, (), closed, training)
        self.matches = match(self.trace)
        self.reasons = dict(self.matches.reasons)
        expand = self._to_open()
        self.is_useful = expand is not None
        if expand is not None and expand != self.trace.opened:
            self.trace = trace(block, signature, expand, closed, training)
            self.matches = match(self.trace)

    def _to_open(self) -> set[str] | None:
        """Modules below whose steps this block has to take over, None if it has nothing to fuse.

        A chain inside one fused module below is that module's own affair; a chain that reaches
        across modules is this block's, and only the modules it touches are opened.
        """
        paths: set[str] = set()
        found = False
        for _, _, nodes in self.matches.groups():
            stacks = [self.trace.stack(node) for node in nodes]
            common = 0
            while all(len(s) > common and s[common] == stacks[0][common] for s in stacks):
                common += 1
            inside = (self.block.get_submodule(path) for path, _ in stacks[0][:common])
            if not any(isinstance(module, FusedBlock) for module in inside):
                found = True
                paths.update(path for stack in stacks for path, _ in stack)
        return paths | self.trace.empty if found else None

    def _check_modes(self) -> None:
        """A forward that asks for the gradient or autocast mode has a graph for each."""
        other = trace(
            self.block, self.signature, self.trace.opened, self._closed, self._training, True
        )
        if str(other.graph) != str(self.trace.graph):
            raise TracingError("it depends on whether gradients or autocast are on")

    def plan(self, save_activation: bool, folds: bool = False) -> Plan:
        """Compiles the rewritten graph; to be called once. ``folds``: with batch norms folded."""
        if not self.is_useful or not self.matches.groups():
            return Plan(self.signature, None, {}, self.trace.guards())
        self._check_modes()
        fused: dict[nn.Module, str] = {}
        for kind, prefixes, _ in self.matches.groups():
            for prefix in prefixes:
                module = self.trace.module(prefix.norm)
                assert module is not None
                fused[module] = kind
        found = find_folds(self.trace, self.matches) if folds else None
        guards = self.trace.guards()
        if found is not None:
            insert_folds(self.trace.graph, found.chains)
        rewrite(self.trace.graph, self.matches, save_activation)
        run = to_function(self.trace.graph, original_class(self.block).__name__)
        plan = Plan(self.signature, run, fused, guards)
        # Modules of this package within would count as well, and have no other way than their own.
        own = any(type(m).__module__.startswith("preact.") for m in self.block.modules())
        if found is None and not own and set(fused.values()) <= _COUNTED:
            plan.prefixes = sum(len(prefixes) for _, prefixes, _ in self.matches.groups())
        if found is not None:
            plan.folded, plan.unfolded = found.folded, found.unfolded
        return plan


class BlockState:
    """What a fused block keeps: its options, and plans for the block it belongs to.

    Copies and pickles carry the options alone; the copy makes its own plans.
    """

    def __init__(self, save_activation: bool, closed: frozenset[str], folds: bool = False) -> None:
        self.save_activation = save_activation
        self.closed = closed
        self.folds = folds
        """Whether plans for evaluation fold batch norms into the convolutions before them."""
        self.owner: nn.Module | None = None
        self.plans: list[Plan] = []
        self.misses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockState, (self.save_activation, self.closed, self.folds)

    def build(
        self, block: nn.Module, signature: Signature, training: bool | None = None
    ) -> tuple[Plan, Analysis | None, str]:
        """A new plan for ``block``, its analysis, and the reason if tracing failed."""
        self.owner = block
        analysis: Analysis | None = None
        try:
            analysis = Analysis(block, signature, self.closed, training)
            plan, reason = analysis.plan(self.save_activation, self.folds), ""
        except TracingError as error:
            plan, reason = Plan(signature, None, {}, error.guards), str(error)
        self.plans.insert(0, plan)
        del self.plans[_MAX_PLANS:]
        return plan, analysis, reason


def _select(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
    """The plan for a call, None where the original forward has to run."""
    state = block.__dict__.get(KEY)
    if state is None or "_is_replica" in block.__dict__:
        return None
    for hooks in GLOBAL_HOOKS:
        if hooks:
            return None
    kinds = tuple([kind_of(arg) for arg in args])
    named = tuple([(name, kind_of(arg)) for name, arg in kwargs.items()])
    if state.owner is block:
        for plan in state.plans:
            if plan.signature.args == kinds and plan.signature.kwargs == named and plan.holds():
                return plan
    if torch.compiler.is_compiling() or None in kinds or None in dict(named).values():
        return None
    if state.owner not in (None, block):  # copy.copy shares the original's state
        state = BlockState(state.save_activation, state.closed, state.folds)
        block.__dict__[KEY] = state
    state.misses += 1
    if state.misses > _FREE_BUILDS and state.misses & (state.misses - 1):
        return None  # something changes at every call: look again ever more rarely
    plan = state.build(block, Signature(kinds, named))[0]
    return plan if plan.holds() else None


def _call_of(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What tells calls apart in which other prefixes may run as eager PyTorch; None where none may
    be left to the original forward: with hooks on saved tensors, by which checkpoints count these,
    in their order."""
    if (
        kwargs or len(args) != 1 or type(args[0]) is not Tensor or not args[0].is_cpu
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):  # fmt: skip
        return None
    (x,) = args
    autocast = torch.is_autocast_enabled("cpu")
    return (
        x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled(),
        autocast and torch.get_autocast_dtype("cpu"), remembered.asked(),
        *[norm.training for norm in plan.fused],
    )  # fmt: skip


class FusedBlock:
    """Mixin of the classes that fuse_ gives to blocks."""

    _preact_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of the original class, so that nothing stored refers to a class made at run time."""
        reduced: Any = super().__reduce_ex__(protocol)
        if "_preact_original" not in vars(type(self)):  # someone has extended the class again
            return reduced
        function, args, *rest = reduced
        args = tuple(self._preact_original if arg is type(self) else arg for arg in args)
        return (_rebuild, (function, args), *rest)


def _rebuild(function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    block = function(*args)
    become(block, fused_class(original_class(block)))
    return block


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class of ``module``, its ``__dict__`` and identity staying as they are."""
    module.__class__ = cls


_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward runs plans."""
    if cls not in _fused_classes:
        _fused_classes[cls] = _make_fused_class(cls)
    return _fused_classes[cls]


def _make_fused_class(cls: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = _select(self, args, kwargs)
        if plan is None or plan.run is None:
            return cls.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return plan.run(self, *args, **kwargs)
        if plan.eager and _call_of(plan, args, kwargs) in plan.eager:
            return cls.forward(self, *args, **kwargs)
        before = serving.small.count
        try:
            result = plan.run(self, *args, **kwargs)
            if serving.small.count - before == plan.prefixes > 0:
                plan.note_eager(_call_of(plan, args, kwargs))
        finally:
            serving.small.count = before  # of a block around this one they are none
        return result

    def body(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = cls.__module__
        namespace["__doc__"] = cls.__doc__
        namespace["_preact_original"] = cls
        namespace["forward"] = forward

    return types.new_class(f"Fused{cls.__name__}", (FusedBlock, cls), {}, body)
