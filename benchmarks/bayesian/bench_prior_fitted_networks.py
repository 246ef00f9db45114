"""Predictions for data sets of a Gaussian process with unknown hyper-parameters: a fitted network against MLE-II.

The work is the same for all: the log densities of six hidden labels after ten shown ones, for one data set and for a
hundred. scikit-learn fits a kernel to each data set, one at a time; "nnlib exact" averages over the 168 combinations of
the chapter's grid. Training (the time of some hundred fits) is done before the clock starts; the mean losses are in
the report's `extra_info`. Limit: the network's matrix products alone, about 2 N (10 L E^2) FLOP for a set of N points.
"""

import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from nnlib.bayesian import prior_fitted_networks as pfn

PEER = "sklearn"
WHO = ("nnlib", PEER, "nnlib exact", "limit")
WIDTH, LAYERS, SET, SHOWN = 32, 2, 16, 10
AXES = [np.geomspace(0.1, 1, 8), np.geomspace(0.2, 5, 7), (0.03, 0.1, 0.3)]
GRID = torch.tensor([(a, v, v * r) for a in AXES[0] for v in AXES[1] for r in AXES[2]]).float()


@cache
def trained():
    """The chapter's network, and a hundred data sets."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    prior = pfn.gp_sampler(GRID, 1, rng)
    head = pfn.RiemannHead.from_samples(prior(5000, 20)[1].flatten(), 50)
    net = pfn.PriorFittedNetwork(1, head, width=WIDTH, n_layers=LAYERS, n_heads=2)
    sizes = dict(steps=800, batch_size=32, set_size=SET, lr=4e-3)
    pfn.fit_prior(net, prior, generator=rng, **sizes)
    return net, *prior(100, SET)


def network(net, x, y):
    """Log densities of the hidden labels, all data sets in one batch."""
    logits = net.predict(x[:, :SHOWN], y[:, :SHOWN], x[:, SHOWN:])
    return net.head.log_prob(logits, y[:, SHOWN:])


def exact(x, y):
    """Log densities of the hidden labels under the mixture over the grid."""
    parts = pfn.gp_posterior(x[:, :SHOWN], y[:, :SHOWN], x[:, SHOWN:], GRID)
    return pfn.mixture_log_prob(*parts, y[:, SHOWN:])


def fitted(x, y):
    """MLE-II of scikit-learn, one data set after the other."""
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    kernels, densities = gaussian_process.kernels, []
    for inputs, labels in zip(x.double().numpy(), y.double().numpy(), strict=True):
        kernel = kernels.ConstantKernel(1.0) * kernels.RBF(0.3) + kernels.WhiteKernel(0.1)
        gp = gaussian_process.GaussianProcessRegressor(kernel).fit(inputs[:SHOWN], labels[:SHOWN])
        mean, sd = gp.predict(inputs[SHOWN:], return_std=True)
        z = (labels[SHOWN:] - mean) / sd
        densities.append(-0.5 * z**2 - np.log(sd * math.sqrt(2 * math.pi)))
    return torch.from_numpy(np.stack(densities))


def products(sets):
    """The matrix products of the layers, and nothing else."""
    h = torch.randn(sets * SET, WIDTH, generator=torch.Generator().manual_seed(0))
    qkv, out, up, down = (
        torch.zeros(WIDTH, WIDTH * k) if k > 0 else torch.zeros(-WIDTH * k, WIDTH)
        for k in (3, 1, 2, -2)
    )
    for _ in range(LAYERS):
        (h @ qkv)[:, :WIDTH] @ out
        (h @ up) @ down


@pytest.mark.parametrize("sets", (1, 100))
@pytest.mark.parametrize("who", WHO)
def test_predict(benchmark, who, sets):
    benchmark.group = f"{SET - SHOWN} predictions from {SHOWN} points, data sets: {sets}"
    net, x, y = trained()
    x, y = x[:sets], y[:sets]
    with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
        if who == "limit":
            benchmark.pedantic(products, (sets,), rounds=20, warmup_rounds=2)
            return
        call, args = {"nnlib": (network, (net, x, y)), PEER: (fitted, (x, y))}.get(
            who, (exact, (x, y))
        )
        rounds = 3 if who == PEER else 20
        density = benchmark.pedantic(call, args, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["loss"] = -density.mean().item()
    if (
        sets > 1
    ):  # a typical prediction of each is near the exact one; MLE-II is far off now and then
        assert (exact(x, y) - density).abs().median() < 0.5
