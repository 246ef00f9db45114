"""Fields against enumeration, Newton's identities against polynomials, theory against limits and closed forms."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from nnlib.associative_memory import dense_hebbian as dh


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(K=3, N=8, P=4, seed=0, **options):
    g = generator(seed)
    means = 2 * torch.rand(K, N, generator=g, dtype=torch.float64) - 1
    return dh.DenseHebbian(means, P, **options)


def no_field(sigma, sites):
    return torch.zeros_like(sigma[..., sites])


def enumerated(net):
    """All tuples and their couplings, with the energy's prefactor."""
    tuples = torch.tensor(list(combinations(range(net.N), net.order)))
    return tuples, net.scale * net.class_means[:, tuples].prod(-1).sum(0)


@pytest.mark.parametrize("P", [2, 4, 6])
def test_the_field_is_the_sum_over_all_tuples(P):
    net = network(P=P)
    sigma = dh.archetypes(5, net.N, generator(1))
    soft = 2 * torch.rand(5, net.N, generator=generator(2), dtype=torch.float64) - 1
    for spins in (sigma, soft):
        by_hand = dh.tensor_field(*enumerated(net), spins)
        torch.testing.assert_close(net.field(spins), by_hand, rtol=0, atol=1e-14)


@pytest.mark.parametrize("P", [2, 4])
def test_the_energy_is_the_sum_over_all_tuples(P):
    net, sigma = network(P=P), dh.archetypes(5, 8, generator(1))
    tuples, couplings = enumerated(net)
    by_hand = -(couplings * sigma[:, tuples].prod(-1)).sum(-1)
    torch.testing.assert_close(net.energy(sigma), by_hand, rtol=0, atol=1e-14)


@pytest.mark.parametrize("P", [2, 4, 6])
def test_a_flip_changes_the_energy_by_twice_spin_times_field(P):
    net, sigma = network(P=P), dh.archetypes(1, 8, generator(1))[0]
    for i in range(8):
        flipped = sigma.clone()
        flipped[i] *= -1
        change = net.energy(flipped) - net.energy(sigma)
        torch.testing.assert_close(change, 2 * sigma[i] * net.field(sigma)[i])


@pytest.mark.parametrize("form", dh.FORMS)
def test_the_field_is_minus_the_gradient_of_the_energy(form):
    net = network(P=4, form=form)
    sigma = dh.archetypes(1, 8, generator(1))[0].requires_grad_()
    (gradient,) = torch.autograd.grad(net.energy(sigma), sigma)
    torch.testing.assert_close(net.field(sigma.detach()), -gradient)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_newtons_identities_give_the_coefficients_of_a_product(x):
    x = torch.tensor(x, dtype=torch.float64)
    sums = torch.stack([(x**k).sum() for k in range(1, len(x) + 1)])
    coefficients = np.poly(-x.numpy())  # of prod (t + x_j)
    np.testing.assert_allclose(dh.elementary_symmetric(sums).numpy(), coefficients, atol=1e-8)


def test_two_body_couplings_are_the_hopfield_network():
    patterns = dh.archetypes(3, 20, generator())
    sigma = dh.archetypes(4, 20, generator(1))
    J = patterns.T @ patterns / 20
    J.fill_diagonal_(0)
    torch.testing.assert_close(dh.DenseHebbian(patterns, 2).field(sigma), sigma @ J)


@pytest.mark.parametrize("form", dh.FORMS)
def test_flipping_all_spins_flips_the_field_and_keeps_the_energy(form):
    net, sigma = network(P=4, form=form), dh.archetypes(3, 8, generator(1))
    torch.testing.assert_close(net.field(-sigma), -net.field(sigma))
    torch.testing.assert_close(net.energy(-sigma), net.energy(sigma))


def test_chosen_sites_and_batches_give_the_same_field():
    net, sigma = network(), dh.archetypes(6, 8, generator(1)).view(2, 3, 8)
    sites = torch.tensor([5, 0, 2])
    torch.testing.assert_close(net.field(sigma, sites), net.field(sigma)[..., sites])
    by_hand = dh.tensor_field(*enumerated(net), sigma, sites)
    torch.testing.assert_close(net.field(sigma, sites), by_hand)
    torch.testing.assert_close(net.field(sigma)[1, 2], net.field(sigma[1, 2]))


def test_the_power_form_nears_the_distinct_one_for_a_retrieved_pattern():
    gaps = []
    for N in (100, 400):
        pattern = dh.archetypes(1, N, generator())
        fields = [dh.DenseHebbian(pattern, 4, form=f).field(pattern) for f in dh.FORMS]
        gaps.append(((fields[0] - fields[1]) / fields[1]).abs().max().item())
    assert gaps[0] < 0.1 and gaps[1] == pytest.approx(gaps[0] / 4, rel=0.1)


def test_second_moment_scales_the_field():
    a, b = network(P=4, second_moment=1.0), network(P=4, second_moment=0.25)
    sigma = dh.archetypes(1, 8, generator(1))
    torch.testing.assert_close(16 * a.field(sigma), b.field(sigma))
    means = dh.class_means(dh.archetypes(50, 500, generator()), 10, 0.5, generator(1))
    net = dh.DenseHebbian(means, 2)
    assert net.scale * 500 == pytest.approx(1 / (0.25 + 0.75 / 10), rel=0.01)


def test_class_means_have_the_moments_of_the_entropy():
    xi = dh.archetypes(200, 500, generator())
    aligned = xi * dh.class_means(xi, 10, 0.5, generator(1))
    rho = dh.dataset_entropy(0.5, 10)
    assert rho == pytest.approx(0.3)
    assert aligned.mean().item() == pytest.approx(0.5, abs=0.005)
    assert aligned.var().item() == pytest.approx(0.25 * rho, rel=0.02)
    assert set((aligned * 10).round().unique().tolist()) <= set(range(-10, 11, 2))
    assert torch.equal(dh.class_means(xi, 3, 1.0, generator(1)), xi)


def test_class_means_of_data():
    x = torch.tensor([[1.0, -1], [1, 1], [3, 0], [5, 0], [-1, -1]])
    y = torch.tensor([0, 0, 2, 2, 0])
    assert dh.class_means_from_data(x, y, 2).tolist() == [[1, 0], [4, 0]]
    torch.testing.assert_close(dh.class_means_from_data(x, y)[0], x[[0, 1, 4]].mean(0))
    with pytest.raises(ValueError, match=r"class 2 has 2 rows.*3"):
        dh.class_means_from_data(x, y, 3)


def test_corrupted_couplings_without_noise_are_the_patterns_products():
    xi = dh.archetypes(2, 7, generator())
    tuples, couplings = dh.corrupted_couplings(xi, 4, 0.0)
    assert tuples.shape == (35, 4)
    expected = sum(pattern[tuples].prod(-1) for pattern in xi)
    assert torch.equal(couplings, expected)
    noisy = dh.corrupted_couplings(dh.archetypes(4, 30, generator()), 4, 3.0, generator(1))[1]
    assert noisy.std().item() == pytest.approx(math.sqrt(4 * (9 + 1)), rel=0.02)


def test_spins_are_drawn_on_their_own_device():
    sigma = torch.ones(2, 6, device="meta")  # stands for any device that is not the CPU
    end, _ = dh.retrieve(no_field, sigma, beta=1.0, sweeps=1)
    assert end.device == sigma.device


def test_zero_noise_dynamics_one_spin_at_a_time_never_raises_the_energy():
    net, sigma = network(K=5, N=20), dh.archetypes(1, 20, generator(1))[0]
    energies = [net.energy(sigma).item()]
    for i in torch.randperm(60, generator=generator(2)) % 20:
        sigma[i] = net.field(sigma)[i].sign()
        energies.append(net.energy(sigma).item())
    assert all(b <= a + 1e-15 for a, b in pairwise(energies))


def test_a_damaged_pattern_is_restored_and_the_run_stops():
    patterns = dh.archetypes(10, 60, generator())
    start = patterns.clone()
    start[:, :9] *= -1
    found, sweeps = dh.retrieve(dh.DenseHebbian(patterns, 4).field, start, generator=generator(1))
    assert torch.equal(found, patterns) and sweeps < 12
    assert torch.equal(start[:, 9:], patterns[:, 9:])  # the start is not changed in place


def test_glauber_spins_have_the_probability_of_their_field():
    h = torch.tensor([-0.4, 0.0, 0.3, 5.0], dtype=torch.float64)
    start = torch.ones(40_000, 4, dtype=torch.float64)
    found, _ = dh.retrieve(
        lambda s, sites: h.expand_as(s)[..., sites],
        start,
        beta=0.8,
        sweeps=1,
        generator=generator(),
    )
    torch.testing.assert_close(found.mean(0), torch.tanh(0.8 * h), rtol=0, atol=0.02)


def test_mean_field_dynamics_iterates_tanh_and_becomes_the_sign_without_noise():
    net, sigma = network(N=12, K=4), dh.archetypes(3, 12, generator(1))
    m, _ = dh.retrieve(net.field, sigma, beta=2.0, sweeps=3, mean_field=True)
    by_hand = sigma
    for _ in range(3):
        by_hand = torch.tanh(2.0 * net.field(by_hand))
    torch.testing.assert_close(m, by_hand)
    one = {
        b: dh.retrieve(net.field, sigma, beta=b, sweeps=1, mean_field=True)[0]
        for b in (1e12, math.inf)
    }
    torch.testing.assert_close(one[1e12], one[math.inf])


def test_a_field_of_zero_keeps_the_spin():
    sigma = dh.archetypes(2, 8, generator())
    found, sweeps = dh.retrieve(no_field, sigma)
    assert torch.equal(found, sigma) and sweeps == 1


@pytest.mark.parametrize(("load", "rho"), [(0.05, 0.0), (0.05, 0.3), (0.3, 1.0)])
def test_pairwise_one_step_overlap_is_the_textbook_formula(load, rho):
    expected = erf(1 / math.sqrt(2 * (rho + load * (1 + rho) ** 2)))
    assert dh.one_step_overlap(load, rho, 2) == pytest.approx(expected, abs=1e-15)


def test_one_step_overlap_falls_with_load_and_entropy_and_agrees_with_a_simulation():
    grid = dh.one_step_overlap(np.linspace(0, 1, 9)[:, None], np.linspace(0, 2, 9), 4)
    assert (np.diff(grid, axis=0) < 0).all() and (np.diff(grid, axis=1) < 0).all()
    assert grid[0, 0] == 1
    N, K, g = 400, 40, generator()
    found = []
    for _ in range(5):
        xi = dh.archetypes(K, N, g)
        net = dh.DenseHebbian(dh.class_means(xi, 20, 0.25, g), 2)
        found.append((net.field(xi).sign() * xi).mean().item())
    theory = dh.one_step_overlap(K / (N - 1), dh.dataset_entropy(0.25, 20), 2)
    assert np.mean(found) == pytest.approx(theory, abs=0.02)


def test_the_polynomial_of_class_means_has_the_stated_variance():
    N, P, r, M = 20, 4, 0.4, 5
    xi = dh.archetypes(40_000, N - 1, generator())
    x = xi * dh.class_means(xi, M, r, generator(1))
    sums = torch.stack([(x**k).sum(1) for k in range(1, P)])
    e = dh.elementary_symmetric(sums)[P - 1]
    relative = (e.var() / (math.comb(N - 1, P - 1) * r ** (P - 1)) ** 2).item()
    assert relative == pytest.approx(
        dh.polynomial_variance(dh.dataset_entropy(r, M), P, N), rel=0.05
    )


def test_the_finite_overlap_nears_the_limit_and_explains_a_small_network():
    rho, load = dh.dataset_entropy(0.2, 20), 0.06
    limit = dh.one_step_overlap(load, rho, 4)
    gaps = [limit - dh.one_step_overlap(load, rho, 4, N) for N in (60, 240, 960)]
    assert gaps[0] > 0.02 and gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0
    assert dh.one_step_overlap(load, 0.0, 4, 60) == pytest.approx(dh.one_step_overlap(load, 0.0, 4))
    K, g, found = 2053, generator(), []
    for _ in range(4):
        xi = dh.archetypes(K, 60, g)
        net = dh.DenseHebbian(dh.class_means(xi, 20, 0.2, g), 4)
        found.append((net.field(xi[:200]).sign() * xi[:200]).mean().item())
    theory = dh.one_step_overlap(K / math.comb(59, 3), rho, 4, 60)
    assert np.mean(found) == pytest.approx(theory, abs=0.015)
    assert abs(np.mean(found) - limit) > 0.025


@pytest.mark.parametrize("P", [2, 4, 8])
def test_learning_threshold_solves_its_equation(P):
    assert dh.learning_threshold(0.0, 0.2, P) == pytest.approx(24)
    M = dh.learning_threshold(0.05, 0.2, P)
    rho = dh.dataset_entropy(0.2, M)
    assert rho + 0.05 * (1 + rho) ** P == pytest.approx(1)
    assert dh.one_step_overlap(0.05, rho, P) == pytest.approx(erf(1 / math.sqrt(2)))
    assert dh.learning_threshold(1.0, 0.2, P) == math.inf


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("beta", [20.0, 60.0])
def test_the_replica_symmetric_solution_solves_its_equations(rho, beta):
    """By two-dimensional Gauss-Hermite quadrature in z and x, as the equations are written."""
    P, alpha = 4, 0.005
    state = dh.solve_replica_symmetric(alpha, rho, beta, P)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    z, x = np.meshgrid(nodes, nodes, indexing="ij")
    w = np.outer(weights, weights)
    unit = math.factorial(P - 1)
    g = state.n ** (P - 1) * (1 + math.sqrt(rho) * z) / (unit * (1 + rho) ** (P / 2))
    g = g + math.sqrt(alpha * state.q ** (P - 1) / unit) * x
    t = np.tanh(beta * g)
    assert (w * t).sum() == pytest.approx(state.m, abs=2e-4)
    assert (w * t**2).sum() == pytest.approx(state.q, abs=2e-4)
    assert (w * (1 + math.sqrt(rho) * z) * t).sum() == pytest.approx(state.n, abs=2e-4)  # Stein
    assert state.m > 0.5


def test_without_load_and_entropy_the_solution_is_the_mean_field_magnet():
    m = dh.solve_replica_symmetric(0.0, 0.0, 20.0, 4).m
    assert m == pytest.approx(np.tanh(20 * m**3 / 6), abs=1e-10) and m > 0.9


def test_no_noise_is_the_limit_of_little_noise():
    alpha, rho = np.array([0.01, 0.02, 0.01]), np.array([0.0, 0.0, 0.2])
    cold = dh.solve_replica_symmetric(alpha, rho, 1e4, 4)
    none = dh.solve_replica_symmetric(alpha, rho, math.inf, 4)
    for a, b in zip(cold, none, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_storage_limit_and_critical_noise_agree_with_the_solver():
    assert dh.storage_limit(4) == pytest.approx(0.03298, abs=2e-5)
    assert float(dh.critical_load(0.0, math.inf, 4, steps=18)) == pytest.approx(
        dh.storage_limit(4), rel=2e-3
    )
    T = dh.critical_noise(4)
    below, above = (dh.solve_replica_symmetric(0.0, 0.0, 1 / (T * f), 4).m for f in (0.995, 1.005))
    assert below > 0.5 and above < 1e-6
    scaled = [dh.storage_limit(P) * math.factorial(P - 1) for P in (4, 6, 8)]
    assert scaled == pytest.approx([0.198, 0.158, 0.140], abs=5e-4)


def test_critical_load_is_zero_where_there_is_no_retrieval():
    found = dh.critical_load([0.0, 0.3], 1 / 0.09, 4)
    assert (found == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dh.archetypes(0, 5), "K=0"),
        (lambda: dh.dataset_entropy(0.0, 5), "0.0"),
        (lambda: dh.dataset_entropy(1.2, 5), "1.2"),
        (lambda: dh.dataset_entropy(0.5, 0), "got 0"),
        (lambda: dh.class_means(dh.archetypes(2, 5), 3, -0.1), "-0.1"),
        (lambda: network(P=3), "got 3"),
        (lambda: network(P=0), "got 0"),
        (lambda: network(P=10), "N = 8, got 10"),
        (lambda: network(form="both"), "'both'"),
        (lambda: network(second_moment=0.0), "0.0"),
        (lambda: dh.DenseHebbian(torch.full((2, 4), math.nan), 2), "nan"),
        (lambda: dh.DenseHebbian(torch.zeros(2, 4), 2), "0.0"),
        (lambda: dh.corrupted_couplings(dh.archetypes(1, 6), 4, -1.0), "noise=-1.0"),
        (lambda: dh.corrupted_couplings(dh.archetypes(1, 6), 7, 1.0), "order=7"),
        (lambda: dh.retrieve(no_field, torch.ones(4), beta=0.0), "beta=0.0"),
        (lambda: dh.retrieve(no_field, torch.ones(4), sweeps=0), "sweeps=0"),
        (lambda: dh.one_step_overlap(-0.1, 0.0, 4), "-0.1"),
        (lambda: dh.one_step_overlap(0.1, 0.0, 5), "got 5"),
        (lambda: dh.polynomial_variance(0.1, 4, 3), "N=3"),
        (lambda: dh.learning_threshold(0.1, 1.0, 4), "1.0"),
        (lambda: dh.solve_replica_symmetric(0.01, 0.0, 10.0, 2), "got 2"),
        (lambda: dh.solve_replica_symmetric(0.01, -0.5, 10.0, 4), "-0.5"),
        (lambda: dh.solve_replica_symmetric(0.01, 0.0, -1.0, 4), "-1"),
        (lambda: dh.solve_replica_symmetric(0.01, 0.0, [1.0, math.inf], 4), "inf"),
        (lambda: dh.storage_limit(2), "got 2"),
        (lambda: dh.critical_noise(3), "got 3"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_number_of_spins_is_refused():
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        network(N=8).field(torch.ones(7, dtype=torch.float64))
