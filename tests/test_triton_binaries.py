"""Every streaming kernel and configuration, compiled for every architecture: what the code is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from preact.triton_kernels.batch_norm_relu import batch_norm_relu
from preact.triton_kernels.batch_norm_relu_backward_apply import batch_norm_relu_backward_apply
from preact.triton_kernels.batch_norm_relu_backward_reduce import batch_norm_relu_backward_reduce
from preact.triton_kernels.batch_norm_stats import batch_norm_stats
from preact.triton_kernels.identity_add import identity_add

from .evidence import interpreter
from .evidence.binaries import ARCHITECTURES, Binary, assert_sound, compile_launch
from .evidence.launches import Launch, meta, record

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)

# The second is 14 pixels wide: 196 is divisible by 4 alone, and 8 bytes a thread is all it allows.
SHAPE, NARROW = (32, 64, 56, 56), (32, 96, 14, 14)


def calls(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> dict[str, Callable[[], Any]]:
    x = meta(*shape, dtype=dtype, channels_last=channels_last)
    vector = torch.empty(shape[1], device="meta")
    norm = (vector,) * 4
    return {
        "batch_norm_stats": lambda: batch_norm_stats(x),
        "identity_add": lambda: identity_add(x, x),
        "batch_norm_relu": lambda: batch_norm_relu(x, *norm, 1e-5),
        "batch_norm_relu_backward_reduce": lambda: batch_norm_relu_backward_reduce(
            x, x, *norm, 1e-5
        ),
        "batch_norm_relu_backward_apply": lambda: batch_norm_relu_backward_apply(
            x, x, *norm, vector, vector, x, 1e-5
        ),
    }


OPS = list(calls(SHAPE, torch.float32, True))
MAPS = {
    "input_ptr",
    "other_ptr",
    "output_ptr",
    "grad_output_ptr",
    "grad_skip_ptr",
    "grad_input_ptr",
}


def assert_widest(binary: Binary, launch: Launch, width: int) -> None:
    """Maps move in accesses of ``width`` bytes; narrower ones are of per-channel vectors."""
    values = launch.bound()
    maps = [name for name in MAPS if values.get(name) is not None]
    stored = [name for name in maps if name in ("output_ptr", "grad_input_ptr")]
    threads = 32 * binary.num_warps
    # A tile of one map takes this many accesses of a thread.
    tile = values["BLOCK_R"] * values["BLOCK_C"] * values["input_ptr"].element_size()
    once = -(-tile // (threads * width))
    accesses = binary.global_accesses
    found = f"{binary.name} for sm_{binary.arch}: {dict(accesses)}, {once} a tile and map"
    assert accesses["LDG", width] >= once * (len(maps) - len(stored)), found
    narrow = {(kind, size): n for (kind, size), n in accesses.items() if size < width}
    if stored:
        assert accesses["STG", width] >= once, found
    vectors = 2 * values["BLOCK_R"] if not values["CHANNELS_LAST"] else 8
    assert sum(n for (kind, _), n in narrow.items() if kind == "STG") <= 2, found
    assert sum(n for (kind, _), n in narrow.items() if kind == "LDG") <= 6 * vectors, found
    # The first value of a map, which its statistics are relative to, is read alone.
    assert sum(n for (_, size), n in narrow.items() if size < 4) <= 2, found


def check(launches: list[Launch], arch: int) -> None:
    """Everything about the kernels of one call; the merging ones, which are small, just once."""
    for launch in launches:
        if "BLOCK_R" in launch.bound():
            binary = compile_launch(launch, arch)
            assert_sound(binary, launch)
            assert_widest(binary, launch, 16)
        elif arch in (80, 120):
            assert_sound(compile_launch(launch, arch), launch)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration(arch: int, op: str) -> None:
    check(record(calls(SHAPE, torch.bfloat16, True)[op], every_configuration=True), arch)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "channels_last", "arch"),
    [(torch.float32, True, 90), (torch.float32, False, 89), (torch.float16, False, 100)],
    ids=str,
)
def test_other_types_and_layouts(
    dtype: torch.dtype, channels_last: bool, arch: int, op: str
) -> None:
    check(record(calls(SHAPE, dtype, channels_last)[op]), arch)


@pytest.mark.parametrize("op", OPS)
def test_images_whose_size_divides_by_four(op: str) -> None:
    launch = record(calls(NARROW, torch.float16, False)[op])[0]
    assert_widest(compile_launch(launch, 90), launch, 8)


def test_an_unaligned_view_is_noticed() -> None:
    """The check can fail: a map that begins at an odd element moves two bytes at a time."""
    x = torch.empty(8 * 64 * 49 + 1, dtype=torch.float16, device="meta")[1:].view(8, 64, 7, 7)
    launch = record(lambda: batch_norm_stats(x))[0]
    with pytest.raises(AssertionError):
        assert_widest(compile_launch(launch, 90), launch, 16)
