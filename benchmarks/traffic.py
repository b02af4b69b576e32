"""Passes, bytes, operations and predicted time of a unit under each plan: a model's table."""

from __future__ import annotations

import click

from preact import costs

__all__ = ["table", "traffic"]

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
PLANS = ("eager", *costs.PLANS)


def units(batch: int, channels: int, size: int) -> dict[str, list[costs.Layer]]:
    """The two units of the paper at one width: two 3x3 layers; 1x1, 3x3, 1x1 at a quarter of it."""

    def layer(inputs: int, outputs: int, kernel: int) -> costs.Layer:
        padding = (kernel // 2,) * 2
        shape = (batch, inputs, size, size)
        return costs.layer(shape, (outputs, inputs, kernel, kernel), padding=padding)

    narrow = max(channels // 4, 1)
    return {
        "two-conv unit": [layer(channels, channels, 3)] * 2,
        "bottleneck unit": [
            layer(channels, narrow, 1), layer(narrow, narrow, 3), layer(narrow, channels, 1),
        ],
    }  # fmt: skip


def table(
    layers: list[costs.Layer], gpu: costs.Gpu, itemsize: int, tf32: bool = True
) -> list[dict[str, float | str]]:
    """A row for each plan; passes in maps of the unit's input, saved maps likewise.

    ``passes`` are by the letter, all that is loaded and all that is stored; ``memory`` leaves out
    what a program loads that it has itself just stored, as do the bytes and the time.
    """
    rows: list[dict[str, float | str]] = []
    whole = layers[0].input
    for plan in PLANS:
        forward, backward = costs.unit_forward(plan, layers), costs.unit_backward(plan, layers)
        every = forward + backward
        rows.append(
            {
                "plan": plan,
                "forward": sum(k.elements + k.returned for k in forward) / whole,
                "backward": sum(k.elements + k.returned for k in backward) / whole,
                "passes": sum(k.elements + k.returned for k in every) / whole,
                "memory": sum(k.elements for k in every) / whole,
                "saved": costs.saved_maps(plan, layers) / whole,
                "megabytes": sum(k.bytes(itemsize) for k in every) / 1e6,
                "gigaoperations": sum(k.operations for k in every) / 1e9,
                "kernels": len(every),
                "microseconds": 1e6 * costs.predicted(every, gpu, itemsize, tf32),
            }
        )
    return rows


@click.command()
@click.option("--gpu", type=click.Choice(list(costs.GPUS)), default="h100", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--channels", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--size", type=click.IntRange(min=1), default=56, show_default=True, help="Pixels.")
@click.option("--dtype", type=click.Choice(list(ITEMSIZES)), default="bfloat16", show_default=True)
def traffic(gpu: str, batch_size: int, channels: int, size: int, dtype: str) -> None:
    """What each plan moves and multiplies, and the time that predicts: a model, nothing is run."""
    device = costs.GPUS[gpu]
    click.echo(
        f"MODEL, not a measurement: {device.name}, batch {batch_size}, {channels} channels,"
        f" {size} x {size}, {dtype}, training.\n"
        f"A kernel takes the longer of its bytes at {costs.MEMORY_SHARE:.0%} of"
        f" {device.bandwidth / 1e9:.0f} GB/s and its products at {costs.PRODUCT_SHARE:.0%} of the"
        f" peak (ours: less, by issued instructions), and {costs.LAUNCH * 1e6:.0f} us to launch.\n"
        "passes: all that is loaded and all that is stored, by the letter. memory: without what a"
        " program\nloads again that it has itself just stored, which a cache still has; MB and"
        " time are of these."
    )
    for name, layers in units(batch_size, channels, size).items():
        click.echo(f"\n{name}, identity shortcut; passes and saved in maps of the unit's input")
        click.echo(
            f"{'plan':6}{'forward':>9}{'backward':>10}{'passes':>8}{'memory':>8}{'saved':>7}{'MB':>9}"
            f"{'GFLOP':>9}{'kernels':>9}{'predicted us':>14}{'of eager':>10}"
        )
        rows = table(layers, device, ITEMSIZES[dtype])
        eager = float(rows[0]["microseconds"])
        for row in rows:
            microseconds = float(row["microseconds"])
            click.echo(
                f"{row['plan']:6}{row['forward']:9.4g}{row['backward']:10.4g}{row['passes']:8.4g}"
                f"{row['memory']:8.4g}{row['saved']:7.4g}{row['megabytes']:9.0f}"
                f"{row['gigaoperations']:9.0f}"
                f"{row['kernels']:9}{microseconds:14.0f}{microseconds / eager:10.2f}"
            )
