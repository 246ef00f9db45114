"""The field of a dense network by Newton sums against a contraction with its synaptic tensor.

The tensor of P = 4 has N^4 entries (104 MB at N = 60 in float64). Building it, 2 K N^4 FLOP or 170 GFLOP here, is not
timed; a practitioner pays it once. Limit: the 2P - 1 matrix products of the Newton form, 2 B K N FLOP each.
"""

import pytest
import torch
from threadpoolctl import threadpool_limits

from nnlib.associative_memory import dense_hebbian as dh

PEER = "tensor"
WHO = ("nnlib", PEER, "limit")
N, P, BATCH = 60, 4, 20


def synaptic_tensor(net):
    """All couplings as a symmetric tensor (N, N^3), zero where indices coincide."""
    pairs = (net.class_means[:, :, None] * net.class_means[:, None, :]).flatten(1)
    tensor = (pairs.T @ pairs).view(N, N, N, N)
    index = torch.arange(N)
    for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        where = [slice(None)] * 4
        where[a] = where[b] = index
        tensor[tuple(where)] = 0
    return net.scale / 6 * tensor.view(N, N**3)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("K", [100, 2000])
def test_field(benchmark, who, K):
    benchmark.group = f"field on {N} spins, {K} patterns, couplings of 4, 20 states, float64"
    generator = torch.Generator().manual_seed(0)
    patterns = dh.archetypes(K, N, generator)
    net = dh.DenseHebbian(dh.class_means(patterns, 10, 0.5, generator), P)
    sigma = dh.archetypes(BATCH, N, generator)

    def contract():
        triples = torch.einsum("bi,bj,bk->bijk", sigma, sigma, sigma).flatten(1)
        return triples @ tensor.T

    def products():
        e = sigma @ net.class_means.T
        for _ in range(P - 2):
            sigma @ net.class_means.T
        for _ in range(P):
            e @ net.class_means

    if who == PEER:
        tensor = synaptic_tensor(net)
        torch.testing.assert_close(contract(), net.field(sigma))
    call = {"nnlib": lambda: net.field(sigma), PEER: contract, "limit": products}[who]
    with threadpool_limits(1):
        benchmark.pedantic(call, rounds=20, warmup_rounds=2)
