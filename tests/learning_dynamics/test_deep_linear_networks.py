"""Deep linear networks: solutions against their equations, descent against autograd, spectra against theory."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, solve_ivp

from nnlib.learning_dynamics import deep_linear_networks as dln

TIGHT = dict(rtol=0, atol=1e-10)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(rng, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


@pytest.fixture
def task(rng):
    """20 examples with 6 inputs and 4 outputs: (x, y, sigma31, sigma11)."""
    x, y = randn(rng, 20, 6), randn(rng, 20, 4)
    return x, y, y.T @ x, x.T @ x


# The scalar solutions


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_the_sigmoid_solves_its_equation(s):
    t = torch.linspace(0, 30, 50, dtype=torch.float64, requires_grad=True)
    u = dln.sigmoid_mode(t, s, u0=0.01, tau=3.0)
    (du,) = torch.autograd.grad(u.sum(), t)
    torch.testing.assert_close(du, 2 * u * (s - u) / 3.0, **TIGHT)
    assert u[0].item() == pytest.approx(0.01)


def test_the_sigmoid_broadcasts_over_modes():
    s = torch.tensor([1.0, 2.0], dtype=torch.float64)
    curves = dln.sigmoid_mode(
        torch.linspace(0, 5, 7, dtype=torch.float64)[:, None], s, u0=0.1, tau=1.0
    )
    assert curves.shape == (7, 2)
    torch.testing.assert_close(
        curves[:, 1], dln.sigmoid_mode(torch.linspace(0, 5, 7).double(), 2.0, 0.1, 1.0)
    )


def test_times_invert_the_sigmoid():
    for uf in (0.02, 0.75, 1.4):
        t = dln.learning_time(0.01, uf, s=1.5, tau=7.0)
        assert dln.sigmoid_mode(
            torch.tensor(t, dtype=torch.float64), 1.5, 0.01, 7.0
        ).item() == pytest.approx(uf, abs=1e-12)
    assert dln.half_time(1.5, 0.01, 7.0) == pytest.approx(dln.learning_time(0.01, 0.75, 1.5, 7.0))


def test_the_integral_of_15_with_three_layers_is_11():
    closed = dln.learning_time(0.01, 0.9, s=1.0, tau=2.0, n_layers=3)
    assert dln.learning_time(0.01, 0.9, s=1.0, tau=2.0, n_layers=3 + 1e-12) == pytest.approx(
        closed, rel=1e-8
    )


def test_one_matrix_learns_exponentially():
    time = dln.learning_time(0.1, 0.9, s=1.0, tau=2.0, n_layers=2)
    assert time == pytest.approx(2.0 * math.log(0.9 / 0.1))


def test_17_is_the_quadrature_of_16():
    expected = quad(lambda u: 5.0 / (u * u * (1 - u)), 0.02, 0.9)[0]
    assert dln.learning_time(0.02, 0.9, s=1.0, tau=5.0, n_layers=math.inf) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize(
    ("matrices", "share"), [(10, 0.316), (30, 0.677), (100, 0.889), (300, 0.962), (1000, 0.988)]
)
def test_time_times_depth_nears_its_limit(matrices, share):
    limit = dln.learning_time(1e-3, 0.95, 1.0, 1.0, n_layers=math.inf)
    assert limit == pytest.approx(1008.8, abs=0.1)
    assert matrices * dln.learning_time(
        1e-3, 0.95, 1.0, 1.0, matrices + 1
    ) / limit == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize("n_layers", [2, 3, 6])
def test_the_deep_mode_agrees_with_scipy_and_with_its_time(n_layers):
    t = torch.linspace(0, 20, 2001, dtype=torch.float64)
    u = dln.deep_mode_ode(t, s=1.3, u0=0.05, tau=2.0, n_layers=n_layers)
    power = 2 - 2 / (n_layers - 1)
    scipy = solve_ivp(
        lambda _, v: (n_layers - 1) / 2.0 * v**power * (1.3 - v),
        (0, 20),
        [0.05],
        rtol=1e-10,
        atol=1e-12,
    )
    assert u[-1].item() == pytest.approx(scipy.y[0, -1], rel=1e-7)
    reached = int((u < 0.9).sum())
    assert dln.learning_time(0.05, u[reached].item(), 1.3, 2.0, n_layers) == pytest.approx(
        t[reached].item(), rel=1e-6
    )


@pytest.mark.parametrize("matrices", [2, 3, 7])
def test_hessian_eigenvalues_on_the_balanced_line(matrices):
    # Item behind the optimal learning rate: one eigenvalue along the line, L - 1 across.
    s, a, L = 1.7, 0.8, matrices
    loss = lambda w: (s - w.prod()).square() / 2  # noqa: E731
    hessian = torch.autograd.functional.hessian(loss, torch.full((L,), a, dtype=torch.float64))
    along = (2 * L - 1) * a ** (2 * L - 2) - (L - 1) * s * a ** (L - 2)
    across = s * a ** (L - 2) - a ** (2 * L - 2)
    expected = torch.tensor(sorted([along] + [across] * (L - 1)), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected, **TIGHT)


# Gradient descent on the weights


@pytest.mark.parametrize("hidden", [[], [5], [5, 3, 7]])
def test_a_step_is_a_step_of_autograd(task, rng, hidden):
    x, y, sigma31, sigma11 = task
    sizes = [6, *hidden, 4]
    weights = [dln.scaled_gaussian(n, m, rng) for m, n in pairwise(sizes)]
    net = dln.DeepLinear(weights)
    torch.testing.assert_close(net(x), x @ net.product().T, **TIGHT)
    (0.5 * (net(x) - y).square().sum()).backward()
    after, products = dln.gd_correlations(
        weights, sigma31, sigma11, 1e-3, steps=1, record=lambda p: p
    )
    torch.testing.assert_close(products[0], net.product().detach(), **TIGHT)
    for w, p in zip(after, net.weights, strict=True):
        torch.testing.assert_close(w, (p - 1e-3 * p.grad).detach(), **TIGHT)


def test_descent_conserves_the_imbalance_up_to_the_learning_rate(task, rng):
    _, _, sigma31, sigma11 = task
    weights = [0.5 * dln.scaled_gaussian(n, m, rng) for n, m in ((5, 6), (5, 5), (4, 5))]
    invariant = lambda w: w[1].T @ w[1] - w[0] @ w[0].T  # noqa: E731
    drift = []
    for lr in (1e-3, 2e-3):
        after, _ = dln.gd_correlations(
            weights, sigma31 / 20, sigma11 / 20, lr, steps=round(0.4 / lr)
        )
        drift.append((invariant(after) - invariant(weights)).norm().item())
    assert 1.9 < drift[1] / drift[0] < 2.1
    assert drift[0] > 0


def test_a_narrow_layer_learns_the_truncated_svd(rng):
    sigma31 = randn(rng, 6, 5)
    weights = [0.1 * randn(rng, 2, 5), 0.1 * randn(rng, 6, 2)]
    after, _ = dln.gd_correlations(weights, sigma31, torch.eye(5, dtype=torch.float64), 0.05, 4000)
    u, s, vt = torch.linalg.svd(sigma31)
    torch.testing.assert_close(dln.product(after), u[:, :2] * s[:2] @ vt[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [[8], [8, 5, 9]])
def test_decoupled_weights_stay_decoupled_and_follow_the_deep_mode(rng, hidden):
    sigma31, identity = randn(rng, 7, 5), torch.eye(5, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(sigma31, full_matrices=False)
    weights = dln.decoupled_init(sigma31, hidden, u0=0.1, generator=rng)
    torch.testing.assert_close(dln.product(weights), 0.1 * u @ vt, **TIGHT)
    _, courses = dln.gd_correlations(
        weights, sigma31, identity, 1e-3, 400, lambda p: u.T @ p @ vt.T
    )
    cross_talk = courses[-1] - torch.diag(courses[-1].diagonal())
    assert cross_talk.abs().max() < 1e-10
    t = torch.arange(401, dtype=torch.float64)
    predicted = dln.deep_mode_ode(t, s[0].item(), 0.1, tau=1e3, n_layers=len(hidden) + 2)
    torch.testing.assert_close(torch.stack(courses)[:, 0, 0], predicted, rtol=0.02, atol=0)


def test_descent_on_the_tree_is_late_by_half_a_step(rng):
    tree = dln.hierarchical_tree_data(levels=3, features=200, generator=rng)
    u, s, vt = torch.linalg.svd(tree, full_matrices=False)
    weights = dln.decoupled_init(tree, [8], 1e-6, rng)
    strengths = lambda p: ((u.T @ p) * vt).sum(1)  # noqa: E731
    curves = torch.stack(
        dln.gd_correlations(weights, tree, torch.eye(8).double(), 1e-3, 2000, strengths)[1]
    )
    late = dln.crossing_time(curves, s / 2) / dln.half_time(s, 1e-6, 1e3) - 1
    torch.testing.assert_close(late, 1e-3 * s / 2, rtol=0.25, atol=0)


def test_leading_dimensions_are_independent_networks(task, rng):
    _, _, sigma31, sigma11 = task
    batch = [randn(rng, 3, 5, 6), randn(rng, 3, 4, 5)]
    together, _ = dln.gd_correlations(batch, sigma31, sigma11, 1e-3, 5)
    alone, _ = dln.gd_correlations([w[1] for w in batch], sigma31, sigma11, 1e-3, 5)
    torch.testing.assert_close(together[0][1], alone[0], **TIGHT)


# The search for a learning rate


def test_crossings_are_interpolated():
    curves = torch.tensor([[0.0, 2.0, 0.0], [1.0, 3.0, 0.1], [3.0, 4.0, 0.2]], dtype=torch.float64)
    times = dln.crossing_time(curves, 2.0)
    assert times[:2].tolist() == [1.5, 0.0]
    assert math.isnan(times[2])


def test_a_jump_across_the_target_does_not_win():
    shares = torch.ones(100, 3)
    shares[1:4, 0] = 0.0  # below the target for three iterations only
    shares[10:, 1] = 0.0
    shares[5:, 2] = math.nan
    assert dln.race(iter(shares), torch.tensor([3.0, 2.0, 1.0]), level=0.1, cap=50) == (10, 2.0)
    steps, rate = dln.race(iter(torch.ones(100, 1)), torch.tensor([1.0]), level=0.1, cap=50)
    assert steps == 50 and math.isnan(rate)


def test_fastest_rate_finds_the_best_of_separate_runs(task, rng):
    _, _, sigma31, sigma11 = task
    sigma31, sigma11 = sigma31 / 20, sigma11 / 20
    weights = [dln.haar_orthogonal(n, m, generator=rng) for n, m in ((5, 6), (5, 5), (4, 5))]
    rates = torch.tensor([5.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    best = torch.linalg.solve(sigma11, sigma31.T).T
    share = lambda p: ((p - best) @ sigma11 * (p - best)).sum() / (best @ sigma11 * best).sum()  # noqa: E731
    expected = []
    for rate in rates.tolist():
        course = torch.stack(dln.gd_correlations(weights, sigma31, sigma11, rate, 300, share)[1])
        expected.append(int((~(course <= 0.05)).nonzero().max()) + 1)
    steps, rate = dln.fastest_rate(weights, sigma31, sigma11, rates)
    assert steps == min(expected) and rate == rates[int(np.argmin(expected))]


# Initial weights and spectra


@pytest.mark.parametrize(("n", "m"), [(6, 6), (9, 4), (4, 9)])
def test_orthogonal_matrices_are_isometries(rng, n, m):
    w = dln.haar_orthogonal(n, m, gain=1.5, generator=rng)
    assert w.shape == (n, m)
    torch.testing.assert_close(
        torch.linalg.svdvals(w), torch.full((min(n, m),), 1.5, dtype=torch.float64), **TIGHT
    )


def test_orthogonal_matrices_are_haar(rng):
    # The trace of a Haar matrix has mean 0 and variance 1; QR without the sign fix gives mean -2 to 2 instead.
    ours = np.array([dln.haar_orthogonal(5, generator=rng).trace().item() for _ in range(2000)])
    scipy = stats.ortho_group.rvs(5, size=2000, random_state=0)
    assert stats.ks_2samp(ours, scipy.trace(axis1=1, axis2=2)).pvalue > 1e-3
    assert abs(ours.mean()) < 0.1 and abs(ours.var() - 1) < 0.15
    torch_own = torch.nn.init.orthogonal_(torch.empty(5, 5, dtype=torch.float64), generator=rng)
    torch.testing.assert_close(torch_own @ torch_own.T, torch.eye(5, dtype=torch.float64), **TIGHT)


def test_tree_data_correlate_with_kinship(rng):
    y = dln.hierarchical_tree_data(levels=2, features=20_000, flip=0.1, generator=rng)
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    row = (y.T @ y / 20_000)[0]
    expected = torch.tensor(
        [1, 0.8**2, 0.8**4, 0.8**4], dtype=torch.float64
    )  # 0.8 = 1 - 2 * 0.1 per branch
    torch.testing.assert_close(row, expected, rtol=0, atol=0.03)
    assert dln.hierarchical_tree_data(levels=0, features=3, generator=rng).shape == (3, 1)


def test_pretraining_on_white_inputs_gives_an_isometry(rng):
    weights, steps = dln.greedy_pretrain(
        torch.eye(6, dtype=torch.float64), [8, 8, 8], tol=0.01, generator=rng
    )
    assert [tuple(w.shape) for w in weights] == [(8, 6), (8, 8), (8, 8)] and min(steps) > 5
    assert (torch.linalg.svdvals(dln.product(weights)) - 1).abs().max() < 0.03


def test_a_narrow_autoencoder_finds_the_principal_directions(rng):
    from sklearn.decomposition import PCA

    x = (
        randn(rng, 300, 5)
        * torch.tensor([3.0, 2.5, 0.05, 0.04, 0.03]).double()
        @ dln.haar_orthogonal(5, generator=rng)
    )
    x = x - x.mean(0)
    (w,), _ = dln.greedy_pretrain(x.T @ x, [2], tol=1e-3, generator=rng)
    principal = torch.tensor(PCA(2).fit(x.numpy()).components_)
    cosines = torch.linalg.svdvals(torch.linalg.qr(w.T).Q.T @ principal.T)
    assert cosines.min() > 0.97  # the small start leaves a trace in the other directions


def test_off_diagonal_ratio(rng):
    basis = dln.haar_orthogonal(5, generator=rng)
    a = basis * torch.arange(1.0, 6.0).double() @ basis.T
    assert dln.off_diagonal_ratio(a, basis) == pytest.approx(0, abs=1e-12)
    assert dln.off_diagonal_ratio(a) > 0.05
    assert dln.off_diagonal_ratio(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == pytest.approx(0.5)


def test_products_of_orthogonal_and_of_gaussian_matrices(rng):
    singular, eigen, mean_log = dln.product_spectrum(60, 20, "orthogonal", rng)
    torch.testing.assert_close(singular, torch.ones(60, dtype=torch.float64), **TIGHT)
    torch.testing.assert_close(eigen.abs(), torch.ones(60, dtype=torch.float64), **TIGHT)
    assert abs(mean_log) < 1e-12
    singular, eigen, mean_log = dln.product_spectrum(200, 3, "gaussian", rng)
    assert mean_log == pytest.approx(singular.log().mean().item() / 3, abs=1e-8)
    assert mean_log == pytest.approx(
        eigen.abs().log().mean().item() / 3, abs=1e-8
    )  # |det| both ways
    expected = (
        torch.digamma(torch.arange(1, 201).double() / 2).mean().item() / 2 + math.log(2 / 200) / 2
    )
    assert mean_log == pytest.approx(expected, abs=0.02)
    assert (eigen.abs() < 0.5).double().mean().item() == pytest.approx(0.5 ** (2 / 3), abs=0.05)


# The nonlinear network


def test_the_jacobian_is_that_of_autograd(rng):
    weights = [randn(rng, 5, 5) for _ in range(4)]
    x = randn(rng, 2, 5)

    def network(v):
        for w in weights:
            v = 0.7 * w @ v.tanh()
        return v

    jacobian, q = dln.tanh_jacobian(weights, x, gain=0.7)
    for i in range(2):
        torch.testing.assert_close(
            jacobian[i], torch.autograd.functional.jacobian(network, x[i]), **TIGHT
        )
    torch.testing.assert_close(q[-1], torch.stack([network(v).square().mean() for v in x]), **TIGHT)
    assert q.shape == (5, 2)


def test_the_activity_has_its_fixed_point_above_gain_one():
    assert dln.q_fixed_point(0.9) == dln.q_fixed_point(1.0) == 0
    assert dln.q_fixed_point(1.1) == pytest.approx(0.11275, abs=1e-5)
    z, w = np.polynomial.hermite_e.hermegauss(80)
    for gain in (1.001, 1.1, 1.5):
        q = dln.q_fixed_point(gain)
        assert q > 0
        assert gain**2 * (w @ np.tanh(math.sqrt(q) * z) ** 2) / w.sum() == pytest.approx(
            q, rel=1e-5
        )


# Bad input

EYE, T = torch.eye(3), torch.tensor([0.0, 1.0])
BAD = {
    "u0 must be positive": lambda: dln.sigmoid_mode(T, 1.0, 0.0, 1.0),
    "s must be positive": lambda: dln.sigmoid_mode(T, -1.0, 0.1, 1.0),
    "u0 must be below s / 2": lambda: dln.half_time(1.0, 1.0, 1.0),
    "without reaching it": lambda: dln.learning_time(0.1, 1.0, 1.0, 1.0),
    "counts layers of units": lambda: dln.learning_time(0.1, 0.5, 1.0, 1.0, n_layers=1),
    "must be at least 2": lambda: dln.deep_mode_ode(T, 1.0, 0.1, 1.0, n_layers=1),
    "flip": lambda: dln.hierarchical_tree_data(flip=1.5),
    "sides of at least 1, got 0": lambda: dln.haar_orthogonal(0),
    "sides of at least 1, got 2 x 0": lambda: dln.scaled_gaussian(2, 0),
    "u0 must be positive and finite, got -1": lambda: dln.decoupled_init(EYE, [3], u0=-1.0),
    "at least 1 weight matrix": lambda: dln.product([]),
    "do not fit": lambda: dln.DeepLinear([torch.ones(2, 3), torch.ones(4, 5)]),
    "so sigma31 must be": lambda: dln.gd_correlations([EYE], torch.ones(2, 3), EYE, 0.1, 1),
    "symmetric": lambda: dln.gd_correlations([EYE], EYE, EYE + torch.ones(3, 3).triu(1), 0.1, 1),
    "rates must be positive": lambda: dln.fastest_rate([EYE], EYE, EYE, torch.tensor([0.1, 0.0])),
    "1 units still miss": lambda: dln.greedy_pretrain(EYE, [1], max_steps=50),
    "'cauchy'": lambda: dln.product_spectrum(3, 2, "cauchy"),
    "gain must be positive": lambda: dln.tanh_jacobian([EYE], torch.ones(3), 0.0),
    "gain must be positive and finite, got nan": lambda: dln.q_fixed_point(math.nan),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        BAD[message]()
