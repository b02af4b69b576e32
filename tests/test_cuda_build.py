"""What nvcc made of the CUDA kernels: architectures, registers, spills, wide accesses, HMMA.

Read from the built library with the cuobjdump of the CUDA toolkit or of Triton.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

import preact
from preact.backends import cpp

LIBRARY = Path(preact.__file__).parent / "_C_cuda.abi3.so"
RECORD = LIBRARY.with_name("_build.json")
STREAMING = (
    "batch_norm_stats",
    "batch_norm_relu",
    "identity_add",
    "batch_norm_relu_backward_reduce",
    "batch_norm_relu_backward_apply",
)
# Kernels of each op's matrix product: types, tiles of 64 and 128 columns, gradients pending or not.
PRODUCTS = {
    "batch_norm_relu_conv2d": 6,
    "batch_norm_relu_conv2d_backward_input": 10,
    "batch_norm_relu_conv2d_backward_weight": 10,
}
REGISTERED = (*STREAMING, "batch_norm_relu_conv2d", "batch_norm_relu_conv2d_backward")


def cuobjdump() -> str:
    """Path of a cuobjdump, or an empty string."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    triton = util.find_spec("triton")
    places = [Path(home, "bin")] if home else []
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    return shutil.which("cuobjdump", path=path) or ""


def why_not() -> str:
    if cpp.native_path("_C_cuda") is None:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        reason = record.get("reasons", {}).get("_C_cuda") or "setup.py has not built it"
        return f"the CUDA library is not built: {reason}"
    return "" if cuobjdump() else "no cuobjdump in the CUDA toolkit or in Triton"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "built")


def dump(*options: str) -> str:
    command = [cuobjdump(), *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    return sorted(set(re.findall(r"\.(sm_\d+)\.cubin", dump("-lelf"))))


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and local bytes and the like, by architecture and mangled kernel name."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = name = ""
    for line in dump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match.group(1)
        elif "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", line)}
            found[architecture, name] = values
    return found


def short(mangled: str) -> str:
    """``batch_norm_relu_kernel<float, true>`` of a mangled name."""
    match = re.match(r"_ZN6preact4cuda(\d+)", mangled)
    if not match:
        return mangled
    start = match.end()
    name = mangled[start : start + int(match.group(1))]
    rest = mangled[start + int(match.group(1)) :]
    product = re.match(
        r"INS0_\d+(Half|Tf32|Float)Math(?:I\d+_+(half|nv_bfloat16)E)?ELi(\d+)E(?:Lb([01])E)?", rest
    )
    if product:
        math, half, columns, pending = product.groups()
        suffix = ", pending" if pending == "1" else ""
        return f"{name}<{half or math.lower()}, {columns}{suffix}>"
    types = {"If": "float", "Id": "double", "I6__half": "half", "I13__nv_bfloat16": "bfloat16"}
    type_ = next((value for key, value in types.items() if rest.startswith(key)), "")
    layout = {"Lb1E": ", channels_last", "Lb0E": ", contiguous"}
    return f"{name}<{type_}{next((v for k, v in layout.items() if k in rest), '')}>"


def test_every_architecture_is_built() -> None:
    asked = json.loads(RECORD.read_text())["architectures"]
    numbers = re.findall(r"(\d+)\.(\d+)", asked)
    assert architectures() == sorted(f"sm_{major}{minor}" for major, minor in numbers)
    if "PTX" in asked:
        assert ".ptx" in dump("-lptx"), "no PTX for later GPUs"


def test_no_kernel_spills() -> None:
    """Prints the registers of every kernel, one column per architecture (``-s`` shows them)."""
    usage = resources()
    columns = architectures()
    kernels = sorted({name for _, name in usage}, key=short)
    assert {arch for arch, _ in usage} == set(columns)
    for op in (*STREAMING, *PRODUCTS):
        assert any(short(name).startswith(f"{op}_kernel<") for name in kernels), op
    width = max(len(short(name)) for name in kernels)
    print(f"\n{'registers':<{width}}  " + "  ".join(columns))
    for name in kernels:
        registers = (f"{usage[arch, name]['REG']:>{len(arch)}}" for arch in columns)
        print(f"{short(name):<{width}}  " + "  ".join(registers))
    spilled = [
        (short(name), arch)
        for (arch, name), values in usage.items()
        if values["STACK"] or values["LOCAL"]
    ]
    assert spilled == []


@functools.cache
def machine_code(architecture: str) -> dict[str, str]:
    """Of each kernel, by short name."""
    code = dump("-sass", "-arch", architecture)
    pieces = re.split(r"^\s*Function : (\S+)$", code, flags=re.MULTILINE)
    return {short(name): text for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


@pytest.mark.parametrize("op", STREAMING)
def test_streaming_kernels_move_16_bytes(op: str) -> None:
    every = machine_code(architectures()[0])
    kernels = {name: code for name, code in every.items() if name.startswith(f"{op}_kernel")}
    assert len(kernels) == 8
    for name, code in kernels.items():
        loads = len(re.findall(r"\bLDG\.E\.128", code))
        stores = len(re.findall(r"\bSTG\.E\.128", code))
        print(f"{name}: {loads} LDG.E.128, {stores} STG.E.128")
        assert loads > 0, name
        if op in ("batch_norm_relu", "identity_add", "batch_norm_relu_backward_apply"):
            assert stores > 0, name


@pytest.mark.parametrize("op", PRODUCTS)
def test_matrix_products_use_tensor_cores_and_copy_16_bytes(op: str) -> None:
    for architecture in (architectures()[0], architectures()[-1]):
        every = machine_code(architecture)
        kernels = {name: code for name, code in every.items() if name.startswith(f"{op}_kernel")}
        assert len(kernels) == PRODUCTS[op]
        for name, code in kernels.items():
            products = len(re.findall(r"\bHMMA\b", code))
            copies = len(re.findall(r"\bLDGSTS\.E[.\w]*\.128", code))
            print(f"{architecture} {name}: {products} HMMA, {copies} LDGSTS.128")
            assert copies > 0, name
            if "<float," in name:
                assert products == 0, "float32 must not be multiplied in less"
                assert "FFMA" in code
            else:
                assert products > 0, name


def test_library_loads_without_a_gpu_and_registers_its_kernels() -> None:
    script = """
import torch, preact
from preact.backends import cpp
assert cpp.load("_C_cuda") == "", cpp.load("_C_cuda")
for name in NAMES:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"preact::{name}", "CUDA"), name
assert not torch.cuda.is_initialized()
""".replace("NAMES", repr(REGISTERED))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_library_keeps_to_the_stable_abi() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    command = ["nm", "-D", "--undefined-only", "--format=just-symbols", str(LIBRARY)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    names = result.stdout.split()
    assert [name for name in names if re.match(r"_ZNK?\d*(2at|3c10|5torch)", name)] == []
    assert torch.version.cuda is not None
