import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from nnlib.infinite_width import neural_tangent_kernel as ntk

# acos loses half of the digits where the cosine is 1, so the tolerance goes with sqrt(eps), not with eps.
ATOL = {torch.float64: 2e-8, torch.float32: 2e-3}
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def network(widths=(2, 30, 30, 30, 1), **keywords):
    return ntk.NTKMLP(widths, generator=generator(), dtype=F64, **keywords)


# --- closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ntk.EXPECTATIONS)
@pytest.mark.parametrize("covariance", [(1.0, 0.3, 2.0), (0.5, -0.4, 0.7), (1.3, 0.0, 0.2)])
def test_expectations_equal_quadrature(name, covariance):
    functions = {
        "relu": (lambda u: np.maximum(u, 0), lambda u: (u > 0) * 1.0),
        "erf": (
            lambda u: torch.erf(torch.as_tensor(u)).numpy(),
            lambda u: 2 / math.sqrt(math.pi) * np.exp(-(u**2)),
        ),
        "linear": (lambda u: u, lambda u: np.ones_like(u)),
        "square": (lambda u: u**2, lambda u: 2 * u),
    }
    a, c, b = covariance
    if name == "relu":  # kinks and jumps: a fine grid of quantiles does better than polynomials
        nodes, weights = stats.norm.ppf((np.arange(2000) + 0.5) / 2000), np.full(2000, 1 / 2000)
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        weights = weights / weights.sum()
    u = math.sqrt(a) * nodes[:, None]
    v = c / math.sqrt(a) * nodes[:, None] + math.sqrt(b - c**2 / a) * nodes[None, :]
    tensors = (torch.tensor(x, dtype=F64) for x in covariance)
    closed = ntk.activation_expectations(name, *tensors)
    tolerance = 1e-3 if name == "relu" else 1e-9
    for f, value in zip(functions[name], closed, strict=True):
        assert np.einsum("i,j,ij", weights, weights, f(u) * f(v)) == pytest.approx(
            value.item(), abs=tolerance
        )


@pytest.mark.parametrize("dtype", ATOL)
def test_equals_neural_tangents_on_the_circle(dtype):
    # Values of neural_tangents 0.6.5: three hidden ReLU layers, W_std 1, b_std 0.1, parameterization "ntk".
    golden = json.loads(Path(__file__).with_name("neural_tangents_circle.json").read_text())
    angles = torch.linspace(-math.pi, math.pi, 64, dtype=F64)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    kernels = ntk.ntk_nngp(
        circle, torch.tensor([[1.0, 0.0]], dtype=F64), depth=4, beta=0.1, dtype=dtype
    )
    tolerance = 1e-12 if dtype == F64 else ATOL[dtype]
    for name, kernel in zip(("nngp", "ntk"), kernels, strict=True):
        expected = torch.tensor(golden[name], dtype=dtype)
        torch.testing.assert_close(kernel[:, 0], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_linear_network_has_depth_times_its_covariance_without_biases(depth):
    x = normal(6, 3)
    nngp, kernel = ntk.ntk_nngp(x, depth=depth, beta=0.0, activation="linear")
    torch.testing.assert_close(nngp, x @ x.T / 3)
    torch.testing.assert_close(kernel, depth * x @ x.T / 3)


def test_one_layer_kernel_is_its_covariance():
    nngp, kernel = ntk.ntk_nngp(normal(5, 3), depth=1)
    assert torch.equal(nngp, kernel)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("depth", [2, 4])
def test_relu_diagonal_follows_its_recursion(depth, dtype):
    # On the diagonal E[s s] = Sigma / 2 and E[s' s'] = 1/2.
    x = normal(5, 7)
    sigma = x.square().sum(1) / 7 + 0.01
    theta = sigma
    for _ in range(depth - 1):
        sigma = sigma / 2 + 0.01
        theta = theta / 2 + sigma
    kernel = ntk.ntk_nngp(x, depth=depth, dtype=dtype)[1]
    torch.testing.assert_close(kernel.diagonal().double(), theta, atol=ATOL[dtype], rtol=0)


def test_zero_input_without_bias_has_a_zero_kernel():
    nngp, kernel = ntk.ntk_nngp(torch.zeros(1, 3), normal(2, 3), beta=0.0)
    assert torch.equal(kernel, torch.zeros(1, 2, dtype=F64)) and torch.equal(
        nngp, torch.zeros(1, 2, dtype=F64)
    )


def test_kernel_is_differentiable_in_its_inputs_away_from_equal_directions():
    y = normal(3, 2, seed=1)

    def kernel(x):
        return ntk.ntk_nngp(x, y)[1]

    assert torch.autograd.gradcheck(kernel, normal(2, 2).requires_grad_())


@pytest.mark.parametrize("name", ntk.EXPECTATIONS)
def test_second_moment_is_the_expectation_at_equal_inputs(name):
    a = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
    expectations, second_moment = ntk.EXPECTATIONS[name]
    torch.testing.assert_close(second_moment(a), expectations(a, a, a)[0])


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 10), st.integers(1, 5))
def test_relu_kernel_without_bias_is_homogeneous(scale, depth):
    x, y = normal(4, 3), normal(5, 3, seed=1)
    scaled, plain = (ntk.ntk_nngp(s * x, y, depth=depth, beta=0.0)[1] for s in (scale, 1.0))
    torch.testing.assert_close(scaled, scale * plain)


# --- finite networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, torch.erf])
def test_layer_wise_kernel_is_the_gram_matrix_of_gradients(activation):
    net, x, y = network(activation=activation), normal(5, 2), normal(4, 2, seed=1)
    torch.testing.assert_close(
        ntk.empirical_ntk(net, x, y), ntk.jacobian_ntk(net, x, y), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        ntk.empirical_ntk(net, x), ntk.jacobian_ntk(net, x), atol=1e-12, rtol=0
    )


def test_jacobian_agrees_with_central_differences():
    net, x, h = network((2, 5, 1), activation=torch.tanh), normal(3, 2), 1e-5
    total = torch.zeros(3, 3, dtype=F64)
    with torch.no_grad():
        for p in net.parameters():
            flat = p.view(-1)
            for i in range(len(flat)):
                old = flat[i].item()
                values = []
                for step in (h, -h):
                    flat[i] = old + step
                    values.append(net(x)[:, 0])
                flat[i] = old
                gradient = (values[0] - values[1]) / (2 * h)
                total += gradient[:, None] * gradient[None, :]
    torch.testing.assert_close(ntk.jacobian_ntk(net, x), total, atol=1e-8, rtol=0)


def test_copies_are_the_single_networks():
    ensemble, x = network(copies=(3,)), normal(4, 2)
    kernels, outputs = ntk.empirical_ntk(ensemble, x), ensemble(x)
    single = network()
    for i in range(3):
        parts = zip(single.parameters(), ensemble.parameters(), strict=True)
        with torch.no_grad():
            for p, q in parts:
                p.copy_(q[i])
        torch.testing.assert_close(outputs[i], single(x))
        torch.testing.assert_close(kernels[i], ntk.empirical_ntk(single, x))


def test_training_copies_together_equals_training_one_alone():
    x, y = normal(4, 2), normal(4, seed=1)
    ensemble, single = network((2, 8, 1), copies=(2,)), network((2, 8, 1))
    with torch.no_grad():
        for p, q in zip(single.parameters(), ensemble.parameters(), strict=True):
            p.copy_(q[1])
    for net in (ensemble, single):
        ntk.train_full_batch(net, x, y, lr=0.5, steps=20)
    torch.testing.assert_close(ensemble(x)[1], single(x))


def test_wide_networks_have_the_limit_kernel():
    x = normal(5, 3)
    net = ntk.NTKMLP([3, 512, 512, 1], copies=(40,), generator=generator())
    kernel = ntk.empirical_ntk(net, x.float()).mean(0).double()
    nngp, limit = ntk.ntk_nngp(x, depth=3)
    assert (kernel - limit).norm() < 0.05 * limit.norm() < 0.2 * (kernel - nngp).norm()


def test_parameter_count_and_scale():
    net = network((3, 20, 20, 1))
    assert sum(p.numel() for p in net.parameters()) == 3 * 20 + 20 + 20 * 20 + 20 + 20 + 1
    wide = ntk.NTKMLP([1, 100_000], generator=generator(), dtype=F64)
    assert wide.weights[0].std().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_parameter_step_is_a_kernel_step_up_to_second_order(activation):
    x, y, test = normal(6, 2), normal(6, seed=1), normal(5, 2, seed=2)
    gaps = []
    for lr in (1e-4, 1e-5):
        net = network((2, 12, 1), activation=activation)
        kernel, residual, f0 = (
            ntk.empirical_ntk(net, test, x),
            net(x)[:, 0].detach() - y,
            net(test)[:, 0].detach(),
        )
        ntk.train_full_batch(net, x, y, lr=lr, steps=1)
        gaps.append(
            (net(test)[:, 0] - ntk.kernel_gradient_step(f0, kernel, residual, lr)).norm().item()
        )
    assert math.log10(gaps[0] / gaps[1]) == pytest.approx(2, abs=0.02)


# --- the flow ---------------------------------------------------------------------------------------------


def flow_problem():
    train, test = normal(6, 3), normal(4, 3, seed=1)
    k, kt = ntk.ntk_nngp(train, depth=2)[1], ntk.ntk_nngp(test, train, depth=2)[1]
    return k, kt, normal(6, seed=2)


def test_flow_equals_many_euler_steps():
    k, kt, y = flow_problem()
    t, steps = 5.0, 20_000
    f, g = torch.zeros(6, dtype=F64), torch.zeros(4, dtype=F64)
    for _ in range(steps):
        g = ntk.kernel_gradient_step(g, kt, f - y, t / steps)
        f = ntk.kernel_gradient_step(f, k, f - y, t / steps)
    mean, _ = ntk.gradient_flow_posterior(k, kt, y, t=t)
    torch.testing.assert_close(mean, g, atol=1e-4, rtol=0)


def test_flow_starts_at_the_prior_and_ends_at_interpolation():
    k, kt, y = flow_problem()
    x = normal(6, 3)
    prior = ntk.ntk_nngp(x, depth=2)[0]
    mean, cov = ntk.gradient_flow_posterior(k, k, y, t=0.0, nngp=(prior, prior, prior))
    torch.testing.assert_close(cov, prior)
    assert mean.abs().max() == 0
    mean, cov = ntk.gradient_flow_posterior(k, k, y, nngp=(prior, prior, prior))
    torch.testing.assert_close(mean, y)
    torch.testing.assert_close(cov, torch.zeros_like(cov), atol=1e-9, rtol=0)
    ridgeless = kt @ torch.linalg.solve(k, y)
    torch.testing.assert_close(ntk.gradient_flow_posterior(k, kt, y)[0], ridgeless)


def test_flow_scales_kernel_against_time_and_sum_against_mean():
    k, kt, y = flow_problem()
    base = ntk.gradient_flow_posterior(k, kt, y, t=3.0)[0]
    torch.testing.assert_close(ntk.gradient_flow_posterior(7 * k, 7 * kt, y, t=3.0 / 7)[0], base)
    torch.testing.assert_close(
        ntk.gradient_flow_posterior(k, kt, y, t=3.0 / 6, normalise=False)[0], base
    )


def test_flow_leaves_the_null_space_untouched():
    v = torch.tensor([[1.0], [1.0], [0.0]], dtype=F64)
    y = torch.tensor([1.0, 3.0, 5.0], dtype=F64)
    mean, _ = ntk.gradient_flow_posterior(v @ v.T, v @ v.T, y)
    torch.testing.assert_close(mean, torch.tensor([2.0, 2.0, 0.0], dtype=F64))


def test_covariance_is_that_of_trained_linear_models():
    # A linear model with prior weights has NNGP = NTK; its ensemble can be propagated sample by sample.
    x, test, y = normal(4, 3), normal(3, 3, seed=1), normal(4, seed=2)
    k, kt, ktt = x @ x.T, test @ x.T, test @ test.T
    _, cov = ntk.gradient_flow_posterior(k, kt, y, t=2.0, nngp=(k, kt, ktt))
    decay = torch.linalg.matrix_exp(
        -2.0 / 4 * (x.T @ x)
    )  # how the flow shrinks the initial weights
    torch.testing.assert_close(cov, test @ decay @ decay.T @ test.T)


def test_components_diagonalise_the_kernel_and_have_unit_norm():
    k, _, _ = flow_problem()
    values, functions = ntk.kernel_principal_components(k)
    torch.testing.assert_close(k / 6 @ functions, functions * values)
    torch.testing.assert_close(functions.square().mean(0), torch.ones(6, dtype=F64))
    assert (values.diff() <= 0).all()


# --- bad input --------------------------------------------------------------------------------------------

GOOD = torch.ones(3, 2, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntk.ntk_nngp(GOOD, depth=0), "at least 1, got 0"),
        (lambda: ntk.ntk_nngp(torch.full((1, 2), math.nan)), "nan or inf"),
        (lambda: ntk.ntk_nngp(GOOD, activation="gelu"), "'gelu'"),
        (lambda: ntk.NTKMLP([3]), r"\[3\]"),
        (lambda: ntk.NTKMLP([3, 0, 1]), r"\[3, 0, 1\]"),
        (lambda: ntk.empirical_ntk(network((2, 4, 3)), GOOD), "has 3"),
        (lambda: ntk.jacobian_ntk(nn.Linear(2, 3, dtype=F64), GOOD), "one output"),
        (
            lambda: ntk.gradient_flow_posterior(torch.eye(2), torch.eye(2), torch.ones(2), t=-1.0),
            "got -1.0",
        ),
        (
            lambda: ntk.gradient_flow_posterior(
                torch.eye(2), torch.eye(2), torch.ones(2), t=math.nan
            ),
            "got nan",
        ),
        (lambda: ntk.kernel_principal_components(-torch.eye(2)), "smallest eigenvalue -1"),
        (
            lambda: ntk.kernel_principal_components(torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            "symmetric",
        ),
        (lambda: ntk.kernel_principal_components(torch.full((2, 2), math.inf)), "finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inputs_of_different_width_are_refused():
    with pytest.raises(
        (ValueError, TypeError)
    ):  # a TypeError where shapes are checked on every call
        ntk.ntk_nngp(GOOD, torch.ones(3, 5, dtype=F64))
