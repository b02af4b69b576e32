"""What one step is: the model's starting state, its inputs, the training step and inference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import Network
from .providers import Prepared

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MODES",
    "Batch",
    "forward_backward",
    "make_batch",
    "make_step",
    "settled_model",
    "to_layout",
]

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("training", "inference")
# The bfloat16 case is autocast over float32 parameters, as mixed-precision training runs.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Batch:
    """Images [N, 3, H, W] and class indices [N]."""

    images: Tensor
    targets: Tensor

    def to(
        self,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        return Batch(self.images.to(dtype=dtype, memory_format=memory_format), self.targets)


def make_batch(network: Network, batch_size: int, device: torch.device, seed: int) -> Batch:
    """Random images and targets, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    size = network.image_size
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    targets = torch.randint(network.classes, (batch_size,), generator=generator)
    return Batch(images.to(device), targets.to(device))


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """Put the four-dimensional parameters of ``model`` into a memory format, in place."""
    return model.to(memory_format=LAYOUTS[layout])


def settled_model(
    network: Network,
    batch: Batch,
    seed: int,
    context: Callable[[], AbstractContextManager[object]],
) -> nn.Module:
    """Build the network in a state that a trained one could be in.

    Fresh batch norms have weight 1, bias 0, mean 0 and variance 1, values that hide mistakes. Here
    weight and bias are random and the running statistics are those of ``batch``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.build()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.75, 1.25)
                nn.init.normal_(norm.bias, 0.0, 0.1)
    model.to(batch.images.device)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), context():
        model.train()(batch.images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def autocast(dtype: str, device_type: str) -> torch.autocast:
    """Autocast to bfloat16, or a disabled one for every other type."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def forward_backward(
    prepared: Prepared, batch: Batch, dtype: str, mode: str
) -> tuple[Tensor, Tensor | None]:
    """One step without the optimizer: logits [N, classes], and the loss when training.

    Training clears the gradients first and leaves the new ones on the parameters.
    """
    device_type = batch.images.device.type
    if mode == "inference":
        with torch.inference_mode(), autocast(dtype, device_type), prepared.context():
            return prepared.call(batch.images), None
    prepared.module.zero_grad(set_to_none=True)
    with prepared.context():
        with autocast(dtype, device_type):
            logits = prepared.call(batch.images)
            loss = F.cross_entropy(logits, batch.targets)
        loss.backward()
    return logits, loss


def make_step(prepared: Prepared, batch: Batch, dtype: str, mode: str) -> Callable[[], None]:
    """The step that is timed.

    Training is zero_grad, forward, cross-entropy, backward and one update of SGD with momentum and
    weight decay; the learning rate is small, so that random targets cannot make the weights
    diverge. Inference is the forward pass alone.
    """
    if mode == "inference":

        def infer() -> None:
            forward_backward(prepared, batch, dtype, mode)

        return infer

    optimizer = torch.optim.SGD(
        prepared.module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=True
    )

    def train() -> None:
        forward_backward(prepared, batch, dtype, mode)
        optimizer.step()

    return train
