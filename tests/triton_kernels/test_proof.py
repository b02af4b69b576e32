"""The proof before ``auto`` takes Triton accepts its kernels, and sees what is wrong with them."""

from __future__ import annotations

import pytest
import torch

from preact import proof, reference
from preact.backends import triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right(dtype, device):
    assert proof._prove("triton", device, dtype) == ""


def test_a_kernel_with_a_mistake(device, monkeypatch):
    """ReLU(bias) in the padding: right wherever there is none."""

    def leaks(name):
        launcher = triton._launcher(name)

        def run(x, mean, var, weight, bias, eps, conv_weight, *rest):
            if name != "batch_norm_relu_conv2d" or bias is None:
                return launcher(x, mean, var, weight, bias, eps, conv_weight, *rest)
            conv_bias, residual, stride, padding, dilation, groups = rest
            activation = reference.batch_norm_relu(x, mean, var, weight, bias, eps)
            top, left = padding
            padded = x.new_zeros(*x.shape[:2], x.size(2) + 2 * top, x.size(3) + 2 * left)
            padded += bias.relu().to(x.dtype).view(1, -1, 1, 1)
            padded[:, :, top : top + x.size(2), left : left + x.size(3)] = activation
            output = reference.convolve(
                padded, conv_weight, conv_bias, stride, (0, 0), dilation, groups
            )
            output = reference.preserve_layout(output + residual, x)
            return (output, *reference.batch_norm_stats(output))

        return run

    class Table:
        def __getattr__(self, name):
            op = getattr(torch.ops.preact_triton, name)
            return leaks(name) if name == "batch_norm_relu_conv2d" else op

    monkeypatch.setattr(proof.backends, "table", lambda name: Table())
    monkeypatch.setattr(proof, "STREAMED", ())
    monkeypatch.setattr(proof, "CONVOLUTIONS", proof.CONVOLUTIONS[1::-1])
    found = proof._prove("triton", device, torch.float32)
    assert found.startswith("wrong in float32: batch_norm_relu_conv2d, result 0")
