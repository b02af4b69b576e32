"""The choice of a configuration: measured once, kept on disk, and the default where it must be."""

from __future__ import annotations

import json
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
