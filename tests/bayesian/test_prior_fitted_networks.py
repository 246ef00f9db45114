"""Prior-fitted networks: the set function, the bucket density, and the posteriors they are compared with."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nnlib.bayesian import prior_fitted_networks as pfn

F64 = torch.float64
EXACT = dict(rtol=0, atol=1e-10)
WRONG = (ValueError, TypeError)  # TypeError: what beartype makes of a wrong shape


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@pytest.fixture
def head():
    """Nine buckets of unequal width."""
    return pfn.RiemannHead(
        torch.tensor([-3.0, -2.0, -1.2, -0.5, -0.1, 0.2, 0.9, 1.4, 2.5, 3.1], dtype=F64)
    )


def network(head, *, n_features=2, seed=0, **sizes):
    """A network whose every weight is random, also those that start at zero."""
    torch.manual_seed(seed)
    net = pfn.PriorFittedNetwork(n_features, head, width=16, n_layers=2, **sizes).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5, generator=generator(seed))
    return net


# --- the Riemann head -------------------------------------------------------------------------------------


def test_density_integrates_to_one_and_its_mean_is_the_integral(head):
    logits = normal(9)
    points = [-60.0, *head.borders.tolist(), 60.0]

    def expected(f):
        def integrand(v):
            y = torch.tensor([v], dtype=F64)
            return f(v) * head.log_prob(logits[None], y).exp().item()

        return sum(integrate.quad(integrand, a, b, epsabs=1e-12)[0] for a, b in pairwise(points))

    assert expected(lambda v: 1.0) == pytest.approx(1, abs=1e-9)
    assert expected(lambda v: v) == pytest.approx(head.mean(logits).item(), abs=1e-9)


@pytest.mark.parametrize("q", [1e-4, 0.03, 0.3, 0.5, 0.77, 0.98, 0.9999])
def test_quantile_inverts_the_integral_of_the_density(head, q):
    logits = normal(9, seed=3)
    cut = head.quantile(logits, q).item()
    points = sorted([-60.0, cut, *(b for b in head.borders.tolist() if b < cut)])

    def density(v):
        return head.log_prob(logits[None], torch.tensor([v], dtype=F64)).exp().item()

    below = sum(integrate.quad(density, a, b, epsabs=1e-12)[0] for a, b in pairwise(points))
    assert below == pytest.approx(q, abs=1e-8)


def test_half_of_an_outer_bucket_lies_within_its_width(head):
    p = normal(9).softmax(-1)
    at = [head.quantile(p.log(), q.item()) for q in (p[0] / 2, 1 - p[-1] / 2)]
    torch.testing.assert_close(torch.stack(at), head.borders[[0, -1]], **EXACT)
    assert pytest.approx(stats.halfnorm.median()) == pfn.HALF_NORMAL_MEDIAN


def test_buckets_have_equal_prior_mass():
    draws = normal(10**6, dtype=torch.float32)
    head = pfn.RiemannHead.from_samples(draws, 20)
    mass = stats.norm.cdf(head.borders[1:-1].numpy())
    np.testing.assert_allclose(np.diff([0, *mass, 1]), 0.05, rtol=0.01)
    ends = stats.norm.cdf(head.borders[[0, -1]].numpy())  # half of the outer mass beyond each
    np.testing.assert_allclose(ends, [0.025, 0.975], atol=1e-3)


def test_gradient_of_log_prob(head):
    y = torch.tensor([-7.0, -2.5, 0.0, 1.0, 3.0, 9.0], dtype=F64)
    logits = normal(6, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: head.log_prob(z, y), logits)


@pytest.mark.parametrize("mean, sd", [(0.2, 0.4), (-2.6, 1.0), (2.4, 0.05), (8.0, 2.0)])
def test_kl_equals_quadrature(head, mean, sd):
    logits = normal(9, seed=1)

    def integrand(v):
        log_q = head.log_prob(logits[None], torch.tensor([v], dtype=F64)).item()
        return stats.norm.pdf(v, mean, sd) * (stats.norm.logpdf(v, mean, sd) - log_q)

    cuts = [mean - 12 * sd, *head.borders.tolist()[1:-1], mean + 12 * sd]
    cuts = sorted(c for c in cuts if abs(c - mean) <= 12 * sd)
    by_hand = sum(integrate.quad(integrand, a, b, epsabs=1e-11)[0] for a, b in pairwise(cuts))
    closed = pfn.gaussian_riemann_kl(
        torch.tensor(mean, dtype=F64), torch.tensor(sd**2, dtype=F64), head, logits
    )
    assert closed.item() == pytest.approx(by_hand, abs=1e-7)


def test_no_bucket_masses_beat_those_of_the_gaussian(head):
    mean, variance = torch.tensor(0.3, dtype=F64), torch.tensor(0.8, dtype=F64)
    mass = torch.distributions.Normal(mean, variance.sqrt()).cdf(head.borders[1:-1])
    best = torch.cat([mass[:1], mass.diff(), 1 - mass[-1:]]).log().requires_grad_()
    kl = pfn.gaussian_riemann_kl(mean, variance, head, best)
    (slope,) = torch.autograd.grad(kl, best)
    torch.testing.assert_close(slope, torch.zeros(9, dtype=F64), **EXACT)
    others = best.detach() + normal(100, 9)
    worse = pfn.gaussian_riemann_kl(mean.expand(100), variance.expand(100), head, others)
    assert 0 < kl < worse.min()


def test_other_heads_equal_torch_distributions():
    logits, y = normal(7, 2), normal(7, seed=1)
    expected = torch.distributions.Normal(logits[:, 0], logits[:, 1].exp()).log_prob(y)
    torch.testing.assert_close(pfn.NormalHead().log_prob(logits, y), expected, **EXACT)
    labels, logits = torch.tensor([0.0, 2.0, 1.0], dtype=F64), normal(3, 3)
    expected = torch.distributions.Categorical(logits=logits).log_prob(labels)
    categorical = pfn.CategoricalHead(3)
    torch.testing.assert_close(categorical.log_prob(logits, labels), expected, **EXACT)
    assert torch.equal(categorical.encode(labels).argmax(-1).double(), labels)


# --- the network ------------------------------------------------------------------------------------------


def test_prediction_does_not_depend_on_the_order_of_the_data(head):
    net, x, y = network(head), normal(3, 9, 2), normal(3, 9, seed=1)
    order = torch.randperm(6, generator=generator())
    mixed = torch.cat([order, torch.arange(6, 9)])
    torch.testing.assert_close(net(x[:, mixed], y[:, mixed], 6), net(x, y, 6), **EXACT)
    assert (net(x, y.flip(1), 6) - net(x, y, 6)).abs().max() > 1e-3  # it does read the labels


def test_queries_do_not_see_one_another_or_hidden_labels(head):
    net, x, y = network(head), normal(3, 9, 2), normal(3, 9, seed=1)
    joint = net(x, y, 6)
    single = torch.cat([net.predict(x[:, :6], y[:, :6], x[:, i : i + 1]) for i in (6, 7, 8)], 1)
    torch.testing.assert_close(joint, single, **EXACT)
    hidden = y.clone()
    hidden[:, 6:] = math.nan
    assert torch.equal(net(x, hidden, 6), joint)


def test_without_context_the_answer_is_a_function_of_the_query_alone(head):
    net, x = network(head), normal(2, 5, 2)
    whole = net(x, normal(2, 5, seed=1), 0)
    alone = net(x[:1, :1], torch.zeros(1, 1, dtype=F64), 0)
    torch.testing.assert_close(whole[:1, :1], alone, **EXACT)


def test_layer_equals_torchs_encoder_layer():
    ours = pfn.SetLayer(16, 4, 24).double()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3, generator=generator(1))
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True).double()
    pairs = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    state = ours.state_dict()
    theirs.load_state_dict(
        {t + kind: state[o + kind] for t, o in pairs.items() for kind in ("weight", "bias")}
    )
    h, mask = normal(2, 7, 16), torch.eye(7, dtype=torch.bool)
    mask[:, :4] = True
    torch.testing.assert_close(ours(h, mask), theirs(h, src_mask=~mask), rtol=0, atol=1e-9)


def test_layers_start_as_a_normalisation():
    layer, h = pfn.SetLayer(16, 4, 32).double(), normal(2, 5, 16)
    expected = nn.functional.layer_norm(h, (16,))
    torch.testing.assert_close(
        layer(h, torch.ones(5, 5, dtype=torch.bool)), expected, rtol=0, atol=1e-4
    )


def test_gradient_of_the_loss(head):
    net, x, y = network(head), normal(2, 5, 2), normal(2, 5, seed=1)
    names, values = zip(*net.named_parameters(), strict=True)
    picked = [names.index(n) for n in ("encode_y.weight", "layers.0.qkv.bias", "decode.2.bias")]

    def loss(*free):
        params = dict(zip(names, values, strict=True))
        params |= {names[i]: v for i, v in zip(picked, free, strict=True)}
        return -head.log_prob(torch.func.functional_call(net, params, (x, y, 3)), y[:, 3:]).mean()

    free = [values[i].detach().clone().requires_grad_() for i in picked]
    assert torch.autograd.gradcheck(loss, free)


# --- fitting ----------------------------------------------------------------------------------------------


def test_context_sizes_have_weight_one_over_the_rest():
    rng, n, draws = generator(), 5, 4000
    counts = np.bincount([pfn.sample_context_size(n, rng) for _ in range(draws)], minlength=n)
    weight = 1 / np.arange(n, 0, -1)
    assert stats.chisquare(counts, draws * weight / weight.sum()).pvalue > 0.01


def test_coins_of_unknown_bias_give_laplaces_rule():
    rng = generator()
    torch.manual_seed(0)

    def coins(batch, n):
        bias = torch.rand(batch, 1, generator=rng)
        return torch.zeros(batch, n, 1), (torch.rand(batch, n, generator=rng) < bias).float()

    net = pfn.PriorFittedNetwork(1, pfn.CategoricalHead(), width=16, n_layers=1)
    sizes = dict(batch_size=64, set_size=8)
    losses = pfn.fit_prior(net, coins, steps=400, lr=1e-2, generator=rng, **sizes)
    assert len(losses) == 400
    for n in range(8):
        flips = (torch.arange(n) < torch.arange(n + 1)[:, None]).float()  # row k: k heads
        at = torch.zeros(n + 1, 1, 1)
        heads = net.predict(at.expand(-1, n, -1), flips, at)[:, 0].softmax(-1)[:, 1]
        laplace = (torch.arange(n + 1) + 1) / (n + 2)
        torch.testing.assert_close(heads, laplace, rtol=0, atol=0.08)
        assert (heads.diff() > 0).all()


def test_the_rate_rises_and_falls():
    rates = []

    net = pfn.PriorFittedNetwork(1, pfn.NormalHead(), width=4, n_layers=1, n_heads=1)
    hook = register_optimizer_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    sampler = pfn.gp_sampler(torch.tensor([[0.3, 1.0, 0.1]]), 1, generator())
    sizes = dict(batch_size=2, set_size=3)
    pfn.fit_prior(net, sampler, steps=20, lr=0.5, warmup=0.25, generator=generator(), **sizes)
    hook.remove()
    np.testing.assert_allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(a > b for a, b in pairwise(rates[5:])) and 0 < rates[-1] < 0.02


# --- priors and references --------------------------------------------------------------------------------


def test_gp_draws_have_the_kernel_as_covariance(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *s, **_: torch.linspace(0, 1, 3).view(1, 3, 1))
    x, y = pfn.gp_sampler(torch.tensor([[0.4, 2.0, 0.3]]), 1, generator())(40_000, 3)
    gap = (x[0] - x[0].T).square()
    expected = 2 * torch.exp(-gap / (2 * 0.4**2)) + 0.3 * torch.eye(3)
    sd = (expected.square() + expected.diag()[:, None] * expected.diag()).div(40_000).sqrt()
    assert ((y.T @ y / 40_000 - expected).abs() < 4 * sd).all()


@pytest.mark.parametrize("row", [(0.3, 1.0, 0.1), (0.6, 2.5, 1e-4), (0.1, 0.5, 0.2)])
def test_gp_posterior_equals_sklearn(row):
    length, variance, noise = row
    x, y, at = normal(1, 8, 2), normal(1, 8, seed=1), normal(1, 5, 2, seed=2)
    grid = torch.tensor([row, (0.2, 1.0, 0.5)], dtype=F64)
    evidence, mean, var = pfn.gp_posterior(x, y, at, grid)
    kernel = ConstantKernel(variance) * RBF(length)
    gp = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x[0], y[0])
    expected, sd = gp.predict(at[0], return_std=True)
    tight = dict(rtol=0, atol=1e-8)
    torch.testing.assert_close(mean[0, 0], torch.from_numpy(expected), **tight)
    torch.testing.assert_close(var[0, 0], torch.from_numpy(sd**2 + noise), **tight)
    assert evidence[0, 0].item() == pytest.approx(gp.log_marginal_likelihood_value_, abs=1e-8)


def test_evidence_is_the_product_of_predictions():
    grid = torch.tensor([[0.3, 1.0, 0.1], [0.7, 2.0, 0.3]], dtype=F64)
    x, y = normal(3, 4, 1), normal(3, 4, seed=1)
    total = torch.zeros(3, dtype=F64)
    for n in range(4):
        parts = pfn.gp_posterior(x[:, :n], y[:, :n], x[:, n : n + 1], grid)
        total += pfn.mixture_log_prob(*parts, y[:, n : n + 1])[:, 0]
    evidence = pfn.gp_posterior(x, y, x[:, :1], grid)[0]
    torch.testing.assert_close(total, evidence.logsumexp(1) - math.log(2), **EXACT)


def test_bnn_equals_a_stack_of_linear_layers():
    theta, x = normal(pfn.bnn_size(3, 5)), normal(7, 3)
    w1, b1, w2, b2, last = theta.split([15, 5, 25, 5, 5])
    h = torch.tanh(nn.functional.linear(x, w1.view(3, 5).T, b1))
    h = torch.tanh(nn.functional.linear(h, w2.view(5, 5).T, b2))
    torch.testing.assert_close(pfn.bnn_function(theta, x, 5), h @ last / math.sqrt(5), **EXACT)
    assert theta.numel() == 55


def test_importance_sampling_finds_a_conjugate_posterior():
    # f is one N(0, 1) number, observed twice with noise 1/2: posterior N(4/5 ybar, 1/5).
    f = normal(1, 200_000, 1).expand(-1, -1, 2)
    y = torch.tensor([[0.7, 1.3]], dtype=F64)
    log_weight, ess = pfn.importance_weights(f, y, 0.5)
    weight = log_weight.exp()
    mean = (weight * f[..., 0]).sum().item()
    assert mean == pytest.approx(0.8, abs=0.01)
    assert (weight * (f[..., 0] - mean) ** 2).sum().item() == pytest.approx(0.2, abs=0.01)
    # E[w]^2 / E[w^2] in closed form: N(ybar | 0, 1 + 1/4)^2 / (N(ybar | 0, 1 + 1/8) sqrt(2) / sqrt(pi))
    top = stats.norm.pdf(1.0, 0, math.sqrt(1.25)) ** 2
    bottom = stats.norm.pdf(1.0, 0, math.sqrt(1.125)) / math.sqrt(4 * math.pi * 0.25)
    assert ess.item() / 200_000 == pytest.approx(top / bottom, rel=0.02)


def test_hmc_samples_its_density():
    scale = torch.tensor([0.5, 2.0], dtype=F64)

    def log_density(position):
        return -0.5 * ((position - 1) / scale).square().sum(-1)

    moves = dict(warmup=30, draws=200, step_size=0.4, leapfrog=8, generator=generator())
    draws, acceptance = pfn.hmc(log_density, normal(100, 2), **moves)
    assert draws.shape == (200, 100, 2) and 0.85 < acceptance < 1
    flat = draws.reshape(-1, 2)
    torch.testing.assert_close(flat.mean(0), torch.ones(2, dtype=F64), rtol=0, atol=0.06)
    torch.testing.assert_close(flat.std(0), scale, rtol=0.04, atol=0)


def test_hmc_rejects_when_the_step_is_too_long():
    start = torch.zeros(50, 1, dtype=F64)
    moves = dict(warmup=0, draws=3, step_size=50.0, leapfrog=5, generator=generator())
    draws, acceptance = pfn.hmc(lambda p: -0.5 * p.square().sum(-1), start, **moves)
    assert acceptance < 0.05 and (draws[0] == 0).double().mean() > 0.9


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "borders", [[0.0, 1.0, 2.0], [0.0, 1.0, 1.0, 2.0], [0, 2.0, 1, 3], [0, 1, 2, math.inf]]
)
def test_bad_borders(borders):
    with pytest.raises(ValueError, match="borders"):
        pfn.RiemannHead(torch.tensor(borders))


def test_bad_samples_and_quantiles(head):
    with pytest.raises(ValueError, match="2 buckets"):
        pfn.RiemannHead.from_samples(torch.arange(100.0), 2)
    with pytest.raises(ValueError, match="30 samples"):
        pfn.RiemannHead.from_samples(torch.arange(30.0), 20)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        head.quantile(normal(9), 1.5)


@pytest.mark.parametrize(
    "sizes", [dict(width=0), dict(n_layers=0), dict(width=18), dict(n_heads=0)]
)
def test_bad_network_sizes(sizes):
    with pytest.raises(ValueError, match="sizes"):
        pfn.PriorFittedNetwork(2, pfn.NormalHead(), **sizes)


def test_bad_data(head):
    net, x, y = network(head), normal(3, 9, 2), normal(3, 9, seed=1)
    for n_context in (-1, 9):
        with pytest.raises(ValueError, match=f"got {n_context}"):
            net(x, y, n_context)
    with pytest.raises(ValueError, match="expected 2 features, got 1"):
        net(x[..., :1], y, 4)
    with pytest.raises(ValueError, match="finite"):
        net(x, y.log(), 4)
    with pytest.raises(WRONG):
        net(x, y[:, :5], 4)
    with pytest.raises(WRONG):
        net(x, y[0], 4)


def test_bad_priors():
    with pytest.raises(ValueError, match="positive"):
        pfn.gp_sampler(torch.tensor([[0.3, 1.0, 0.0]]), 1, generator())
    with pytest.raises(ValueError, match="positive"):
        pfn.gp_posterior(normal(1, 2, 1), normal(1, 2), normal(1, 2, 1), -torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected 55 weights, got 54"):
        pfn.bnn_function(normal(54), normal(7, 3), 5)


@pytest.mark.parametrize(
    "bad", [dict(steps=0), dict(batch_size=0), dict(set_size=0), dict(warmup=1.0)]
)
def test_bad_fit(bad):
    net = pfn.PriorFittedNetwork(1, pfn.NormalHead(), width=4, n_layers=1, n_heads=1)
    sampler = pfn.gp_sampler(torch.tensor([[0.3, 1.0, 0.1]]), 1, generator())
    good = dict(steps=1, batch_size=1, set_size=2, lr=0.1, generator=generator())
    with pytest.raises(ValueError, match="positive"):
        pfn.fit_prior(net, sampler, **good | bad)
