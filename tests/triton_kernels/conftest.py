"""The tests here run Triton kernels: on a GPU, or on the CPU where TRITON_INTERPRET=1.

``tests/test_triton.py`` starts a process with the interpreter for each file of this folder; in the
process of the other tests they are the tests of the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..evidence import interpreter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if interpreter.ACTIVE:
        return
    reason = "no CUDA device; tests/test_triton.py runs this in the interpreter"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if interpreter.ACTIVE else "cuda")


@pytest.fixture(autouse=True)
def poisoned_memory_and_true_bfloat16() -> Iterator[None]:
    """Memory from ``torch.empty`` starts as NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    if interpreter.ACTIVE:
        with interpreter.repaired():
            yield
    else:
        yield
    torch.use_deterministic_algorithms(False)
