"""Post-activation chains, conv-BN-ReLU-conv and longer, with their norms folded.

Unfolded each norm but a last one without a ReLU runs as the prefix of the convolution behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import checks, folded_choice
from .calls import BatchNorm, batch_norm, fused_batch_norm_relu, fused_prefix
from .folded import applies, convolve
from .folded_choice import Candidate, in_words

Link = tuple[nn.Conv2d, BatchNorm | None, bool]
"""A convolution, the norm behind it, and whether a ReLU follows; only the last may do without."""


def folded_chain(input: Tensor, links: Sequence[Link]) -> Tensor:
    """The ``links`` in turn, norms folded where that is allowed and faster."""
    if applies(input, [bn for _, bn, _ in links if bn is not None]):
        cast = input.to(checks.compute_type(links[0][0].weight))
        if _folds(cast, links):
            return _run(cast, links)
    return _unfolded(input, links)


def _folds(input: Tensor, links: Sequence[Link]) -> bool:
    convs = [conv for conv, _, _ in links]

    def candidate() -> Candidate:
        words = [f"* {in_words(conv)}{' relu' if relu else ''}" for conv, _, relu in links]
        return Candidate(
            convs,
            lambda: True,
            lambda: _unfolded(input, links),
            lambda: _run(input, links),
            " ".join(words),
        )

    return folded_choice.folds(input, convs, candidate, "chain")


def _run(input: Tensor, links: Sequence[Link]) -> Tensor:
    for conv, bn, relu in links:
        input = convolve(input, conv, bn, relu)
    return input


def _unfolded(input: Tensor, links: Sequence[Link]) -> Tensor:
    x: Tensor = links[0][0](input)
    following = [conv for conv, _, _ in links[1:]]
    for index, (_, bn, relu) in enumerate(links):
        if bn is None:
            break
        if not relu:
            x = batch_norm(bn, x)
        elif index < len(following):
            (x,) = fused_prefix(x, bn, [following[index]])
        else:
            x = fused_batch_norm_relu(bn, x)
    return x
