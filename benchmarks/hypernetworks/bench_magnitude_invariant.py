"""A hypernetwork that writes 20,000 weights against hyperlight, the official library: forward and backward.

Limit: the last layer, a (values of gamma, 128) x (128, P) product and its two products backwards, 6 x 128 P FLOP for
each gamma. Its weight is read twice and its gradient written once, 12 x 128 P bytes whatever the number of gammas, so
that one gamma is bound by memory and more of them are nearly free.
"""

import pytest
import torch

from nnlib.hypernetworks import magnitude_invariant as mip

PEER = "hyperlight"
WHO = ("nnlib", PEER, "limit")
SHAPES = {"a.weight": (100, 100), "a.bias": (100,), "b.weight": (98, 100), "b.bias": (100,)}


@pytest.mark.parametrize("gammas", [1, 32])
@pytest.mark.parametrize("who", WHO)
def test_forward_and_backward(benchmark, who, gammas):
    benchmark.group = f"hypernetwork 1-16-64-128-20000, forward and backward, {gammas} gamma"
    gamma = torch.rand(gammas, 1, generator=torch.Generator().manual_seed(0))
    if who == "nnlib":
        h = mip.HyperNetwork(1, SHAPES, generator=torch.Generator().manual_seed(0))
        step = lambda: sum(t.sum() for t in h(gamma).values()).backward()  # noqa: E731
    elif who == PEER:
        hyperlight = pytest.importorskip(PEER)
        h = hyperlight.HyperNet({"gamma": (1,)}, SHAPES, [16, 64, 128])
        step = lambda: sum(t.sum() for t in h(gamma=gamma).values()).backward()  # noqa: E731
    else:
        h = torch.nn.Linear(128, 20_000)
        hidden = torch.rand(
            gammas, 128, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        step = lambda: h(hidden).sum().backward()  # noqa: E731

    def call():
        h.zero_grad(set_to_none=True)
        step()

    benchmark.pedantic(call, rounds=200, iterations=1, warmup_rounds=10)
