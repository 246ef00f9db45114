"""Boosted networks: scikit-learn's own checks, the losses against autograd, and what holds by theorem."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from nnlib.architectures import boosted_networks as bn
from nnlib.architectures.boosted_networks import (
    BoostedNetworkClassifier,
    BoostedNetworkRegressor,
    Logistic,
    Softmax,
    Squared,
)

EXACT = dict(rtol=1e-10, atol=1e-10)
LOSSES = (Squared, Logistic, Softmax)
SMALL = dict(n_units=12, block_size=3, max_iter=30, random_state=0)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def problem(loss, rng, n=23):
    """Targets as `loss` wants them, and outputs that are not zero."""
    if loss is Softmax:
        y = torch.nn.functional.one_hot(torch.randint(4, (n,), generator=rng), 4).double()
    else:
        y = torch.randn(n, 1, dtype=torch.float64, generator=rng)
        y = y.sign() if loss is Logistic else y
    return y, torch.randn(*y.shape, dtype=torch.float64, generator=rng)


def data(kind):
    """Standardised inputs and targets, and the estimator for them."""
    if kind == "regression":
        x, y = load_diabetes(return_X_y=True)
        return scale(x), y, BoostedNetworkRegressor
    x, y = load_iris(return_X_y=True)
    if kind == "binary":
        x, y = x[50:], y[50:]
    return scale(x), y, BoostedNetworkClassifier


KINDS = ("regression", "binary", "multiclass")

# The estimators


@parametrize_with_checks(
    [
        BoostedNetworkClassifier(n_units=16, max_iter=20, learning_rate=0.5),
        BoostedNetworkRegressor(n_units=16, max_iter=20, learning_rate=0.5),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_merged_network_is_the_sum_of_its_blocks(kind, blocks):
    x, y, estimator = data(kind)
    model = estimator(**SMALL).fit(x, y)
    raw = model.constant_ + sum(
        1 / (1 + np.exp(-(x @ w[:-1] + w[-1]))) @ v[:-1] + v[-1]
        for w, v in zip(model.hidden_[:blocks], model.output_[:blocks], strict=True)
    )
    small = model.keep(blocks)
    net = small.to_mlp()
    np.testing.assert_allclose(net(torch.tensor(x)).detach(), raw, **EXACT)
    assert net[0].out_features == net[2].in_features == 3 * blocks
    staged = list(model.staged_predict(x))
    assert len(staged) == 4
    np.testing.assert_allclose(small.predict(x), staged[blocks - 1], **EXACT)
    if kind == "regression":
        np.testing.assert_allclose(small.predict(x), raw[:, 0], **EXACT)
    else:
        np.testing.assert_allclose(small.decision_function(x), raw.squeeze(), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loss_is_that_of_the_merged_network(kind):
    # Catches a lost factor 2 between F and the log-odds, which no accuracy would.
    x, y, estimator = data(kind)
    model = estimator(**SMALL).fit(x, y)
    if kind == "regression":
        found = np.mean((model.predict(x) - y) ** 2) / np.var(y) / 2
    else:
        found = -np.log(model.predict_proba(x)[np.arange(len(y)), y - y.min()]).mean()
        np.testing.assert_allclose(model.predict_proba(x).sum(1), 1, **EXACT)
    assert found == pytest.approx(model.train_loss_[-1], rel=1e-9)
    assert found < 0.8 * model.train_loss_[0]
    assert len(model.train_loss_) == 5 and len(model.steps_) == 4


def test_blocks_can_be_kept_one_by_one():
    x, y, _ = data("regression")
    model = BoostedNetworkRegressor(**SMALL).fit(x, y)
    first, rest = model.keep(1).predict(x), model.keep([1, 2, 3]).predict(x)
    np.testing.assert_allclose(first + rest - model.constant_, model.predict(x), **EXACT)
    np.testing.assert_array_equal(model.keep(range(4)).predict(x), model.predict(x))
    assert len(model.hidden_) == 4  # the whole is left as it was


def test_the_unit_of_the_target_does_not_matter():
    x, y, _ = data("regression")
    one = BoostedNetworkRegressor(**SMALL).fit(x, y)
    other = BoostedNetworkRegressor(**SMALL).fit(x, 1000 * y)
    np.testing.assert_allclose(other.predict(x), 1000 * one.predict(x), rtol=1e-6)


def test_seeds():
    x, y, _ = data("multiclass")
    one, same, other = (
        BoostedNetworkClassifier(**SMALL | {"random_state": s}).fit(x, y) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.hidden_, same.hidden_)
    assert abs(one.hidden_ - other.hidden_).max() > 0.1


def test_it_is_at_home_in_scikit_learn():
    x, y = load_wine(return_X_y=True)
    names = np.array(["barolo", "grignolino", "barbera"])[y]
    pipe = make_pipeline(StandardScaler(), BoostedNetworkClassifier(**SMALL))
    search = GridSearchCV(pipe, {"boostednetworkclassifier__learning_rate": [1e-6, 0.3]}, cv=3)
    search.fit(x, names)
    assert search.best_params_ == {"boostednetworkclassifier__learning_rate": 0.3}
    assert search.best_score_ > 0.93 and set(search.predict(x)) == set(names)
    revived = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(revived.predict(x), search.predict(x))
    assert clone(pipe).get_params()["boostednetworkclassifier__n_units"] == 12


def test_a_constant_target_stays_constant():
    x, _, _ = data("regression")
    model = BoostedNetworkRegressor(**SMALL).fit(x, np.full(len(x), 7.0))
    np.testing.assert_allclose(model.predict(x), 7.0, atol=1e-3)


def test_separable_data_leave_everything_finite():
    x = np.linspace(-1, 1, 40)[:, None]
    for y in (np.arange(40) // 20, np.arange(40) // 10):
        model = BoostedNetworkClassifier(
            n_units=200, block_size=1, learning_rate=1.0, random_state=0
        ).fit(x, y)
        assert np.isfinite(model.predict_proba(x)).all() and np.isfinite(model.steps_).all()
        assert model.score(x, y) == 1


# The losses


@pytest.mark.parametrize("loss", LOSSES)
def test_residual_and_curvature_are_derivatives(loss, rng):
    y, f = problem(loss, rng)
    f.requires_grad_()
    value = {
        Squared: lambda: (y - f).square().sum() / 2,
        Logistic: lambda: (1 + (-2 * y * f).exp()).log().sum(),
        Softmax: lambda: torch.nn.functional.cross_entropy(f, y.argmax(1), reduction="sum"),
    }[loss]()
    (gradient,) = torch.autograd.grad(value, f, create_graph=True)
    second = torch.stack(
        [torch.autograd.grad(g, f, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    )
    torch.testing.assert_close(loss.residual(y, f), -gradient, **EXACT)
    torch.testing.assert_close(loss.curvature(y, f).flatten(), second.diagonal(), **EXACT)
    assert loss.mean(y, f.detach()) == pytest.approx(value.item() / len(y), rel=1e-12)
    if loss is Logistic:
        r = loss.residual(y, f)
        torch.testing.assert_close(r * (2 * y - r), loss.curvature(y, f), **EXACT)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_constant_minimises_the_mean_loss(loss, rng):
    y, _ = problem(loss, rng, n=40)
    best = loss.constant(y)
    assert loss.residual(y, best.expand_as(y)).mean(0).abs().max() < 1e-12
    found = minimize(lambda c: loss.mean(y, torch.tensor(c).expand_as(y)), np.zeros(y.shape[1]))
    assert loss.mean(y, best.expand_as(y)) == pytest.approx(found.fun, abs=1e-8)


@pytest.mark.parametrize("loss", (Squared, Logistic))
def test_the_step_is_newtons(loss, rng):
    # minus first over second derivative of rho -> sum L(f + rho h), by finite differences
    y, f = problem(loss, rng)
    h = torch.randn(*f.shape, dtype=torch.float64, generator=rng)
    low, mid, high = (len(y) * loss.mean(y, f + e * h) for e in (-1e-4, 0, 1e-4))
    newton = (low - high) / 2e-4 / ((low - 2 * mid + high) / 1e-8)
    assert bn.newton_step(loss, y, f, h) == pytest.approx(newton, rel=1e-4)


def test_the_diagonal_step_is_at_most_twice_newtons(rng):
    for _ in range(50):
        y, f = problem(Softmax, rng, n=1)
        h = Softmax.residual(y, 3 * f)
        p = torch.softmax(3 * f, 1)
        hessian = (p * h.square()).sum() - (p * h).sum().square()
        newton = (h * Softmax.residual(y, 3 * f)).sum() / hessian
        assert 0 < bn.newton_step(Softmax, y, 3 * f, h) <= 2 * newton * (1 + 1e-9)


def test_the_step_is_zero_where_nothing_is_left():
    y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert bn.newton_step(Logistic, y, 1e4 * y, y) == 0
    assert bn.newton_step(Squared, y, y, 0 * y) == 0


# A block


def test_the_gradient_of_a_block_leads_to_a_stationary_point(rng):
    # The penalised loss, written again with autograd, is stationary where the fit ends.
    x = torch.randn(30, 3, dtype=torch.float64, generator=rng)
    r = torch.sin(x[:, :2])
    w, v, iterations = bn.fit_block(x, r, 2, 5000, 1e-2, rng)
    w, v = w.clone().requires_grad_(), v.clone().requires_grad_()
    h = torch.sigmoid(x @ w[:-1] + w[-1]) @ v[:-1] + v[-1]
    penalty = 1e-2 * (w[:-1].square().sum() + v[:-1].square().sum())
    loss = ((r - h).square().sum() + penalty) / (2 * len(x))
    gradients = torch.autograd.grad(loss, (w, v))
    assert max(g.abs().max() for g in gradients) < 2e-4 and loss < 0.2 * r.square().mean()
    assert 0 < iterations < 5000


def test_a_block_is_scikit_learns_regressor(rng):
    # The same convex-free problem from many starts: the best minimum must agree.
    x, y, _ = data("regression")
    y = scale(y)
    theirs, ours = [], []
    for seed in range(6):
        peer = MLPRegressor(
            hidden_layer_sizes=(2,), activation="logistic", solver="lbfgs", alpha=1.0,
            max_iter=2000, max_fun=10**6, tol=1e-7, random_state=seed,
        ).fit(x, y)  # fmt: skip
        theirs.append(peer.loss_)
        target = torch.tensor(y)[:, None]
        w, v, _ = bn.fit_block(torch.tensor(x), target, 2, 2000, 1.0, rng)
        h = torch.sigmoid(torch.tensor(x) @ w[:-1] + w[-1]) @ v[:-1] + v[-1]
        penalty = w[:-1].square().sum() + v[:-1].square().sum()
        ours.append(float((h - target).square().sum() + penalty) / (2 * len(x)))
    assert min(ours) == pytest.approx(min(theirs), rel=1e-3)


def test_one_block_is_a_small_network_on_the_centred_target():
    x, y, _ = data("regression")
    model = BoostedNetworkRegressor(3, 3, 1.0, subsample=1.0, max_iter=5000, random_state=0).fit(
        x, y
    )
    assert model.steps_[0] == pytest.approx(1, abs=1e-3)  # a fit with intercept is its own search
    assert model.score(x, y) > Ridge().fit(x, y).score(x, y)  # three sigmoids hold the linear fit


# Theorems and limits


@pytest.mark.parametrize("subsample", [0.3, 1.0])
@pytest.mark.parametrize("rate", [0.1, 1.0, 1.9])
def test_the_squared_loss_never_rises(subsample, rate):
    x, y, _ = data("regression")
    model = BoostedNetworkRegressor(
        40, 2, rate, subsample=subsample, max_iter=40, random_state=0
    ).fit(x, y)
    assert (np.diff(model.train_loss_) <= 1e-15).all()


def test_a_tiny_rate_leaves_the_constant():
    x, y, _ = data("regression")
    model = BoostedNetworkRegressor(**SMALL | {"learning_rate": 1e-12}).fit(x, y)
    np.testing.assert_allclose(model.predict(x), y.mean(), rtol=1e-9)


def test_a_boosted_head_on_a_frozen_body_is_one_network(rng):
    x, y, _ = data("multiclass")
    body = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU()).double()
    features = body(torch.tensor(x)).detach().numpy()
    head = BoostedNetworkClassifier(**SMALL).fit(features, y)
    whole = torch.nn.Sequential(body, head.to_mlp())
    np.testing.assert_allclose(
        whole(torch.tensor(x)).detach(), head.decision_function(features), **EXACT
    )


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_the_official_program_agrees_on_wine():
    gbnn = pytest.importorskip("gbnn")
    x, y = load_wine(return_X_y=True)
    x, y = scale(x), (y == 1).astype(float)
    theirs = gbnn.GNEGNERegressor(total_nn=20, num_nn_step=2, eta=0.5, random_state=0)
    theirs.fit(x, y)
    ours = BoostedNetworkRegressor(20, 2, 0.5, random_state=0).fit(x, y)
    agreement = np.mean((theirs.predict(x) > 0.5) == (ours.predict(x) > 0.5))
    assert agreement > 0.97


# Wrong calls


@pytest.mark.parametrize(
    "bad",
    [
        dict(n_units=0), dict(n_units=2.5), dict(block_size=0), dict(n_units=3, block_size=4),
        dict(max_iter=0), dict(learning_rate=0.0), dict(learning_rate=float("nan")),
        dict(subsample=0.0), dict(subsample=1.1), dict(l2=-1.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ("regression", "binary"))
def test_bad_parameters(kind, bad):
    x, y, estimator = data(kind)
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        estimator(**bad).fit(x, y)


def test_bad_data():
    x, y, _ = data("binary")
    with pytest.raises(ValueError, match="one class"):
        BoostedNetworkClassifier().fit(x, np.zeros(len(x)))
    with pytest.raises(ValueError, match="inconsistent"):
        BoostedNetworkClassifier().fit(x, y[:-1])
    with pytest.raises(ValueError, match="continuous"):
        BoostedNetworkClassifier().fit(x, x[:, 0])
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            BoostedNetworkRegressor().fit(np.where(x > 2, broken, x), y)


@pytest.mark.parametrize("blocks", [0, -1, 5, [], [4], [-1]])
def test_blocks_that_do_not_exist(blocks):
    x, y, _ = data("binary")
    with pytest.raises(ValueError, match="4 blocks"):
        BoostedNetworkClassifier(**SMALL).fit(x, y).keep(blocks)


def test_nothing_can_be_asked_before_the_fit():
    for question in ("predict", "keep", "to_mlp"):
        with pytest.raises(ValueError, match="not fitted"):
            argument = {"predict": [np.zeros((2, 2))], "keep": [1], "to_mlp": []}[question]
            getattr(BoostedNetworkRegressor(), question)(*argument)


def test_wrong_shapes_are_refused(rng):
    y = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises((ValueError, TypeError)):
        bn.newton_step(Squared, y, y[:3], y)
    with pytest.raises((ValueError, TypeError)):
        bn.fit_block(y, y[:3], 1, 5, 0.0, rng)
