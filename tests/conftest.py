"""What every test shares: a fixed seed, and the reason where a GPU is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def choices_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured on the way neither comes from the user's folder nor goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREACT_CACHE_DIR", str(tmp_path_factory.mktemp("choices")))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_map_is_too_small() -> Iterator[None]:
    """Small maps, for which the automatic choice may be eager PyTorch, test what large ones run;
    in processes of a test as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREACT_SMALL_MAP", "0")
        yield


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Tests replace what calls are decided by."""
    from preact import remembered

    remembered.forget()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has norms folded whatever that takes."""
    from preact import trials

    monkeypatch.setattr(trials, "select_on_cpu", lambda op, key, ways, run, *rest: ways[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    built = torch.version.cuda is not None
    reason = "no CUDA device" if built else f"PyTorch {torch.__version__} is built without CUDA"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A GPU that finds the last configuration the fastest; the sizes of what it measured."""
    pytest.importorskip("triton")
    from preact import device as devices
    from preact import tuning

    asked: list[int] = []

    def measure(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
        for run in runs:
            run()
        asked.append(len(runs))
        return [1.0 / (1 + index) for index in range(len(runs))]

    class Guard:
        def __init__(self, device: torch.device) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PREACT_TUNE", raising=False)
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(devices, "_of_gpu", lambda index: devices.Properties("A GPU/x", 90, 132))
    return asked
