"""The native sources keep to what the oldest supported PyTorch's headers have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"

# Of torch 2.10, which a build against a later one does not show. A new name goes in here once the
# sources were built against 2.10: CONTRIBUTING.md has the command.
IN_TORCH_2_10 = {
    "STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK",
    "TORCH_ABI_VERSION", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK",
    "aoti_torch__reinterpret_tensor", "aoti_torch_dtype_float32", "aoti_torch_dtype_float64",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream", "aoti_torch_get_device_index",
    "aoti_torch_get_device_type", "aoti_torch_get_dtype", "torch_call_dispatcher",
    "torch::headeronly::IntHeaderOnlyArrayRef", "torch::headeronly::MemoryFormat",
    "torch::headeronly::ScalarType", "torch::headeronly::detail::fp16_ieee_from_fp32_value",
    "torch::headeronly::detail::fp16_ieee_to_fp32_value", "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard", "torch::stable::clone", "torch::stable::contiguous",
    "torch::stable::copy_", "torch::stable::detail::from", "torch::stable::detail::to",
    "torch::stable::empty", "torch::stable::get_num_threads", "torch::stable::narrow",
    "torch::stable::parallel_for", "torch::stable::to",
}  # fmt: skip
HEADERS_OF_TORCH_2_10 = {
    "torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/accelerator.h",
    "torch/csrc/stable/library.h", "torch/csrc/stable/ops.h", "torch/csrc/stable/tensor.h",
    "torch/headeronly/util/Half.h",
}  # fmt: skip
NAME = re.compile(
    r"\b(?:(?:STABLE_|STD_)?TORCH_[A-Z_]+|(?:aoti_)?torch_\w+"
    r"|torch::(?:stable|headeronly)::\w+(?:::\w+)*)"
)
# Used where it is defined, and in its place TORCH_ERROR_CODE_CHECK.
GUARDED = {"STABLE_TORCH_ERROR_CODE_CHECK"}


def sources() -> list[Path]:
    return sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCES)))
def test_names_and_headers_are_those_of_the_oldest_torch(path: Path) -> None:
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    included = set(re.findall(r"#include <(torch/[^>]+)>", text))
    assert included <= HEADERS_OF_TORCH_2_10
    used = set(NAME.findall(re.sub(r"#include.*", "", text)))
    allowed = IN_TORCH_2_10 | (GUARDED if path.name == "tensors.h" else set())
    assert used <= allowed, sorted(used - allowed)
