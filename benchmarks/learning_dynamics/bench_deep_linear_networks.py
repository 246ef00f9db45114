"""Deep linear networks against SciPy and PyTorch.

Limits. Orthogonal matrix: one QR decomposition with Q formed, 8/3 n^3 FLOP. Mode curves: one exponential for each time
and mode. Descent from correlations: 6 `out` n^2 FLOP for each n x n matrix and step (two products and an outer one).
"""

import numpy as np
import pytest
import torch

from nnlib.data import load_digits
from nnlib.learning_dynamics import deep_linear_networks as dln

PEER = "scipy"


@pytest.mark.parametrize("who", ["nnlib", PEER, "torch.nn.init", "limit"])
def test_orthogonal_matrix(benchmark, who):
    benchmark.group = "random orthogonal matrix, 1000 x 1000, float64"
    gaussian = torch.randn(1000, 1000, dtype=torch.float64)
    if who == "nnlib":
        call = lambda: dln.haar_orthogonal(1000)  # noqa: E731
    elif who == PEER:
        group = pytest.importorskip("scipy.stats").ortho_group
        call = lambda: group.rvs(1000)  # noqa: E731
    elif who == "torch.nn.init":
        call = lambda: torch.nn.init.orthogonal_(torch.empty_like(gaussian))  # noqa: E731
    else:
        call = lambda: torch.linalg.qr(gaussian)  # noqa: E731
    benchmark.pedantic(call, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("who", ["nnlib", PEER, "limit"])
def test_learning_curves(benchmark, who):
    benchmark.group = "curves of 16 modes at 1000 times, 16 items, 200 features"
    tree = dln.hierarchical_tree_data(4, 200, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(tree, full_matrices=False)
    t = torch.linspace(0, 1000, 1000, dtype=torch.float64)[:, None]
    tau, u0 = 1e3, 1e-4
    closed = lambda: dln.sigmoid_mode(t, s, u0, tau)  # noqa: E731
    start = [w.numpy() for w in dln.decoupled_init(tree, [16], u0)]

    def flow():
        def rate(_, flat):
            w21, w32 = flat[:256].reshape(16, 16), flat[256:].reshape(200, 16)
            error = tree.numpy() - w32 @ w21
            return np.concatenate([(w32.T @ error).ravel(), (error @ w21.T).ravel()]) / tau

        first = np.concatenate([w.ravel() for w in start])
        solve = pytest.importorskip("scipy.integrate").solve_ivp
        return solve(rate, (0, 1000), first, t_eval=t[:, 0].numpy(), rtol=1e-6, atol=1e-9).y

    if who == PEER:
        w21, w32 = (part.reshape(-1, 16) for part in np.split(flow()[:, -1], [256]))
        reached = np.diag(u.numpy().T @ w32 @ w21 @ vt.numpy().T)
        assert reached == pytest.approx(closed()[-1].numpy(), rel=1e-3)
    call = {"nnlib": closed, PEER: flow, "limit": lambda: torch.exp(-2 * s * t / tau)}[who]
    benchmark.pedantic(call, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("who", ["nnlib", "torch autograd", "limit"])
def test_descent(benchmark, who):
    benchmark.group = "100 steps of full-batch descent, 1797 digits, widths 64, 4 matrices"
    digits = load_digits()
    x = digits.x.flatten(1).double()
    y = torch.nn.functional.one_hot(digits.y, 10).double()
    sigma31, sigma11 = y.T @ x / len(x), x.T @ x / len(x)
    units = [64, 64, 64, 64, 10]
    pairs = list(zip(units[1:], units[:-1], strict=True))
    weights = [dln.haar_orthogonal(n, m) for n, m in pairs]

    def correlations():
        return dln.gd_correlations(weights, sigma31, sigma11, 0.01, 100)[0]

    def autograd():
        net = dln.DeepLinear(weights)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            (0.5 * (net(x) - y).square().sum() / len(x)).backward()
            optimizer.step()
        return list(net.parameters())

    def products():  # the matrix products of one step, nothing else
        error = sigma31
        for _ in range(100):
            for w in weights[:-1]:
                _ = error @ w, error @ w.mT, error.mT @ error

    if who == "torch autograd":
        for ours, theirs in zip(correlations(), autograd(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-9)
    call = {"nnlib": correlations, "torch autograd": autograd, "limit": products}[who]
    benchmark.pedantic(call, rounds=15, warmup_rounds=2)
