"""The choice of a configuration: measured once, kept on disk, and the default where it must be."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from preact import tuning


class Config(NamedTuple):
    block: int
    warps: int


CONFIGS = (Config(64, 4), Config(128, 4), Config(256, 8))
GPU = torch.device("cuda", 0)


def select(ran: list[Config] | None = None, device: torch.device = GPU) -> Config:
    return tuning.select(
        "op", "class", CONFIGS, lambda config: ran is not None and ran.append(config), device
    )


def test_the_fastest_is_chosen_measured_once_and_found_again(measured: list[int]) -> None:
    ran: list[Config] = []
    assert [select(ran), select(ran)] == [CONFIGS[-1]] * 2
    assert measured == [3]
    assert ran == list(CONFIGS)
    tuning._chosen.clear()  # as in another process
    assert select() == CONFIGS[-1]
    assert measured == [3]


def test_the_file_is_named_by_device_and_versions(measured: list[int], tmp_path: Path) -> None:
    select()
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("A_GPU_x-sm_90-torch")
    assert "triton" in file.name
    assert "preact" in file.name
    assert json.loads(file.read_text()) == {"op class": [256, 8]}


@pytest.mark.parametrize("content", ["", "[1]", '{"op class": [1, 2, 3]}', '{"op class": "x"}'])
def test_a_file_that_says_nothing_useful_is_measured_anew(
    measured: list[int], content: str
) -> None:
    path = tuning.cache_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert select() == CONFIGS[-1]
    assert measured == [3]


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert [select(), select()] == [CONFIGS[-1]] * 2
    assert measured == [3]


def test_nothing_is_measured_where_it_must_not_be(
    measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert select(device=torch.device("cpu")) == CONFIGS[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert select() == CONFIGS[0], "while a graph is captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("PREACT_TUNE", "off")
    assert select() == CONFIGS[0]
    monkeypatch.setenv("PREACT_TUNE", "nonsense")
    with pytest.raises(ValueError, match="PREACT_TUNE"):
        select()
    monkeypatch.setenv("PREACT_TUNE", "auto")
    torch.use_deterministic_algorithms(True)
    try:
        assert select() == CONFIGS[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert measured == []


def test_a_configuration_that_raises_is_left_out(measured: list[int]) -> None:
    def launch(config: Config) -> None:
        if config == CONFIGS[-1]:
            raise RuntimeError("out of resources: shared memory")

    assert tuning.select("op", "class", CONFIGS, launch, GPU) == CONFIGS[-2]
    assert tuning.kept("op", "class", GPU) == CONFIGS[-2]


def test_where_all_raise_the_default_says_why(measured: list[int]) -> None:
    def launch(config: Config) -> None:
        raise RuntimeError("no kernel image")

    assert tuning.select("op", "class", CONFIGS, launch, GPU) == CONFIGS[0]
    assert tuning.kept("op", "class", GPU) is None


def test_memory_that_does_not_suffice_is_the_callers_to_handle(measured: list[int]) -> None:
    def launch(config: Config) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        tuning.select("op", "class", CONFIGS, launch, GPU)


def test_a_user_without_a_home_has_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PREACT_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert tuning.cache_folder().name == "preact"


def test_threads_that_write_at_once_lose_nothing(measured: list[int], tmp_path: Path) -> None:
    path = tmp_path / "cache" / "choices.json"
    entries = [f"op {number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda entry: tuning._store(path, entry, (1, 2)), entries))
    assert set(json.loads(path.read_text())) == set(entries)
