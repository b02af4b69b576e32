"""torch.compile(fullgraph=True): the same values and gradients as uncompiled."""

from __future__ import annotations

import copy

import pytest
import torch

import preact
from preact.backends import available

pytestmark = pytest.mark.skipif(
    available()["cpp"] != "", reason=f"no native kernels: {available()['cpp']}"
)

MODULES = {
    "norm": lambda: preact.BatchNormReLU2d(8),
    "prefix": lambda: preact.BatchNormReLUConv2d(8, 6, 3, padding=1, bias=True),
    "basic": lambda: preact.PreActBasicBlock(8, 8),
    "bottleneck": lambda: preact.PreActBottleneck(8, 4, 2),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# Inductor compiles slowly and gets the graph that aot_eager traced: two modules are enough there.
@pytest.mark.parametrize(
    ("name", "compiler"),
    [*((name, "aot_eager") for name in MODULES), ("prefix", "inductor"), ("basic", "inductor")],
)
def test_compiled_equals_uncompiled(name, compiler, training):
    torch._dynamo.reset()
    module = MODULES[name]().train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 8, 6, 6).contiguous(memory_format=layout)
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [module(leaves[0]), compiled(leaves[1])]
        assert outputs[0].stride() == outputs[1].stride()
        grad = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(grad)
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
        for (key, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, msg=key)
        for (key, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(b, a, msg=key)


def test_export_keeps_the_ops():
    module = preact.PreActBasicBlock(8, 8).eval()
    x = torch.randn(2, 8, 6, 6)
    exported = torch.export.export(module, (x,))
    assert any("preact" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), module(x))
