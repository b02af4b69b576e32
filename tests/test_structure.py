"""The package's own promises: dependencies point one way, choices are honoured, import is lazy."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest
import torch

import preact
from preact import backends
from preact.backends import cpp

PACKAGE = Path(preact.__file__).parent
# Lower layers first: a module may import its own layer and those before it.
LAYERS = [
    {
        "arguments",
        "variables",
        "reference",
        "reference_units",
        "reference_pool",
        "reference_dense",
        "costs",
        "accuracy",
        "device",
        "hooks",
        "memory",
    },
    {"tuning"},
    {"triton_kernels"},
    {"ops"},
    {"backends"},
    {"proof", "trials"},
    {"plans"},
    {"checks", "remembered", "running_stats"},
    {"prefix"},
    {"autograd"},
    {"identity_units"},
    {"choice"},
    {"serving"},
    {"units"},
    {"functional"},
    {"synchronised", "dense", "pooled"},
    {"calls"},
    {"folded"},
    {"folded_choice"},
    {"folded_units", "folded_chain"},
    {"modules"},
    {"models", "fuse", "fold"},
    {"environment", "__init__"},
]


def layer_of(module: str) -> int:
    """Private modules of fuse stand with it."""
    name = module.split(".")[0]
    if name.startswith("_") and name != "__init__":
        name = "fuse"
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports at run time, relative to the package."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in typing_only:
            continue
        if node.level < depth:
            continue  # within its own folder
        names = [node.module] if node.module else [alias.name for alias in node.names]
        found.update(name for name in names if name)
    return found


def test_dependencies_point_one_way():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        own = layer_of(".".join(relative.parts))
        for name in imports(path):
            if (PACKAGE / name.split(".")[0]).exists() or (PACKAGE / f"{name}.py").exists():
                assert layer_of(name) <= own, f"{relative} imports {name}"


def test_no_two_modules_need_each_other_even_for_types():
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    needs = {}
    for name, path in modules.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        direct = {node.module for node in nodes if node.level == 1 and node.module}
        direct |= {a.name for n in nodes if n.level == 1 and not n.module for a in n.names}
        needs[name] = direct & set(modules)
    while needs:
        free = [name for name, of_it in needs.items() if not of_it & set(needs)]
        assert free, f"in a circle: {sorted(needs)}"
        for name in free:
            del needs[name]


def test_lines_of_text_outside_tables_are_short():
    root = PACKAGE.parent
    for path in [*root.glob("*.md"), *root.glob("benchmarks/*.md")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|"), f"{path.name}:{number}"


def test_reference_imports_torch_alone():
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    modules = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert {name.split(".")[0] for name in modules} == {"__future__", "torch"}


def test_an_explicit_backend_that_cannot_run_raises_and_says_why():
    x = torch.randn(2, 3, 4, 4)
    with preact.use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        preact.BatchNormReLU2d(3)(x)


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("PREACT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton"):
        backends.choose("cpu")
    monkeypatch.setenv("PREACT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="PREACT_BACKEND"):
        backends.choose("cpu")
    monkeypatch.setenv("PREACT_BACKEND", "reference")
    assert backends.choose("cpu") == "reference"
    with preact.use_backend("reference"):
        monkeypatch.setenv("PREACT_BACKEND", "triton")
        assert backends.choose("cpu") == "reference", "the block outranks the environment"


def test_automatic_choice_falls_back_to_eager_and_logs_once(monkeypatch, caplog):
    monkeypatch.delenv("PREACT_BACKEND", raising=False)
    monkeypatch.setattr(cpp, "why_not", lambda device_type: "no native library")
    monkeypatch.setattr(backends, "_reported", set())
    module = preact.PreActBasicBlock(4, 4)
    with caplog.at_level(logging.INFO, logger="preact"):
        x = torch.randn(2, 4, 5, 5)
        output = module(x), module(x)
    with preact.use_backend("reference"):
        assert torch.equal(output[1], module(x))
    assert sum("no native library" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [((), "cpp"), (("cpp",), "triton"), (("triton",), "cpp"), (("cpp", "triton"), None)],
)
def test_fused_on_a_gpu_is_cuda_where_built_else_triton(monkeypatch, missing, chosen):
    for name, module in (("cpp", cpp), ("triton", backends.triton)):
        reason = f"{name} is missing" if name in missing else ""
        monkeypatch.setattr(module, "why_not", lambda device_type, reason=reason: reason)
    monkeypatch.delenv("PREACT_BACKEND", raising=False)
    automatic = "reference" if chosen is None else backends.AUTO
    assert backends.choose("cuda") == automatic, "proved and measured before anybody gets it"
    monkeypatch.setenv("PREACT_BACKEND", "fused")
    if chosen is not None:
        assert backends.choose("cuda") == chosen
    else:
        with pytest.raises(RuntimeError, match="cpp is missing; triton is missing"):
            backends.choose("cuda")
    with preact.use_backend("fused"), pytest.raises(RuntimeError, match="device type xpu"):
        backends.choose("xpu")


def test_transforms_run_eagerly():
    module = preact.PreActBasicBlock(4, 4).eval()
    x = torch.randn(3, 4, 5, 5)
    batched = torch.func.vmap(lambda one: module(one[None])[0])(x)
    torch.testing.assert_close(batched, module(x), rtol=1e-4, atol=1e-5)
