"""``python -m preact.environment`` says what is there, what is not, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import preact
from preact import backends, environment, tuning
from preact.backends import cpp


def test_report_names_versions_and_settings() -> None:
    rows = environment.report()
    assert rows["preact"].startswith(preact.__version__)
    assert rows["PyTorch"] == torch.__version__
    assert rows["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert all(value and "\n" not in value for value in rows.values())


def test_report_agrees_with_the_backends() -> None:
    rows = environment.report()
    for name, reason in backends.available("cpu").items():
        assert rows[f"{name} on cpu"] == (f"not usable: {reason}" if reason else "usable")
    assert rows["automatic choice"].startswith(f"{backends.choose('cpu')} on cpu")
    if backends.cpu_capability():
        assert rows["instruction set"] in ("AMX", "AVX512_BF16", "AVX512", "AVX2", "baseline")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_usable_on_cuda() -> None:
    rows = environment.report()
    for name in backends.NAMES:
        assert rows[f"{name} on cuda"].startswith("not usable: ")


def test_a_missing_library_is_reported_with_the_reason_of_the_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpp, "native_path", lambda name="_C": None)
    record = {"reasons": {"_C": "no C++ compiler found (c++)", "_C_cuda": ""}}
    monkeypatch.setattr(environment, "_build_record", lambda: record)
    rows = environment.report()
    assert rows["C++ kernels"] == "not built: no C++ compiler found (c++)"
    assert rows["CUDA kernels"].startswith("not built: ")


def run_module(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "preact.environment"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_module_prints_one_line_for_each_title() -> None:
    result = run_module()
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for title, line in zip(environment.report(), lines, strict=True):
        assert line.startswith(title + "  ")


def test_a_forced_backend_that_cannot_run_is_explained() -> None:
    result = run_module(PREACT_BACKEND="triton")
    assert result.returncode == 0, result.stderr
    reason = backends.available("cpu")["triton"]
    if reason:
        assert f"backend 'triton' cannot run on cpu: {reason}" in result.stdout
    assert "PREACT_BACKEND=triton" in result.stdout


@pytest.mark.parametrize("used", ["baseline", "AVX2", "AVX512", "AVX512_BF16"])
def test_the_instruction_set_can_be_lowered(used: str) -> None:
    sets = ["", "baseline", "AVX2", "AVX512", "AVX512_BF16", "AMX"]
    if sets.index(backends.cpu_capability()) <= sets.index(used):
        pytest.skip(f"the CPU kernels use {backends.cpu_capability() or 'nothing'} here")
    lines = run_module(PREACT_CPU_CAPABILITY=used.lower()).stdout.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("instruction set")] == [used]


@pytest.mark.skipif(backends.cpu_caches() is None, reason="no native kernels")
@pytest.mark.parametrize(
    ("stated", "first", "second"),
    [
        ("16384,262144", "16 KiB", "256 KiB"),
        ("1,1", "8 KiB", "64 KiB"),
        ("262144,1073741824", "64 KiB", "65536 KiB"),
        ("0,-1", "32 KiB", "512 KiB"),
    ],
)
def test_the_sizes_of_the_caches_can_be_stated(stated: str, first: str, second: str) -> None:
    printed = run_module(PREACT_CPU_CACHES=stated).stdout
    assert f"blocks are made for {first} of the first level, {second} of the second" in printed


def test_what_is_no_size_of_caches_changes_nothing() -> None:
    rows = [
        next(
            line
            for line in run_module(PREACT_CPU_CACHES=stated).stdout.splitlines()
            if "caches" in line
        )
        for stated in ("", "large")
    ]
    assert rows[0] == rows[1]


def _reported(level: str) -> int:
    return os.sysconf(level) if level in getattr(os, "sysconf_names", {}) else 0


@pytest.mark.skipif(backends.cpu_caches() is None, reason="no native kernels")
@pytest.mark.skipif(_reported("SC_LEVEL1_DCACHE_SIZE") <= 0, reason="no caches are reported")
def test_blocks_are_made_for_the_caches_that_the_system_reports() -> None:
    sizes = (_reported(f"SC_LEVEL{level}_SIZE") // 1024 for level in ("1_DCACHE", "2_CACHE"))
    printed = run_module(PREACT_CPU_CACHES="").stdout
    assert "made for {} KiB of the first level, {} KiB of".format(*sizes) in printed


def test_convolutions_measured_before_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    device = torch.device("cpu")
    tuning.remember("plan backward", "(8, 64, 56, 56)", (True,), device)
    tuning.remember("plan forward", "(8, 64, 56, 56)", (False,), device)
    rows = environment.report()
    assert rows["kept for cpu 1"] == "backward (8, 64, 56, 56): our convolution"
    assert rows["kept for cpu 2"] == "forward (8, 64, 56, 56): the library"
