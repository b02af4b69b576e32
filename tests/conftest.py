"""What every test shares: a fixed seed, and the reason where a GPU is missing."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    built = torch.version.cuda is not None
    reason = "no CUDA device" if built else f"PyTorch {torch.__version__} is built without CUDA"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
