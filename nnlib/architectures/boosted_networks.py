r"""Gradient-boosted networks: a hidden layer is trained a few units at a time, and cut to any length.

`BoostedNetworkRegressor` and `BoostedNetworkClassifier` are scikit-learn estimators. Each step fits
a block of :math:`J` sigmoid units to the negative gradient of the loss and freezes it; the result is
one network with one hidden layer, `to_mlp`, whose last units can be switched off, `keep`.
`boost` is the algorithm without scikit-learn, `Squared`, `Logistic` and `Softmax` its losses,
`newton_step` and `fit_block` the two halves of a step.

Source: Emami, Martínez-Muñoz (2023), "Sequential Training of Neural Networks with Gradient
Boosting", IEEE Access 11, arXiv:1909.12098. Where the paper and its released program leave room, the
docstrings say what is done here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Generator, Tensor, nn

Outputs = Float[Tensor, "n k"]

# Losses of raw outputs F: the best constant, the mean, minus the gradient, the diagonal of the Hessian


class Squared:
    r""":math:`L=\frac12(y-F)^2` for one real target."""

    @staticmethod
    def constant(y: Outputs) -> Float[Tensor, " k"]:
        """The mean."""
        return y.mean(0)

    @staticmethod
    def mean(y: Outputs, f: Outputs) -> float:
        """The loss, averaged over samples."""
        return float((y - f).square().sum(1).mean() / 2)

    @staticmethod
    def residual(y: Outputs, f: Outputs) -> Outputs:
        """:math:`y-F`."""
        return y - f

    @staticmethod
    def curvature(y: Outputs, f: Outputs) -> Outputs:
        """One."""
        return torch.ones_like(f)


class Logistic:
    r""":math:`L=\log(1+e^{-2yF})` for :math:`y=\pm1`, so that :math:`P(y=1)=1/(1+e^{-2F})`."""

    @staticmethod
    def constant(y: Outputs) -> Float[Tensor, " k"]:
        r""":math:`\frac12\log\frac{1+\bar y}{1-\bar y}`; both signs must occur."""
        return torch.atanh(y.mean(0))

    @staticmethod
    def mean(y: Outputs, f: Outputs) -> float:
        """The loss, averaged over samples."""
        return float(nn.functional.softplus(-2 * y * f).sum(1).mean())

    @staticmethod
    def residual(y: Outputs, f: Outputs) -> Outputs:
        r""":math:`2y/(1+e^{2yF})`."""
        return 2 * y * torch.sigmoid(-2 * y * f)

    @staticmethod
    def curvature(y: Outputs, f: Outputs) -> Outputs:
        r""":math:`r(2y-r)=4p(1-p)`."""
        return 4 * torch.sigmoid(2 * f) * torch.sigmoid(-2 * f)


class Softmax:
    r"""Cross-entropy :math:`L=-\log p_y` with :math:`p=\mathrm{softmax}(F)`; `y` is one-hot."""

    @staticmethod
    def constant(y: Outputs) -> Float[Tensor, " k"]:
        """Logarithms of the class frequencies, up to a common constant; the released program takes 0."""
        log_prior = y.mean(0).log()
        return log_prior - log_prior.mean()

    @staticmethod
    def mean(y: Outputs, f: Outputs) -> float:
        """The loss, averaged over samples."""
        return float((torch.logsumexp(f, 1) - (y * f).sum(1)).mean())

    @staticmethod
    def residual(y: Outputs, f: Outputs) -> Outputs:
        """:math:`y-p`."""
        return y - torch.softmax(f, 1)

    @staticmethod
    def curvature(y: Outputs, f: Outputs) -> Outputs:
        """:math:`p(1-p)`; the Hessian is diag(p) - p p^T, its off-diagonal is dropped."""
        p = torch.softmax(f, 1)
        return p * (1 - p)


Loss = type[Squared] | type[Logistic] | type[Softmax]


def newton_step(loss: Loss, y: Outputs, f: Outputs, h: Outputs) -> float:
    r"""Length :math:`\rho` of the step from `f` along `h`.

    .. math:: \rho=\frac{\sum_{ik}h_{ik}\,r_{ik}}{\sum_{ik}h_{ik}^2\,L''_{ik}}

    and 0 where the denominator vanishes because every sample is fitted. For the squared loss this
    is the exact line search; the released program takes 1 there.

    Source: the line search of the paper's boosting step.
    """
    denominator = float((h.square() * loss.curvature(y, f)).sum())
    if denominator < torch.finfo(h.dtype).tiny:
        return 0.0
    return float((h * loss.residual(y, f)).sum()) / denominator


# One block


def fit_block(
    x: Float[Tensor, "n d"], r: Outputs, block_size: int, max_iter: int, l2: float,
    generator: Generator,
) -> tuple[Float[Tensor, "d+1 j"], Float[Tensor, "j+1 k"], int]:  # fmt: skip
    r"""Least-squares fit of :math:`h(x)=V^\top\sigma(W^\top x+b)+c` to `r` by L-BFGS.

    Minimises :math:`\frac1{2n}\sum\|r-h\|^2+\frac\lambda{2n}(\|W\|^2+\|V\|^2)` over all samples, units
    and outputs at once, biases not penalised, from Glorot's uniform distribution with bound
    :math:`\sqrt{2/(\text{in}+\text{out})}` for weights and biases.

    Returns
    -------
    (W, V, iterations) : the last rows of `W` and `V` are the biases `b` and `c`.

    Source: the block of the paper's boosting step, with scikit-learn's penalty and initialisation.
    """
    # NumPy: at products as narrow as these its BLAS is several times faster than torch's.
    (n, d), k, j = x.shape, r.shape[1], block_size
    x1 = np.ones((d + 1, n))  # features first: a unit is a row
    x1[:d] = x.T.cpu().numpy()
    h1 = np.ones((j + 1, n))
    target = np.ascontiguousarray(r.T.cpu().numpy(), dtype=float)
    cut = j * (d + 1)
    bound = np.repeat([math.sqrt(2 / (d + j)), math.sqrt(2 / (j + k))], [cut, k * (j + 1)])
    start = torch.rand(len(bound), generator=generator, dtype=torch.float64).numpy()
    penalty = np.full(len(bound), l2)
    penalty[:cut].reshape(j, d + 1)[:, d] = penalty[cut:].reshape(k, j + 1)[:, j] = 0

    def loss_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, v = theta[:cut].reshape(j, d + 1), theta[cut:].reshape(k, j + 1)
        h = np.tanh(w @ x1 / 2)
        h1[:j] = (h + 1) / 2  # the sigmoid, without overflow
        error = v @ h1 - target
        decay = penalty * theta
        value = np.vdot(error, error) + decay @ theta
        to_hidden = (v[:, :j].T @ error) * (1 - h * h) / 4
        gradient = np.concatenate([(to_hidden @ x1.T).ravel(), (error @ h1.T).ravel()])
        return value / (2 * n), (gradient + decay) / n

    found = minimize(
        loss_and_gradient, (2 * start - 1) * bound, jac=True, method="L-BFGS-B",
        options={"maxiter": max_iter, "gtol": 0.0},
    )  # fmt: skip
    theta = torch.from_numpy(found.x).to(x)
    return theta[:cut].view(j, d + 1).T, theta[cut:].view(k, j + 1).T, int(found.nit)


class Boosted(NamedTuple):
    """What `boost` returns: start, blocks with their steps multiplied in, and the history."""

    constant: Float[Tensor, " k"]
    hidden: Float[Tensor, "t d+1 j"]
    output: Float[Tensor, "t j+1 k"]
    steps: list[float]
    losses: list[float]
    iterations: int


def boost(
    x: Float[Tensor, "n d"], y: Outputs, loss: Loss, blocks: int, block_size: int,
    learning_rate: float, subsample: float, max_iter: int, l2: float, generator: Generator,
) -> Boosted:  # fmt: skip
    r"""The paper's algorithm: :math:`F_t=F_{t-1}+\nu\rho_th_t` from the best constant :math:`F_0`.

    Each :math:`h_t` is fitted to the residual on a share `subsample` of the rows; step and losses
    are those of all rows. `losses` has an entry before the first block and one after each.

    Source: the paper's boosting procedure; parameters as `BoostedNetworkRegressor`.
    """
    constant = loss.constant(y)
    f, rows = constant.expand_as(y), max(1, int(subsample * len(x)))
    hidden, output, steps, losses, iterations = [], [], [], [loss.mean(y, f)], 0
    for _ in range(blocks):
        r = loss.residual(y, f)
        some = torch.randperm(len(x), generator=generator)[:rows]
        w, v, count = fit_block(x[some], r[some], block_size, max_iter, l2, generator)
        h = torch.sigmoid(x @ w[:-1] + w[-1]) @ v[:-1] + v[-1]
        step = learning_rate * newton_step(loss, y, f, h)
        f = f + step * h
        hidden.append(w)
        output.append(step * v)
        steps.append(step)
        losses.append(loss.mean(y, f))
        iterations += count
    return Boosted(constant, torch.stack(hidden), torch.stack(output), steps, losses, iterations)


# The estimators


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return torch.sigmoid(torch.from_numpy(z)).numpy()


class _BoostedNetwork(BaseEstimator):
    """What regressor and classifier share."""

    def __init__(
        self, n_units=200, block_size=4, learning_rate=0.1, subsample=0.5, max_iter=200, l2=1e-4,
        random_state=None,
    ):  # fmt: skip
        self.n_units = n_units
        self.block_size = block_size
        self.learning_rate = learning_rate
        self.subsample = subsample
        self.max_iter = max_iter
        self.l2 = l2
        self.random_state = random_state

    def _check_parameters(self) -> None:
        for name in ("n_units", "block_size", "max_iter"):
            if not isinstance(value := getattr(self, name), Integral) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_units < self.block_size:
            raise ValueError(f"n_units={self.n_units} holds no block of {self.block_size} units")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if not 0 < self.subsample <= 1:
            raise ValueError(f"subsample must lie in (0, 1], got {self.subsample!r}")
        if not 0 <= self.l2 < math.inf:
            raise ValueError(f"l2 must not be negative, got {self.l2!r}")

    def _boost(self, x: Float[Tensor, "n d"], y: Outputs, loss: Loss, scale: float) -> None:
        """Run `boost`; `scale` multiplies the network's output afterwards."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        found = boost(
            x, y, loss, self.n_units // self.block_size, self.block_size, self.learning_rate,
            self.subsample, self.max_iter, self.l2, Generator().manual_seed(int(seed)),
        )  # fmt: skip
        self.constant_ = (scale * found.constant).numpy()
        self.hidden_, self.output_ = found.hidden.numpy(), (scale * found.output).numpy()
        self.steps_, self.train_loss_ = found.steps, found.losses
        self.n_iter_ = found.iterations

    def _merged(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hidden weights (d+1, units), output weights (units, k) and bias (k,) of one network."""
        v = np.concatenate(list(self.output_[:, :-1]))
        return np.concatenate(list(self.hidden_), 1), v, self.constant_ + self.output_[:, -1].sum(0)

    def _checked(self, X) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False)

    def _raw(self, X) -> np.ndarray:
        """Outputs (n, k) of the merged network."""
        X, (w, v, c) = self._checked(X), self._merged()
        return _sigmoid(X @ w[:-1] + w[-1]) @ v + c

    def predict(self, X):
        """Targets or labels (n,)."""
        return self._predicted(self._raw(X))

    def staged_predict(self, X):
        """Targets or labels (n,) of the network with its first 1, 2, ... blocks."""
        X, f = self._checked(X), self.constant_
        for w, v in zip(self.hidden_, self.output_, strict=True):
            f = f + _sigmoid(X @ w[:-1] + w[-1]) @ v[:-1] + v[-1]
            yield self._predicted(f)

    def keep(self, blocks: int | Sequence[int]):
        """A copy in which only some blocks are on.

        Parameters
        ----------
        blocks : how many of the first ones, at least 1; or the indices of those that stay. Their
            output biases go with them; `steps_` and `train_loss_` stay those of the whole.

        Raises
        ------
        ValueError : no block, or one that does not exist.
        """
        check_is_fitted(self)
        total = len(self.hidden_)
        chosen = list(range(blocks)) if isinstance(blocks, Integral) else [int(b) for b in blocks]
        if not chosen or min(chosen) < 0 or max(chosen) >= total:
            raise ValueError(f"blocks must name some of the {total} blocks, got {blocks!r}")
        small = copy.copy(self)
        small.hidden_, small.output_ = self.hidden_[chosen], self.output_[chosen]
        return small

    def to_mlp(self) -> nn.Sequential:
        """The merged network, ``Linear, Sigmoid, Linear`` in float64.

        It returns the target (regressor), the log-odds of the second class (two classes), or the
        logits (more).
        """
        check_is_fitted(self)
        w, v, c = (torch.from_numpy(a) for a in self._merged())
        net = nn.Sequential(
            nn.utils.skip_init(nn.Linear, len(w) - 1, len(v), dtype=w.dtype),
            nn.Sigmoid(),
            nn.utils.skip_init(nn.Linear, *v.shape, dtype=v.dtype),
        )
        net.load_state_dict({"0.weight": w[:-1].T, "0.bias": w[-1], "2.weight": v.T, "2.bias": c})
        return net


class BoostedNetworkRegressor(RegressorMixin, _BoostedNetwork):
    """A one-hidden-layer network for one real target, trained by gradient boosting on squared loss.

    The target is divided by its standard deviation while training, so that its unit does not
    matter. The inputs are not scaled; put a ``StandardScaler`` before.

    Parameters
    ----------
    n_units : hidden units in all; `n_units` // `block_size` blocks are trained.
    block_size : units per block, the paper's J; the released program takes 1 if nothing is said.
    learning_rate : shrinkage of each step, the paper's nu; the released program takes 1.
    subsample : share of the rows, drawn without replacement, that each block is fitted to.
    max_iter : L-BFGS iterations per block.
    l2 : weight decay within a block.
    random_state : an integer, a ``RandomState``, or None for NumPy's global one.

    Attributes
    ----------
    train_loss_ : mean loss on all training rows before the first block and after each (of the
        scaled target).
    steps_ : learning rate times Newton step, of each block.
    constant_, hidden_, output_ : the start (k,), hidden weights of the blocks (blocks, d+1, j), and
        output weights (blocks, j+1, k); biases are the last rows.
    n_iter_ : L-BFGS iterations of all blocks.
    """

    def fit(self, X, y):
        """Fit to `X` (n, d) and `y` (n,).

        Raises
        ------
        ValueError : a parameter out of its range; lengths that differ; values that are not finite.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        scale = float(np.std(y)) or 1.0
        target = torch.from_numpy(np.asarray(y, dtype=np.float64) / scale)
        self._boost(torch.tensor(X), target[:, None], Squared, scale)
        return self

    def _predicted(self, f: np.ndarray) -> np.ndarray:
        return f[:, 0]


class BoostedNetworkClassifier(ClassifierMixin, _BoostedNetwork):
    """A one-hidden-layer network for two or more classes, trained by gradient boosting on log loss.

    Parameters and attributes as for `BoostedNetworkRegressor`; and `classes_`, sorted.
    """

    def fit(self, X, y):
        """Fit to `X` (n, d) and labels `y` (n,) of at least two classes.

        Raises
        ------
        ValueError : as for the regressor; a single class.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        codes = torch.tensor(codes)
        if len(self.classes_) < 2:
            raise ValueError(f"two classes are needed, y holds one class: {self.classes_[0]!r}")
        if len(self.classes_) == 2:
            target = (2.0 * codes - 1).double()[:, None]
            self._boost(torch.tensor(X), target, Logistic, 2.0)  # 2 F is the log-odds
        else:
            self._boost(torch.tensor(X), nn.functional.one_hot(codes).double(), Softmax, 1.0)
        return self

    def decision_function(self, X):
        """Log-odds of the second class (n,), or logits (n, k)."""
        f = self._raw(X)
        return f[:, 0] if f.shape[1] == 1 else f

    def predict_proba(self, X):
        """Probabilities (n, classes)."""
        f = torch.from_numpy(self._raw(X))
        f = torch.cat([torch.zeros_like(f), f], 1) if f.shape[1] == 1 else f
        return torch.softmax(f, 1).numpy()

    def _predicted(self, f: np.ndarray) -> np.ndarray:
        return self.classes_[f.argmax(1) if f.shape[1] > 1 else (f[:, 0] > 0).astype(int)]
