"""Training iterations of spiking networks against snnTorch.

Limit: the matrix products and convolutions alone, forward and backward, 6 B T sum(n_(l-1) n_l) FLOP for a fully
connected network: the same layers without normalisation, neurons and time dependence. The neurons themselves are bound
by memory, about five reads and writes of B n_l numbers per step.
"""

import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import nn

from nnlib.efficiency import spiking_through_time as stt

PEER = "snntorch"
WHO = ("nnlib", PEER, "limit")
T = 6


def network(kind, neuron):
    torch.manual_seed(0)
    if kind == "mlp":
        body = [
            (nn.Linear(64, 128), nn.BatchNorm1d(128)),
            (nn.Linear(128, 128), nn.BatchNorm1d(128)),
        ]
        readout = [nn.Linear(128, 10)]
    else:
        body = [
            (nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32)),
            (nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64)),
        ]
        readout = [nn.Flatten(), nn.Linear(64 * 16 * 16, 10)]
    if neuron is None:
        return nn.Sequential(*(linear for linear, _ in body), *readout)
    return nn.Sequential(*(m for pair in body for m in (*pair, neuron())), *readout)


def snntorch_iteration(net, frames, y):
    net.zero_grad()
    for module in net:
        if hasattr(module, "reset_mem"):
            module.reset_mem()
            module.mem = module.mem.detach()
    total = sum(F.cross_entropy(net(frame), y) / len(frames) for frame in frames)
    total.backward()
    return total.item()


def our_iteration(net, frames, y):
    net.zero_grad()
    outputs = stt.bptt_backward(net, frames, y, F.cross_entropy)
    return F.cross_entropy(outputs, y).item()


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_bptt_iteration(benchmark, who, kind):
    """One iteration of BPTT, state reset included; at one step both libraries have the same loss."""
    shape = (128, 64) if kind == "mlp" else (64, 3, 32, 32)
    benchmark.group = {
        "mlp": "BPTT iteration, 64-128-128-10, batch 128, 6 steps",
        "conv": "BPTT iteration, two convolutions on 32 x 32 x 3, batch 64, 6 steps",
    }[kind]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator)
    y, frames = torch.randint(0, 10, shape[:1], generator=generator), x.expand(T, *shape)
    if who == "nnlib":
        net, iteration = network(kind, stt.LIF), our_iteration
    elif who == PEER:
        snn = pytest.importorskip("snntorch")
        net = network(kind, lambda: snn.Leaky(beta=1 / 11, init_hidden=True, reset_delay=False))
        iteration = snntorch_iteration
        ours = our_iteration(network(kind, stt.LIF), frames[:1], y)
        assert iteration(net, frames[:1], y) == pytest.approx(ours, rel=1e-5)
    else:
        net, iteration = network(kind, None), snntorch_iteration
    with threadpool_limits(1):
        benchmark.pedantic(lambda: iteration(net, frames, y), rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("who", ("nnlib", "limit"))
def test_sltt_1_iteration(benchmark, who):
    """SLTT with one differentiated step of six; the limit is the six forward passes and one backward pass."""
    benchmark.group = "SLTT-1 iteration, 64-128-128-10, batch 128, 6 steps"
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(128, 64, generator=generator).expand(T, 128, 64)
    y = torch.randint(0, 10, (128,), generator=generator)
    net = network("mlp", stt.LIF if who == "nnlib" else None)

    def limit():
        net.zero_grad()
        with torch.no_grad():
            for frame in frames[1:]:
                net(frame)
        F.cross_entropy(net(frames[0]), y).backward()

    def ours():
        net.zero_grad()
        stt.sltt_backward(net, frames, y, F.cross_entropy, k=1)

    with threadpool_limits(1):
        benchmark.pedantic(ours if who == "nnlib" else limit, rounds=30, warmup_rounds=3)
