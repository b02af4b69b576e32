"""A training run that can be killed at any time and continued with the same bits.

Nothing random is carried from one iteration to the next: order, crops and dropout come from the
seed and the iteration's number. A checkpoint holds the rest: weights, momenta, the log's open line.
Lines that the log holds beyond the checkpoint are cut off, and written again.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import preact

from .data import Data, Part, augment
from .processes import Processes
from .recipe import Recipe, mixed
from .workload import autocast

__all__ = ["Result", "Trainer"]

CHECKPOINT, TRAIN_LOG, TEST_LOG, RESULT = "checkpoint.pt", "train.csv", "test.csv", "result.json"
_WEIGHTS, _ORDER, _CROPS, _DROPOUT = range(4)
Notify = Callable[[int, float, float], None]
"""Called after every iteration with its number from 1, the last logged loss, the test error."""


@dataclass(frozen=True)
class Result:
    """Of a finished run: the last test error and training loss, and whether the loss diverged."""

    test_error: float
    train_loss: float
    diverged: bool


class _Log:
    """A CSV file of floats, its first column the iteration, and TensorBoard where installed."""

    def __init__(self, path: Path, columns: list[str], iteration: int, board: Any) -> None:
        self.path, self.columns, self.board = path, columns, board
        kept = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [r for r in csv.reader(file) if r[0].isdigit() and int(r[0]) <= iteration]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["iteration", *columns], *kept])
        self.last = [float(value) for value in kept[-1][1:]] if kept else [math.nan] * len(columns)

    def add(self, iteration: int, *values: float) -> None:
        self.last = list(values)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            # repr gives every bit back: two logs are equal where the runs were.
            csv.writer(file, lineterminator="\n").writerow([iteration, *map(repr, values)])
        if self.board is not None:
            for column, value in zip(self.columns, values, strict=True):
                self.board.add_scalar(column, value, iteration)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


class Trainer:
    """One run of ``recipe`` on ``data``, kept in ``folder`` and continued where that has a part.

    Raises ``ValueError`` where the folder holds a run of another recipe, or the batch does not
    divide.
    """

    def __init__(
        self, recipe: Recipe, data: Data, folder: Path, processes: Processes, checkpoint_every: int
    ) -> None:
        parts = processes.count * recipe.accumulate
        if recipe.batch_size % parts or recipe.batch_size > len(data.train):
            raise ValueError(
                f"a batch of {recipe.batch_size} does not divide into {parts} parts, or exceeds the"
                f" {len(data.train)} training images"
            )
        self.recipe, self.data, self.folder, self.processes = recipe, data, folder, processes
        self.checkpoint_every = checkpoint_every
        self.iteration = 0
        self.open_losses: list[Tensor] = []
        torch.manual_seed(mixed(recipe.seed, _WEIGHTS))
        self.mean, self.std = data.moments()
        dtype = torch.float64 if recipe.dtype == "float64" else torch.float32
        model = recipe.build(data.classes)
        model.to(processes.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = model
        self.parallel = self.model
        if processes.count > 1:
            self.model = preact.convert_sync_batchnorm(self.model)
            self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.learning_rate, recipe.momentum,
            weight_decay=recipe.weight_decay,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        if processes.first:
            board = _board(folder)
            self.train_log = _Log(folder / TRAIN_LOG, ["rate", "loss"], self.iteration, board)
            columns = ["test_loss", "test_error"]
            self.test_log = _Log(folder / TEST_LOG, columns, self.iteration, board)

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        stored = torch.load(path, map_location=self.processes.device, weights_only=True)
        different = self.recipe.differences(stored["recipe"])
        if different:
            raise ValueError(f"{self.folder} holds another run: {', '.join(different)} differ")
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.iteration = stored["iteration"]
        self.open_losses = list(stored["open_losses"])

    def save(self) -> None:
        """Write a checkpoint; one that is killed meanwhile leaves the one before."""
        if not self.processes.first:
            return
        path = self.folder / CHECKPOINT
        new = path.with_suffix(".new")
        torch.save(
            {
                "recipe": dataclasses.asdict(self.recipe), "iteration": self.iteration,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "open_losses": self.open_losses,
            },
            new,
        )  # fmt: skip
        new.replace(path)

    def _prepared(self, images: Tensor) -> Tensor:
        dtype = torch.float64 if self.recipe.dtype == "float64" else torch.float32
        values = ((images / 255 - self.mean) / self.std).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed(self.recipe.seed, purpose, number))

    def batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """This process's share of a batch; an epoch's images that fill no batch are left out."""
        size, train = self.recipe.batch_size, self.data.train
        epoch, place = divmod(iteration, len(train) // size)
        order = torch.randperm(len(train), generator=self._generator(_ORDER, epoch))
        chosen = order[place * size : (place + 1) * size]
        images = self._prepared(train.images[chosen])
        if self.recipe.augmented:
            images = augment(images, self.data.flips, self._generator(_CROPS, iteration))
        rank, count = self.processes.rank, self.processes.count
        share = slice(rank * size // count, (rank + 1) * size // count)
        device = self.processes.device
        images = images[share].to(device).contiguous(memory_format=torch.channels_last)
        return images, train.labels[chosen][share].to(device)

    def context(self) -> AbstractContextManager[object]:
        """Within, the network runs as the recipe says: fused, or in eager PyTorch."""
        return preact.use_backend("reference") if self.recipe.eager else nullcontext()

    def step(self) -> Tensor:
        """One update; the mean loss of this process's share, as a tensor."""
        recipe = self.recipe
        # Dropout draws from the global stream, differently in every process.
        torch.manual_seed(mixed(recipe.seed, _DROPOUT, self.iteration, self.processes.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.iteration)
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = self.batch(self.iteration)
        total = torch.zeros((), device=images.device)
        count = recipe.accumulate
        parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
        for index, (part, targets) in enumerate(parts):
            last = index == len(parts) - 1
            unfinished = isinstance(self.parallel, DistributedDataParallel) and not last
            with self.parallel.no_sync() if unfinished else nullcontext():  # type: ignore[operator]
                with autocast(recipe.dtype, images.device.type):
                    loss = F.cross_entropy(self.parallel(part), targets) / len(parts)
                loss.backward()
            total = total + loss.detach()
        self.optimizer.step()
        self.iteration += 1
        return total

    @torch.inference_mode()
    def evaluate(self, part: Part) -> tuple[float, float]:
        """Mean loss and error in percent over a part of the data."""
        self.model.eval()
        loss = wrong = 0.0
        device = self.processes.device
        for images, labels in zip(part.images.split(250), part.labels.split(250), strict=True):
            with autocast(self.recipe.dtype, device.type):
                logits = self.model(self._prepared(images).to(device)).float()
            targets = labels.to(device)
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            wrong += float((logits.argmax(1) != targets).sum())
        return loss / len(part), 100 * wrong / len(part)

    def _log(self) -> bool:
        """Write what is due after an iteration; whether the run is to go on."""
        recipe, first = self.recipe, self.processes.first
        done = self.iteration == recipe.iterations
        finite = True
        if self.iteration % recipe.log_every == 0 or done:
            mean = float(self.processes.mean(torch.stack(self.open_losses).mean()))
            finite = math.isfinite(mean)
            self.open_losses = []
            if first:
                self.train_log.add(self.iteration, recipe.rate(self.iteration - 1), mean)
        if self.iteration % recipe.evaluate_every == 0 or done or not finite:
            if first:
                self.test_log.add(self.iteration, *self.evaluate(self.data.test))
            self.processes.wait()
        return finite and not done

    def run(
        self, notify: Notify | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Result | None:
        """Train to the end, or until ``stop()``, whose answer all processes must share.

        A loss that is not finite ends the run. Returns the result, None where it was stopped.
        """
        path = self.folder / RESULT
        finished = path.exists()
        while not finished:
            with self.context():
                self.open_losses.append(self.step())
                finished = not self._log()
            stopped = stop()
            if finished or stopped or self.iteration % self.checkpoint_every == 0:
                self.save()
            if notify is not None and self.processes.first:
                notify(self.iteration, self.train_log.last[1], self.test_log.last[1])
            if finished and self.processes.first:
                loss = self.train_log.last[1]
                result = Result(self.test_log.last[1], loss, not math.isfinite(loss))
                path.write_text(json.dumps(dataclasses.asdict(result)) + "\n")
            elif stopped:
                return None
        self.processes.wait()
        return Result(**json.loads(path.read_text()))
