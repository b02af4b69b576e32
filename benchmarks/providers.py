"""The ways of running a network that are compared: eager, torch.compile and preact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from .networks import Network

__all__ = ["BASELINE", "PROVIDERS", "Prepared", "Provider"]

BASELINE = "eager"


@dataclass(frozen=True)
class Prepared:
    """A model made ready by a provider.

    Attributes:
        module: the module that owns the parameters and buffers.
        call: what is called with the images; ``module`` itself or a compiled form of it.
        context: entered around every call.
        note: what the provider did, for the report.
        fallback: another way to prepare the same module, tried once if the first call raises.
    """

    module: nn.Module
    call: Callable[[torch.Tensor], torch.Tensor]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    note: str = ""
    fallback: Callable[[], Prepared] | None = None


@dataclass(frozen=True)
class Provider:
    """One way of running a network.

    Attributes:
        name: the name used on the command line and in the CSV.
        prepare: takes a model of its own to change, its network and the mode ("training" or
            "inference").
        ours: a failure of this provider makes the benchmark's exit status non-zero.
        compiles: the first call compiles, so its time is shown.
        asked_only: runs only where it is named.
    """

    name: str
    prepare: Callable[[nn.Module, Network, str], Prepared]
    ours: bool = False
    compiles: bool = False
    asked_only: bool = False


def _eager_context(network: Network) -> Callable[[], AbstractContextManager[object]]:
    """For our own models "eager" is the reference backend, which is PyTorch's own ops."""
    if not network.own:
        return nullcontext

    def context() -> AbstractContextManager[object]:
        import preact

        entered: AbstractContextManager[object] = preact.use_backend("reference")
        return entered

    return context


def _eager(model: nn.Module, network: Network, mode: str) -> Prepared:
    return Prepared(model, model, _eager_context(network))


def _compile(model: nn.Module, network: Network, mode: str) -> Prepared:
    # Freezing folds constants, batch norm included, into the weights: the best compiled inference.
    options: dict[str, str | int | bool | Callable[..., object]] | None
    options = {"freezing": True} if mode == "inference" else None
    context = _eager_context(network)

    def with_breaks() -> Prepared:
        torch._dynamo.reset()
        compiled = torch.compile(model, options=options)
        return Prepared(model, compiled, context, "graph breaks")

    compiled = torch.compile(model, fullgraph=True, options=options)
    return Prepared(model, compiled, context, fallback=with_breaks)


def _preact(model: nn.Module, network: Network, mode: str) -> Prepared:
    import preact

    if network.own:
        device = next(model.parameters()).device.type
        return Prepared(model, model, note=f"{preact.backends.choose(device)} on {device}")
    report = preact.fuse_(model)
    note = f"{len(report.fused)} fused, {len(report.skipped)} skipped, {report.backend}"
    return Prepared(model, model, note=note)


def _folded(model: nn.Module, network: Network, mode: str) -> Prepared:
    """As ``_preact``, in inference with batch norms folded into the convolutions before them."""
    import preact

    prepared = _preact(model, network, mode)
    if mode != "inference":
        return prepared
    return replace(prepared, note=f"{len(preact.fold_(model).folded)} folded, {prepared.note}")


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, _eager),
        Provider("compile", _compile, compiles=True),
        Provider("preact", _preact, ours=True),
        Provider("folded", _folded, ours=True, asked_only=True),
    )
}
