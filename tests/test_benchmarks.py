"""The benchmark: wrong results get no speed figure, and the figures are what they claim to be."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import preact
from benchmarks import cases, floor, memory, parity, timing
from benchmarks.__main__ import main
from benchmarks.networks import NETWORKS, Network
from benchmarks.providers import PROVIDERS, Prepared, Provider
from benchmarks.rows import FLOOR, read_csv

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "network,source,batch_size,image_size,dtype,mode,provider,layout,parity,margin,note,best,rounds,"
    "step_p20_ms,step_p50_ms,step_p80_ms,speedup_q25,speedup,speedup_q75,"
    "against_compile_q25,against_compile,against_compile_q75,"
    "over_floor_q25,over_floor,over_floor_q75,faults,peak_bytes,saved_bytes,compile_seconds"
)
SIZE, BATCH, CLASSES = 8, 4, 5
CONVOLUTIONS = 3


class Foreign(nn.Module):
    """Three convolutions in pre-activation, written without preact."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Own(nn.Sequential):
    """The same size, made of preact's block."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            preact.PreActBasicBlock(8, 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        )


def network(build: Callable[[], nn.Module] = Foreign, source: str = "torch") -> Network:
    return Network("tiny", source, build, SIZE, BATCH, BATCH, CLASSES)


def settings(**changes: object) -> cases.Settings:
    values: dict[str, object] = {
        "device": torch.device("cpu"),
        "providers": [PROVIDERS["preact"]],
        "layouts": ("nchw", "channels_last"),
        "rounds": 2,
        "seconds": 0.0,
    }
    return cases.Settings(**{**values, **changes})  # type: ignore[arg-type]


def wrong(model: nn.Module, network: Network, mode: str) -> Prepared:
    return Prepared(model, lambda images: model(images) * 1.001)


def raising(model: nn.Module, network: Network, mode: str) -> Prepared:
    raise RuntimeError("cannot read '/some/where/file.so': no such file")


def invoke(folder: Path, *arguments: str) -> Result:
    common = ("--networks", "tiny", "--device", "cpu", "--output", str(folder))
    short = ("--rounds", "2", "--seconds", "0", "--dtypes", "float32", "--layouts", "nchw")
    return CliRunner().invoke(main, [*common, *short, *arguments])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One repeat a sample, and one thread: at this size a second one only waits."""
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", network())


def test_list_names_everything_that_can_run() -> None:
    command = [sys.executable, "-m", "benchmarks", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in (*NETWORKS, *PROVIDERS, "float32", "bfloat16", "training", "inference"):
        assert name in done.stdout


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    result = CliRunner().invoke(main, ["--networks", "preresnet20,alexnet"])
    assert result.exit_code == 2
    assert "alexnet" in result.output
    assert "densenet121" in result.output


@pytest.mark.usefixtures("tiny")
def test_a_run_of_limited_length_names_what_it_leaves_out(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main,
        [
            "--networks", "tiny", "--device", "cpu", "--output", str(tmp_path), "--rounds", "1",
            "--dtypes", "float32", "--providers", "eager", "--minutes", "0.001",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "left out after 0.001 minutes: tiny, float32, inference" in result.output
    rows = read_csv(tmp_path / "cpu.csv")
    assert {(row["mode"], row["layout"]) for row in rows} == {("training", "channels_last")}


@pytest.mark.usefixtures("tiny")
def test_run_writes_every_figure(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--providers", "preact")
    assert result.exit_code == 0, result.output
    rows = read_csv(tmp_path / "cpu.csv")
    lanes = [(row["mode"], row["provider"]) for row in rows]
    assert lanes == [(m, p) for m in ("training", "inference") for p in ("eager", "preact", FLOOR)]
    conditions = {"python", "torch", "triton", "preact", "hardware", "cores", "threads", "date"}
    assert ",".join(rows[0]).startswith(f"{COLUMNS},")
    assert conditions <= set(rows[0])
    for row in rows:
        assert float(row["step_p20_ms"]) <= float(row["step_p50_ms"]) <= float(row["step_p80_ms"])
        assert float(row["over_floor"]) > 0
    training = {row["provider"]: row for row in rows if row["mode"] == "training"}
    assert float(training["eager"]["speedup"]) == 1.0
    assert float(training[FLOOR]["over_floor"]) == 1.0
    assert training["eager"]["parity"] == "reference"
    assert training["preact"]["parity"] == "passed"
    assert int(training["preact"]["saved_bytes"]) < int(training["eager"]["saved_bytes"])
    assert int(training["eager"]["peak_bytes"]) > 0
    text = (tmp_path / "cpu.csv").read_text()
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    for name in ("cpu_speedup.png", "cpu_floor.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_wrong_results_get_no_speed_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "preact", Provider("preact", wrong, ours=True))
    result = invoke(tmp_path, "--providers", "preact")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    rows = read_csv(tmp_path / "cpu.csv")
    for row in (row for row in rows if row["provider"] == "preact"):
        assert row["parity"] == "FAILED"
        assert float(row["margin"]) > 1
        assert "error" in row["note"]
        figures = ("step_p50_ms", "speedup", "over_floor", "rounds", "peak_bytes", "saved_bytes")
        assert not any(row[name] for name in figures)
    assert all(row["step_p50_ms"] for row in rows if row["provider"] != "preact")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "status"), [("compile", 0), ("preact", 1)])
def test_failure_of_a_provider_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    monkeypatch.setitem(PROVIDERS, name, Provider(name, raising, ours=name == "preact"))
    result = invoke(tmp_path, "--providers", name, "--modes", "inference")
    assert result.exit_code == status, result.output
    row = next(r for r in read_csv(tmp_path / "cpu.csv") if r["provider"] == name)
    assert row["parity"] == "error"
    assert row["note"] == "RuntimeError: cannot read '…': no such file"
    assert not row["step_p50_ms"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize(("build", "source"), [(Foreign, "torch"), (Own, "preact")])
def test_preact_passes(build: type[nn.Module], source: str, mode: str, dtype: str) -> None:
    rows = cases.run_case(cases.Case(network(build, source), dtype, mode), settings())
    assert {row.parity for row in rows if row.provider == "preact"} == {"passed"}
    assert sorted(row.provider for row in rows if row.best) == [FLOOR, "eager", "preact"]
    calls = CONVOLUTIONS * (2 if mode == "training" else 1)
    assert {row.note for row in rows if row.provider == FLOOR} == {f"{calls} convolutions"}


def test_fallback_is_tried_once() -> None:
    def prepare(model: nn.Module, network: Network, mode: str) -> Prepared:
        def broken(images: Tensor) -> Tensor:
            raise RuntimeError("no")

        return Prepared(model, broken, fallback=lambda: Prepared(model, model, note="second"))

    other = Provider("other", prepare)
    rows = cases.run_case(
        cases.Case(network(), "float32", "inference"),
        settings(providers=[other], layouts=("nchw",)),
    )
    row = next(row for row in rows if row.provider == "other")
    assert (row.parity, row.note) == ("passed", "second")


def test_floor_replays_what_was_recorded() -> None:
    model = Foreign().to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    calls = floor.record(lambda: model(images).sum().backward())
    assert [call.backward for call in calls] == [False] * CONVOLUTIONS + [True] * CONVOLUTIONS
    masks = [call.arguments[-1] for call in calls if call.backward]
    # The images need no gradient.
    assert masks == [(True, True, False), (True, True, False), (False, True, False)]
    spec = calls[1].arguments[0]
    assert spec.shape == (BATCH, 8, SIZE, SIZE)
    assert spec.stride == (8 * SIZE * SIZE, 1, 8 * SIZE, 8)
    assert floor.record(floor.replay(calls)) == calls


def test_floor_sees_convolutions_in_inference_mode() -> None:
    model, images = Foreign().eval(), torch.randn(BATCH, 3, SIZE, SIZE)
    with torch.inference_mode():
        calls = floor.record(lambda: model(images))
    assert [call.backward for call in calls] == [False] * CONVOLUTIONS


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    linear = nn.Linear(64, 64, bias=False)
    x = torch.randn(32, 64)

    def step() -> None:
        y = linear(x)  # saves x, and the weight
        z = (y * y).t() * 2.0  # saves y twice
        z.sum().backward()

    assert memory.saved_bytes(step, linear) == (x.numel() + x.numel()) * 4


def test_peak_bytes_is_the_high_water_mark() -> None:
    count = 2**18

    def step() -> None:
        a = torch.empty(count)
        b = torch.empty(count)
        del a
        c = torch.empty(count)
        del b, c

    assert memory.peak_bytes(step, "cpu") == 2 * count * 4


def snapshot(scale: float = 1.0, small: float = 1.0, missing: bool = False) -> parity.Snapshot:
    gradients = {"a": torch.ones(100) * scale, "b": torch.ones(2) * 0.01 * small}
    return parity.Snapshot(
        torch.ones(3), torch.ones(()), {**gradients, "c": None if missing else torch.ones(1)}, {}
    )


@pytest.mark.parametrize(
    "actual",
    [
        pytest.param(snapshot(scale=1.01), id="all gradients"),
        pytest.param(snapshot(small=1.5), id="one small gradient"),
        pytest.param(snapshot(scale=math.nan), id="nan"),
        pytest.param(snapshot(small=math.nan), id="nan in one"),
        pytest.param(snapshot(scale=math.inf), id="infinite"),
        pytest.param(snapshot(missing=True), id="no gradient"),
    ],
)
def test_parity_catches(actual: parity.Snapshot) -> None:
    eager = parity.compare(snapshot(scale=1.0001), snapshot())
    assert parity.judge(parity.compare(snapshot(), snapshot()), [eager], "float32").passed
    outcome = parity.judge(parity.compare(actual, snapshot()), [eager], "float32")
    assert not outcome.passed
    assert "gradient" in outcome.detail


def test_rounds_are_paired_and_the_order_turns() -> None:
    ran: list[str] = []
    steps = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    samples = timing.measure(steps, "cpu", rounds=6, seconds=60.0)
    warm_up, timed = ran[:6], ran[6:]
    assert warm_up == list("abcabc")
    orders = [timed[start : start + 3] for start in range(0, 18, 3)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == list("aabbcc")
    assert all(len(s.seconds) == len(s.faults) == 6 for s in samples.values())
    ratio = timing.paired(timing.Samples([2.0, 3.0, 8.0]), timing.Samples([1.0, 1.0, 2.0]))
    assert (ratio.low, ratio.median, ratio.high) == (2.5, 3.0, 3.5)


def test_commands_are_listed_and_compare_is_the_default() -> None:
    listed = CliRunner().invoke(main, ["--help"])
    assert listed.exit_code == 0
    assert "compare" in listed.output
    outputs = [CliRunner().invoke(main, [*name, "--list"]).output for name in ([], ["compare"])]
    assert outputs[0] == outputs[1]
    assert "preresnet20" in outputs[0]
