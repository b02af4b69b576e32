"""A device whose backends nobody has tried, for tests of the choice: the CPU, with fakes."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import Tensor

import preact
from preact import backends, choice, ops, plans, proof, reference, tuning

NAN = float("nan")


class Backend:
    """The formulas of ``reference``, counted; ``change`` gets each op's name and results."""

    def __init__(self, change=lambda name, results, first: results, seconds=0.0):
        self.calls: list[str] = []
        for name in ops.SCHEMAS:
            setattr(self, name, self.op(name, change, seconds))

    def op(self, name, change, seconds):
        def run(*arguments):
            self.calls.append(name)
            time.sleep(seconds)
            found = getattr(reference, name)(*arguments)
            several = isinstance(found, tuple)
            results = change(name, list(found) if several else [found], arguments[0])
            return tuple(results) if several else results[0]

        return run


def raises(name, results, first):
    if name == "batch_norm_relu_conv2d_backward":
        raise RuntimeError("no such instruction")
    return results


def unbiased(name, results, first):
    """A variance with n - 1 where n belongs: one per cent in a hundred values."""
    if name == "batch_norm_stats":
        count = first.numel() // first.size(1)
        results[1] = results[1] * count / (count - 1)
    return results


def unwritten(name, results, first):
    """The last pixel of the last image is left as it was."""
    if name == "batch_norm_relu_backward_apply":
        results[0][-1, :, -1, -1] = NAN
    return results


def wrong_where_large(name, results, first):
    """Right on the proof's maps; beyond them a tile is lost."""
    if name == "batch_norm_relu" and first.size(2) > 12:
        results[0][:, :, 12:] = 0
    return results


def wrong_in_half(name, results, first):
    if name == "identity_add" and first.dtype == torch.bfloat16:
        results[0] = results[0] + 1
    return results


def untried_device(monkeypatch, tmp_path):
    """Makes the CPU a device to be measured; ``device(name=Backend)`` are its fused backends."""
    tables: dict[str, Backend] = {}

    def install(**given: Backend) -> SimpleNamespace:
        tables.update(given)
        monkeypatch.setitem(backends.PREFERENCE, "cpu", tuple(given))
        return SimpleNamespace(**given)

    monkeypatch.setenv("PREACT_CACHE_DIR", str(tmp_path))
    for variable in ("PREACT_TUNE", "PREACT_BACKEND", "PREACT_PLAN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "AUTOMATIC", ())
    monkeypatch.setattr(backends, "MEASURED", ("cpu",))
    monkeypatch.setattr(backends, "NAMES", ("reference", "first", "second"))
    monkeypatch.setattr(
        backends, "_why_not", lambda name, _: "" if name in ("reference", *tables) else "absent"
    )
    monkeypatch.setattr(backends, "table", lambda name: tables[name])
    # Whole units by the library's convolutions, in every fake alike.
    monkeypatch.setattr(plans, "fuses_convolution", lambda *_: False)
    forget(monkeypatch)
    return install


def forget(monkeypatch) -> None:
    """As in another process."""
    for module, name in (
        (choice, "_known"), (choice, "_decided"), (choice, "_names"), (choice, "_sizes"),
        (proof, "_found"), (tuning, "_chosen"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, {})


def told_times(monkeypatch):
    """Times as the test says them, by backend; what was timed is listed."""
    asked: list[list[str]] = []
    milliseconds = {"reference": 2.0, "first": 1.0, "second": 1.5}

    def measure(runs, device):
        names = [run.args[0] for run in runs]
        asked.append(names)
        for run in runs:
            run()
        return [milliseconds[name] for name in names]

    monkeypatch.setattr(tuning, "measure", measure)
    return SimpleNamespace(asked=asked, milliseconds=milliseconds)


def unit(channels: int = 8) -> preact.PreActBasicBlock:
    return preact.PreActBasicBlock(channels, channels)


def image(size: int = 6, channels: int = 8, batch: int = 4) -> Tensor:
    return torch.randn(batch, channels, size, size, requires_grad=True)


def ran(fake: Backend, call) -> bool:
    """Whether a call ran a backend's ops, outside everything that is proved and timed."""
    before = len(fake.calls)
    call()
    return len(fake.calls) > before


def chosen() -> list[choice.Choice]:
    return list(choice._decided.values())
