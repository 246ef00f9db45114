"""Training epochs of a four-layer GCN against PyTorch Geometric.

The work: ten updates of all four layers, width 128, on a random graph with the 2,708 nodes of Cora, for two degrees.
Single-forward learning has no peer of its own, so it is compared with backpropagation. Limit: the matrix products that
backpropagation cannot avoid, forward and for both gradients: 2 N H^2 FLOP each, 8 of them for three layers of full width
(the first needs no gradient by its input), and nothing of the sparse ones.
"""

import warnings
from functools import cache

import pytest
import torch
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from nnlib.efficiency import forward_graph_learning as fgl

PEER = "torch_geometric"
WHO = ("nnlib", "nnlib SF", PEER, "limit")
LAYERS, WIDTH, EPOCHS = 4, 128, 10


@cache
def graph(degree):
    """A random graph with four classes."""
    generator = torch.Generator().manual_seed(0)
    return fgl.csbm(2708, 4, degree=degree, features=WIDTH, generator=generator)


def peer_nn():
    """The peer's layers; its import warns of its optional parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_geometric.nn")


def peer_training(task):
    """A function that trains the peer's network, with its cached normalisation."""
    net = peer_nn().GCN(WIDTH, WIDTH, LAYERS, 4, cached=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=5e-4)

    def train():
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            out = net(task.x, task.edge_index)
            F.cross_entropy(out[task.train], task.y[task.train]).backward()
            optimizer.step()

    return train


def dense_products(n):
    """The products with dense matrices in one epoch, EPOCHS times."""
    h, w = torch.randn(n, WIDTH), torch.randn(WIDTH, WIDTH)

    def multiply():
        for _ in range(EPOCHS):
            for layer in range(LAYERS - 1):
                h @ w
                h.T @ h
                if layer:
                    h @ w.T

    return multiply


@pytest.mark.parametrize("degree", (4.0, 30.0))
@pytest.mark.parametrize("who", WHO)
def test_training(benchmark, who, degree):
    benchmark.group = f"ten epochs of a four-layer GCN, 2708 nodes, mean degree {degree:g}, float32"
    torch.manual_seed(0)
    task = graph(degree)
    recipe = fgl.Recipe(epochs=EPOCHS, val_every=1000)
    call = {
        "nnlib": lambda: fgl.fit_backprop(task, recipe, layers=LAYERS),
        "nnlib SF": lambda: fgl.SingleForwardGNN(task, recipe).fit(LAYERS),
        "limit": dense_products(len(task.x)),
    }.get(who)
    if who == PEER:
        call = peer_training(task)
    with threadpool_limits(1):
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def test_layers_agree():
    """Both compute the same convolution from the same weights."""
    task, conv = graph(4.0), fgl.GCNConv(WIDTH, WIDTH)
    other = peer_nn().GCNConv(WIDTH, WIDTH)
    state = conv.state_dict()
    other.load_state_dict({"bias": state["bias"], "lin.weight": state["weight"].T})
    ours = conv(task.x, fgl.Graph(task.edge_index, task.x))
    torch.testing.assert_close(ours, other(task.x, task.edge_index), atol=1e-5, rtol=1e-4)
