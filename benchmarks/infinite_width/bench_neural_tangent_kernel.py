"""The neural tangent kernel against neural_tangents.

Limits. Analytic kernel: one arccos and one square root for each pair and hidden layer. Empirical kernel: the
matrix products of one forward and one backward pass, 4 N n^2 (L - 2) FLOP, and of the Gram matrices, 4 N^2 n (L - 1).
"""

import numpy as np
import pytest
import torch

from nnlib.infinite_width import neural_tangent_kernel as ntk

PEER = "neural_tangents"
WHO = ("nnlib", PEER, "limit")


@pytest.fixture
def inputs(tmp_path):
    def make(n, d):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        np.save(tmp_path / "x.npy", x.numpy())
        return x, str(tmp_path / "x.npy")

    return make


@pytest.mark.parametrize("who", WHO)
def test_analytic_kernel(benchmark, inputs, peer_process, who):
    benchmark.group = "analytic kernels, 2000 x 2000, L = 4, float64"
    x, path = inputs(2000, 64)
    if who == "nnlib":
        call = lambda: ntk.ntk_nngp(x)  # noqa: E731
    elif who == PEER:
        call = peer_process(PEER, "analytic", path)
        assert call.checksum == pytest.approx(ntk.ntk_nngp(x)[1].sum().item(), rel=1e-9)
    else:
        cosines = torch.rand(2000, 2000, dtype=torch.float64)

        def call():
            for _ in range(3):
                torch.acos(cosines)
                torch.sqrt(cosines)

    benchmark.pedantic(call, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("who", WHO)
def test_empirical_kernel(benchmark, inputs, peer_process, who):
    benchmark.group = "empirical kernel, 512 inputs, width 1024, L = 4, float32"
    x, path = inputs(512, 64)
    x32 = x.float()
    if who == "nnlib":
        net = ntk.NTKMLP([64, 1024, 1024, 1024, 1])
        call = lambda: ntk.empirical_ntk(net, x32)  # noqa: E731
    elif who == PEER:
        call = peer_process(PEER, "empirical", path)
    else:
        alpha, weight = torch.rand(512, 1024), torch.rand(1024, 1024)

        def call():
            for _ in range(4):
                alpha @ weight
            for _ in range(6):
                alpha @ alpha.T

    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
