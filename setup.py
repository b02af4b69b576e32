"""Builds the native libraries of preact; everything else stands in pyproject.toml.

``PREACT_BUILD`` chooses what is built:

- ``auto`` (the default): C++ and CUDA where nvcc and a CUDA build of PyTorch are found (no GPU is
  needed), else C++, else pure Python. Each step down is reported in one line.
- ``cpu``: C++; ``cuda``: C++ and CUDA. The build fails where the choice cannot be met.
- ``none``: pure Python.

``PREACT_WARNINGS=error`` stops at the first warning of a compiler, for those who work on preact.
``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CUDA_HOME`` and ``CXX`` have their usual meaning.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # met without build isolation only
    raise SystemExit(
        f"preact: the build needs setuptools >= 77, found {setuptools.__version__}; "
        "pip install 'setuptools>=77' wheel ninja"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECORD = "_build.json"
OLDEST_TORCH = (2, 10)
OLDEST_PYTHON_TAG = "cp310"
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
LIBRARIES = {"_C": "C++", "_C_cuda": "CUDA"}

# Commands that compile. The others (metadata, sdist) then need neither PyTorch nor a compiler.
BUILDING = {"bdist_wheel", "build", "build_ext", "build_py", "develop", "editable_wheel", "install"}

# Why each library is not built, in words; an empty string where it is.
reasons = dict.fromkeys(LIBRARIES, "")


def say(message: str) -> None:
    print(f"preact: {message}", file=sys.stderr, flush=True)


def build_mode() -> str:
    mode = os.environ.get("PREACT_BUILD", "").strip().lower() or "auto"
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"preact: PREACT_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    return mode


def warnings_stop() -> bool:
    setting = os.environ.get("PREACT_WARNINGS", "")
    if setting not in ("", "error"):
        raise SystemExit(f"preact: PREACT_WARNINGS must be error or nothing, got {setting!r}")
    return setting == "error"


def why_no_cpp() -> str:
    """Empty where the C++ kernels can be compiled, else the reason why not."""
    if sys.platform == "win32":
        return "native kernels are built on Linux and macOS only"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"PyTorch cannot be imported where the build runs ({error})"
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        return f"PyTorch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    compiler = shlex.split(command)[0]
    return "" if shutil.which(compiler) else f"no C++ compiler found ({compiler})"


def cuda_home() -> Path | None:
    """Root of the CUDA toolkit: CUDA_HOME, else where the nvcc on PATH says that it lives."""
    stated = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if stated:
        return Path(stated)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc on PATH may be a wrapper outside the toolkit, so its own answer counts.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def why_no_cuda() -> str:
    """Empty where the CUDA kernels can be compiled, else the reason why not."""
    import torch

    if not list(ROOT.glob("csrc/cuda/*.cu")):
        return "this version has no CUDA sources"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit found (nvcc is not on PATH and CUDA_HOME is not set)"
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return f"no nvcc in the CUDA toolkit at {home}"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", version)
    if release is None:
        return f"{nvcc} does not tell its version"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release.group(1)}, PyTorch of CUDA {torch.version.cuda}"
    os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported, which reads it once
    return ""


def set_architectures() -> None:
    """Compile for every architecture we support, whatever GPU the build machine has or lacks."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return
    nvcc = Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = set(listed.split())
    chosen = [a for a in DEFAULT_ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]
    dropped = [a for a in DEFAULT_ARCHITECTURES if a not in chosen]
    if chosen and dropped:
        say(f"this nvcc does not know the architectures {', '.join(dropped)}: left out")
    chosen = chosen or list(DEFAULT_ARCHITECTURES)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"  # PTX for later GPUs


def extension(name: str) -> Extension:
    """One library against PyTorch's stable ABI and Python's limited API."""
    from torch.utils import cpp_extension

    cuda = name == "_C_cuda"
    abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # PyTorch adds Py_LIMITED_API
    system = [
        flag
        for directory in cpp_extension.include_paths("cuda" if cuda else "cpu")
        for flag in ("-isystem", directory)
    ]
    cxx = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    cxx += ["-fno-math-errno"]  # nobody asks for it, and a root that may set it is no vector's
    cxx += ["-Wextra", *abi, *system]  # as system headers PyTorch's own give no warnings
    nvcc = ["-O3", "-std=c++20", "-DUSE_CUDA", *abi]
    nvcc += ["-Xcompiler", "-fvisibility=hidden", "-Xcompiler", "-Wall", "-Xcompiler", "-Wextra"]
    nvcc += system
    if warnings_stop():
        cxx += ["-Werror"]
        nvcc += ["-Werror", "all-warnings", "-Xcompiler", "-Werror"]
    patterns = ("csrc/cuda/*.cu", "csrc/cuda/*.cpp") if cuda else ("csrc/*.cpp", "csrc/cpu/*.cpp")
    sources = sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
    )
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        f"preact.{name}",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx + (["-DUSE_CUDA"] if cuda else []), "nvcc": nvcc},
        # Only what is used is recorded as needed, so that one binary fits every PyTorch.
        extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )


def plan(mode: str) -> list[Extension]:
    """The libraries to build; says what is left out in auto mode, exits where a choice fails."""
    reasons["_C"] = "PREACT_BUILD=none" if mode == "none" else why_no_cpp()
    if reasons["_C"]:
        if mode in ("cpu", "cuda"):
            raise SystemExit(f"preact: PREACT_BUILD={mode} cannot be met: {reasons['_C']}")
        reasons["_C_cuda"] = reasons["_C"]
        say(f"building the pure Python package: {reasons['_C']}")
        return []
    reasons["_C_cuda"] = "PREACT_BUILD=cpu" if mode == "cpu" else why_no_cuda()
    if reasons["_C_cuda"]:
        if mode == "cuda":
            raise SystemExit(f"preact: PREACT_BUILD=cuda cannot be met: {reasons['_C_cuda']}")
        say(f"building the C++ kernels, not the CUDA kernels: {reasons['_C_cuda']}")
        return [extension("_C")]
    set_architectures()
    say(f"building the C++ and CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    return [extension("_C"), extension("_C_cuda")]


def finish(directory: Path) -> None:
    """Drop libraries an earlier build left in the package and record what this one holds."""
    for name, reason in reasons.items():
        if reason:
            (directory / f"{name}.abi3.so").unlink(missing_ok=True)
    record = {"mode": build_mode(), "reasons": reasons}
    if "torch" in sys.modules:
        record["torch"] = sys.modules["torch"].__version__
    if not reasons["_C_cuda"]:
        record["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class BuildPython(build_py):
    def run(self) -> None:
        package = ROOT / "preact" if self.editable_mode else Path(self.build_lib, "preact")
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # modules that are gone must not be packed
        super().run()
        finish(package)


class BuildWheel(bdist_wheel):
    def run_command(self, command: str) -> None:
        super().run_command(command)
        # What could be built decides the tag.
        if command == "build" and not self.distribution.has_ext_modules():
            self.root_is_pure = True


def native_build() -> type[build_ext]:
    """PyTorch's build_ext, which in auto mode goes on without a library that does not build."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):  # type: ignore[misc]
        def finalize_options(self) -> None:
            super().finalize_options()
            # Editable installs build in a temporary folder; a lasting one lets Ninja reuse objects.
            self.build_temp = str(ROOT / "build" / f"native-{sysconfig.get_platform()}")

        def build_extensions(self) -> None:
            every, self.extensions = self.extensions, []
            built, temporary = [], self.build_temp
            for one in every:
                name = one.name.rpartition(".")[2]
                self.extensions, self.build_temp = [one], str(Path(temporary, name))
                try:
                    super().build_extensions()
                except Exception as error:  # compilers fail in many ways; none may stop pip
                    if build_mode() != "auto" or warnings_stop():
                        raise
                    self._give_up([e.name.rpartition(".")[2] for e in every[len(built) :]], error)
                    break
                finally:
                    # PyTorch patches the compiler object for every call of build_extensions.
                    vars(self.compiler).pop("compile", None)
                    vars(self.compiler).pop("_compile", None)
                built.append(one)
            self.build_temp = temporary
            self.extensions = self.distribution.ext_modules = built

        def _give_up(self, names: list[str], error: Exception) -> None:
            explicit = "cuda" if names == ["_C_cuda"] else "cpu"
            reason = (
                f"the {LIBRARIES[names[0]]} build failed ({type(error).__name__}); "
                f"PREACT_BUILD={explicit} with pip's -v shows the compiler's messages"
            )
            reasons.update(dict.fromkeys(names, reason))
            left = "the C++ kernels alone" if explicit == "cuda" else "the pure Python package"
            say(f"going on with {left}: {reason}")

        def run(self) -> None:
            super().run()
            inplace = self.inplace or self.editable_mode
            finish(ROOT / "preact" if inplace else Path(self.build_lib, "preact"))

    return BuildNative


arguments: dict[str, Any] = {"cmdclass": {"build_py": BuildPython, "bdist_wheel": BuildWheel}}
if BUILDING & set(sys.argv):
    extensions = plan(build_mode())
    if extensions:
        arguments["ext_modules"] = extensions
        arguments["cmdclass"]["build_ext"] = native_build()
        arguments["options"] = {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON_TAG}}
setup(**arguments)
