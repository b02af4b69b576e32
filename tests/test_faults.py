"""Freed memory that stays with the process, and the command that counts what it saves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import preact
from benchmarks import faults, timing
from benchmarks.__main__ import main
from benchmarks.records import read_records
from preact import memory

# Maps of 40 MiB, which by default glibc takes from the system and gives back one by one.
STEPS = """
import resource, sys, torch, preact
if sys.argv[1] == "retain":
    preact.retain_freed_memory()
def step():
    maps = [torch.ones(10 << 20) for _ in range(4)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_freed_memory_causes_no_faults_where_it_is_retained():
    def faults_of(allocator: str) -> int:
        command = [sys.executable, "-c", STEPS, allocator]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults_of("retain") < 100
    assert faults_of("default") > 10_000


def test_a_c_library_without_the_setting_is_told(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match="no mallopt"):
        preact.retain_freed_memory()
    result = CliRunner().invoke(main, ["--quick", "--allocator", "retain"])
    assert result.exit_code == 2
    assert "use --allocator default" in result.output


def test_command(tmp_path, monkeypatch):
    calls = []

    def run_here(function, *args):
        calls.append(args)
        return 0.25, 7.0

    monkeypatch.setattr(faults, "in_new_process", run_here)
    arguments = ["faults", "--networks", "preresnet20", "--dtypes", "float32", "--rounds", "2"]
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = read_records(tmp_path / "faults.csv")
    kinds = [(p, a) for p in ("preact", "eager") for a in faults.ALLOCATORS]
    assert [(row["provider"], row["allocator"]) for row in rows] == kinds
    assert [args[2:4] for args in calls] == 2 * kinds, "processes take turns"
    assert all((row["ms"], row["faults"]) == ("250", "7") for row in rows)
    assert CliRunner().invoke(main, ["faults", "--networks", "none"]).exit_code == 2
    assert CliRunner().invoke(main, ["faults", "--dtypes", "float16"]).exit_code == 2


def test_a_step_alone():
    seconds, count = faults.steps_alone(
        "preresnet20", "float32", "preact", "default", 1, torch.get_num_threads()
    )
    assert seconds > 0
    assert 0 <= count <= timing.page_faults()
