"""The source distribution and the wheel hold what they should, and run where no compiler is.

Nothing here asks the network. The native wheel is built in the checkout, so that Ninja reuses the
objects of the installation under test; the other builds compile nothing, or fail at once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import preact

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ".git .venv* .*_cache __pycache__ build dist *.egg-info *.so _build.json"
NOT_SOURCE = shutil.ignore_patterns(*LEFT_OUT.split())
BACKEND = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""


def run(command: list[str], directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # Ninja may stand beside the interpreter, in an environment that is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, "PREACT_WARNINGS": "", **variables}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)


def build(
    hook: str, tree: Path, to: Path, **variables: str
) -> tuple[Path | None, subprocess.CompletedProcess[str]]:
    """Run one hook of the build backend; the file it made, None where it failed."""
    to.mkdir(exist_ok=True)
    result = run([sys.executable, "-c", BACKEND, hook, str(to)], tree, **variables)
    made = [path for path in to.iterdir() if path.suffix in (".whl", ".gz")]
    return (made[0] if result.returncode == 0 else None), result


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def record_in(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        reasons: dict[str, str] = json.loads(archive.read("preact/_build.json"))["reasons"]
    return reasons


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("clean") / "preact"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCE)
    made, result = build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))
    assert made is not None, result.stderr
    return made


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    return directory / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    result = run([*pip, "--wheel-dir", str(to), "."], ROOT, PREACT_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    return next(to.glob("*.whl"))


@pytest.fixture(scope="module")
def pure_wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which so proves complete."""
    made, result = build(
        "build_wheel", unpacked, tmp_path_factory.mktemp("pure"), PREACT_BUILD="none"
    )
    assert made is not None, result.stderr
    assert "preact: building the pure Python package: PREACT_BUILD=none" in result.stderr
    return made


def install(wheel: Path, directory: Path) -> Path:
    """An environment that holds the wheel and, behind it on the path, the packages of this one."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    result = run([*pip, "--no-index", str(wheel)], directory)
    assert result.returncode == 0, result.stdout + result.stderr
    packages = sysconfig.get_path("purelib", vars={"base": str(directory)})
    # A path from a .pth file has its own .pth files ignored: an editable preact stays out of sight.
    (Path(packages) / "behind.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


def run_installed(python: Path, script: str, **variables: str) -> list[str]:
    """The lines a script prints with an installed package and an empty PATH."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    env = {"PATH": str(python.parent), "HOME": str(python.parent), **kept, **variables}
    result = subprocess.run(
        [str(python), "-c", script], cwd=python.parent, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


USE = """
import shutil

import torch

import preact

assert not any(map(shutil.which, ("cc", "gcc", "c++", "g++", "clang", "clang++", "nvcc", "ninja")))
fused, eager = preact.BatchNormReLU2d(17), torch.nn.BatchNorm2d(17)
x = torch.randn(3, 17, 7, 5)
g = torch.randn_like(x)
a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
with preact.use_backend(BACKEND):
    ours = fused(a)
    ours.backward(g)
theirs = torch.relu(eager(b))
theirs.backward(g)
torch.testing.assert_close(ours, theirs)
torch.testing.assert_close(a.grad, b.grad)
torch.testing.assert_close(fused.weight.grad, eager.weight.grad)
torch.testing.assert_close(fused.running_var, eager.running_var)
print(preact.__file__)
"""


def test_sdist_holds_every_source_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in [("csrc", "*.*"), ("preact", "*.py"), ("tests", "*.py")]:
        sources = {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.is_file()
        }
        assert sources - names == set()
    assert {"LICENSE", "Makefile", "README.md", "constraints.txt", "preact/py.typed"} <= names
    built = {n for n in names if n.endswith((".so", ".o", ".pyc", "_build.json")) or "build/" in n}
    assert built == set()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "preact").rglob("*.py")}
    extra = {"preact/_C.abi3.so", "preact/py.typed", "preact/_build.json"}
    assert {name for name in names if ".dist-info/" not in name} == python | extra
    packages = {name.split("/")[1] for name in python if name.count("/") == 2}
    assert {"backends", "models"} <= packages


def test_wheel_serves_every_python_from_the_oldest_on(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("preact", preact.__version__, "cp310", "abi3")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        folder = f"preact-{preact.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        assert "Root-Is-Purelib: false" in archive.read(f"{folder}/WHEEL").decode()
    required = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_wheel_runs_where_no_compiler_is(wheel: Path, tmp_path: Path) -> None:
    python = install(wheel, tmp_path / "environment")
    script = USE.replace("BACKEND", "'cpp'")
    [where] = run_installed(python, script)
    assert Path(where).is_relative_to(tmp_path)


def test_pure_wheel_runs_on_the_reference_backend(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name == f"preact-{preact.__version__}-py3-none-any.whl"
    assert not any(name.endswith(".so") for name in names_in(pure_wheel))
    assert "preact/py.typed" in names_in(pure_wheel)
    python = install(pure_wheel, tmp_path / "environment")
    [where] = run_installed(python, USE.replace("BACKEND", "'reference'"))
    assert Path(where).is_relative_to(tmp_path)
    lines = run_installed(python, "from preact import environment; environment.main()")
    report = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines}
    assert report["C++ kernels"] == "not built: PREACT_BUILD=none"
    assert report["automatic choice"] == "reference on cpu"


def test_forced_native_backend_of_a_pure_wheel_says_why_not(
    pure_wheel: Path, tmp_path: Path
) -> None:
    python = install(pure_wheel, tmp_path / "environment")
    script = """
import torch, preact
try:
    with preact.use_backend("cpp"):
        preact.BatchNormReLU2d(3)(torch.ones(2, 3, 4, 4))
except RuntimeError as error:
    print(error)
"""
    [message] = run_installed(python, script)
    assert "not built" in message


def test_cuda_without_a_toolkit_fails_loudly(unpacked: Path, tmp_path: Path) -> None:
    variables = {"PREACT_BUILD": "cuda", "CUDA_HOME": str(tmp_path / "nowhere")}
    made, result = build("build_wheel", unpacked, tmp_path / "out", **variables)
    assert made is None
    assert "preact: PREACT_BUILD=cuda cannot be met: " in result.stderr


def test_unknown_choice_fails_loudly(unpacked: Path, tmp_path: Path) -> None:
    made, result = build("build_wheel", unpacked, tmp_path / "out", PREACT_BUILD="gpu")
    assert made is None
    assert "PREACT_BUILD must be auto, cpu, cuda or none, got 'gpu'" in result.stderr


@pytest.fixture
def broken(unpacked: Path, tmp_path: Path) -> Path:
    """The sources with one file that does not compile, and that one alone."""
    tree = tmp_path / "broken"
    shutil.copytree(unpacked, tree, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "build"))
    (tree / "csrc" / "ops.cpp").write_text("#error broken on purpose\n")
    return tree


def test_automatic_build_goes_on_without_what_does_not_compile(
    broken: Path, tmp_path: Path
) -> None:
    made, result = build("build_wheel", broken, tmp_path / "out", PREACT_BUILD="auto")
    assert made is not None, result.stderr
    assert made.name.endswith("-py3-none-any.whl")
    said = [line for line in result.stderr.splitlines() if "going on with" in line]
    assert len(said) == 1
    assert said[0].startswith("preact: going on with the pure Python package: the C++ build failed")
    assert record_in(made)["_C"].startswith("the C++ build failed")


def test_explicit_build_stops_at_what_does_not_compile(broken: Path, tmp_path: Path) -> None:
    made, result = build("build_wheel", broken, tmp_path / "out", PREACT_BUILD="cpu")
    assert made is None
    assert "broken on purpose" in result.stdout + result.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
def test_an_old_toolkit_drops_the_architectures_it_does_not_know(
    broken: Path, tmp_path: Path
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    answers = {"--version": f"release {torch.version.cuda}", "--list-gpu-code": "sm_80 sm_86 sm_90"}
    lines = [f'[ "$1" = {asked} ] && echo "{answer}"' for asked, answer in answers.items()]
    nvcc.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    nvcc.chmod(0o755)
    (broken / "csrc" / "cuda" / "any.cu").write_text("")
    variables = {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": ""}
    _, result = build("build_wheel", broken, tmp_path / "out", PREACT_BUILD="cuda", **variables)
    said = [line for line in result.stderr.splitlines() if "preact: " in line]
    assert said[0].endswith("this nvcc does not know the architectures 8.9, 10.0, 12.0: left out")
    assert said[1].endswith("building the C++ and CUDA kernels for 8.0;8.6;9.0+PTX")


def check_pure_fallback(unpacked: Path, to: Path, reason: str, **variables: str) -> None:
    made, result = build("build_wheel", unpacked, to, PREACT_BUILD="auto", **variables)
    assert made is not None, result.stderr
    assert made.name.endswith("-py3-none-any.whl")
    assert f"preact: building the pure Python package: {reason}" in result.stderr
    assert record_in(made)["_C"].startswith(reason)


def test_automatic_build_without_a_compiler_is_pure_python(unpacked: Path, tmp_path: Path) -> None:
    reason = "no C++ compiler found (no-such-compiler)"
    check_pure_fallback(unpacked, tmp_path / "out", reason, CXX="no-such-compiler")


def test_automatic_build_without_pytorch_is_pure_python(unpacked: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "torch"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden for a test')\n")
    reason = "PyTorch cannot be imported where the build runs (hidden for a test)"
    check_pure_fallback(unpacked, tmp_path / "out", reason, PYTHONPATH=str(hidden.parent))


def test_import_is_quick_and_quiet() -> None:
    script = """
import sys, time
import torch
before = time.perf_counter()
import preact
seconds = time.perf_counter() - before
assert "triton" not in sys.modules
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "_C.abi3.so" not in maps and "_C_cuda.abi3.so" not in maps
assert not torch.cuda.is_initialized()
assert seconds < 2, f"import preact took {seconds:.1f} s after PyTorch's own"
"""
    result = run([sys.executable, "-c", script], ROOT)
    assert result.stderr == ""
    assert (result.returncode, result.stdout) == (0, "")
