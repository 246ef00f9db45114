r"""Learning in deep linear networks: exact solutions, and weights that make depth harmless.

A network has ``n_layers`` (:math:`N_l`) layers of *units*, input and output included, and
therefore :math:`L = N_l - 1` weight *matrices*. Arguments called `n_layers` count units'
layers, `matrices` counts matrices.

Source: Saxe, McClelland, Ganguli (2014), "Exact solutions to the nonlinear dynamics of
learning in deep linear neural networks", arXiv:1312.6120; equation numbers below are the
paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from jaxtyping import Float
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Generator, Tensor, nn

Matrices = Sequence[Float[Tensor, "... _ _"]]


def hierarchical_tree_data(
    levels: int = 5, features: int = 1000, flip: float = 0.1, generator: Generator | None = None
) -> Float[Tensor, "features items"]:
    r"""Features of the leaves of a binary tree, whose children flip some signs (Section 2).

    Parameters
    ----------
    levels : branchings below the root; there are ``2**levels`` items.
    flip : probability that a child's feature differs from its parent's.

    Returns
    -------
    Targets of one-hot inputs, entries :math:`\pm 1`: with them :math:`\Sigma^{11} = I` and
    this matrix is :math:`\Sigma^{31}`.

    Raises
    ------
    ValueError : `levels` is negative, `features` is below 1, or `flip` is no probability.
    """
    if levels < 0 or features < 1 or not 0 <= flip <= 1:
        raise ValueError(
            f"need levels >= 0, features >= 1, 0 <= flip <= 1; got {levels}, {features}, {flip}"
        )

    def signs(minus: float, items: int) -> Tensor:
        return 1 - 2 * (torch.rand(features, items, generator=generator) < minus).double()

    y = signs(0.5, 1)
    for level in range(1, levels + 1):
        y = y.repeat_interleave(2, dim=1) * signs(flip, 2**level)
    return y


def sigmoid_mode(
    t: Float[Tensor, "*shape"], s: float | Tensor, u0: float, tau: float
) -> Float[Tensor, "*out"]:
    r"""Strength :math:`u(t)` of a mode of a network with one hidden layer, equation (12).

    Parameters
    ----------
    t : times, in iterations if `tau` is one over the learning rate; broadcasts against `s`.
    s : singular value of :math:`\Sigma^{31}`; u0 : strength at time 0; both positive.
    """
    _positive(u0=u0, tau=tau, s=float(torch.as_tensor(s).min()))
    return s / (1 + (s / u0 - 1) * torch.exp(-2 * s * t / tau))  # (12), divided by exp(2 s t / tau)


def half_time(s: float | Tensor, u0: float, tau: float) -> float | Tensor:
    r"""Time at which a mode is half learned, :math:`\frac{\tau}{2s}\ln\frac{s-u_0}{u_0}`.

    It is (11) with ``uf = s / 2``.

    Raises
    ------
    ValueError : `u0` is not positive, or at least half of the smallest `s`.
    """
    s_ = torch.as_tensor(s, dtype=torch.float64)
    _positive(u0=u0, tau=tau)
    if u0 >= s_.min() / 2:
        raise ValueError(f"u0 must be below s / 2, got u0 = {u0} and s = {float(s_.min())}")
    time = tau / (2 * s_) * torch.log((s_ - u0) / u0)
    return time if isinstance(s, Tensor) else time.item()


def learning_time(u0: float, uf: float, s: float, tau: float, n_layers: int | float = 3) -> float:
    r"""Time of a balanced mode from `u0` to `uf`: (11), (17), or the integral of (15).

    Parameters
    ----------
    n_layers : layers of units, at least 2. For ``math.inf`` the result is the limit of
        :math:`N_l t`, that is the time at a learning rate divided by the depth.

    Raises
    ------
    ValueError : a value is not positive, `n_layers` is below 2, or `s` does not lie beyond
        `uf`.
    """
    _positive(u0=u0, uf=uf, s=s, tau=tau)
    if n_layers < 2:
        raise ValueError(f"n_layers counts layers of units and must be at least 2, got {n_layers}")
    if not (u0 <= uf < s or s < uf <= u0):
        raise ValueError(
            f"a mode moves from u0 towards s without reaching it; got u0={u0}, uf={uf}, s={s}"
        )
    log_ratio = math.log(uf * (s - u0) / (u0 * (s - uf)))
    if n_layers == 3:
        return tau / (2 * s) * log_ratio  # (11)
    if n_layers == math.inf:
        return tau * (log_ratio / s**2 + 1 / (s * u0) - 1 / (s * uf))  # (17) times N_l
    matrices = n_layers - 1

    def pace(v: float) -> float:  # (15) with v = log u: dt/dv = tau u^(2/L - 1) / (L (s - u))
        return tau * math.exp((2 / matrices - 1) * v) / (matrices * (s - math.exp(v)))

    ends = [math.log(u0), math.log((u0 + 9 * uf) / 10), math.log(uf)]  # the pole at s is near uf
    return sum(quad(pace, a, b, limit=500)[0] for a, b in pairwise(ends))


def deep_mode_ode(
    t: Float[Tensor, " times"], s: float, u0: float, tau: float, n_layers: int
) -> Float[Tensor, " times"]:
    r"""Strength of a balanced mode of a deep network: (15) by Runge-Kutta in :math:`\log u`.

    Parameters
    ----------
    t : increasing times, the first is where the mode has strength `u0`; one step between
        neighbours.
    """
    _positive(u0=u0, s=s, tau=tau)
    if n_layers < 2:
        raise ValueError(f"n_layers counts layers of units and must be at least 2, got {n_layers}")
    L = n_layers - 1

    def f(v: float) -> float:  # d(log u)/dt
        return L / tau * math.exp((1 - 2 / L) * v) * (s - math.exp(v))

    v = [math.log(u0)]
    for h in t.diff().tolist():
        k1 = f(v[-1])
        k2 = f(v[-1] + h / 2 * k1)
        k3 = f(v[-1] + h / 2 * k2)
        k4 = f(v[-1] + h * k3)
        v.append(v[-1] + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return torch.tensor(v, dtype=t.dtype, device=t.device).exp()


def haar_orthogonal(
    n: int, m: int | None = None, gain: float = 1.0, generator: Generator | None = None
) -> Float[Tensor, "n m"]:
    """Random (semi-)orthogonal matrix times `gain`, uniform over all (Haar measure).

    QR of a Gaussian matrix, with the signs of R's diagonal moved to Q; without them the law
    is not uniform.

    Raises
    ------
    ValueError : a side below 1.
    """
    m = n if m is None else m
    if min(n, m) < 1:
        raise ValueError(f"an orthogonal matrix needs sides of at least 1, got {n} x {m}")
    q, r = torch.linalg.qr(
        torch.randn(max(n, m), min(n, m), dtype=torch.float64, generator=generator)
    )
    q = gain * q * r.diagonal().sign()
    return q if n >= m else q.T.contiguous()


def scaled_gaussian(n: int, m: int, generator: Generator | None = None) -> Float[Tensor, "n m"]:
    """Gaussian matrix with standard deviation 1 / sqrt(m): it keeps lengths on average."""
    if min(n, m) < 1:
        raise ValueError(f"a weight matrix needs sides of at least 1, got {n} x {m}")
    return torch.randn(n, m, dtype=torch.float64, generator=generator) / math.sqrt(m)


def decoupled_init(
    sigma31: Float[Tensor, "out in"],
    hidden: Sequence[int],
    u0: float,
    generator: Generator | None = None,
) -> list[Float[Tensor, "_ _"]]:
    r"""Balanced weights without cross-talk between modes (Section 3).

    They are :math:`W^l(0) = u_0^{1/L} R_{l+1} R_l^T`.
    The :math:`R_l` are random frames of the hidden layers; :math:`R_1 = V` and
    :math:`R_{N_l} = U` come from :math:`\Sigma^{31} = U S V^T`. The product of all matrices
    is :math:`u_0 U V^T`.

    Raises
    ------
    ValueError : `u0` is not positive.
    """
    _positive(u0=u0)
    u, _, vt = torch.linalg.svd(sigma31, full_matrices=False)
    r = min(*sigma31.shape, *hidden)
    frames = [
        vt[:r].T,
        *(haar_orthogonal(n, r, generator=generator).to(sigma31) for n in hidden),
        u[:, :r],
    ]
    a = u0 ** (1 / (len(frames) - 1))
    return [a * after @ before.T for before, after in pairwise(frames)]


class DeepLinear(nn.Module):
    """The network ``x -> W_L ... W_1 x`` for rows `x`; `weights` from the input's side."""

    def __init__(self, weights: Matrices):
        super().__init__()
        _chain(weights)
        self.weights = nn.ParameterList(nn.Parameter(w.clone()) for w in weights)

    def forward(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        for w in self.weights:
            x = x @ w.T
        return x

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the network computes."""
        return product(list(self.weights))


def product(weights: Matrices) -> Float[Tensor, "... out in"]:
    """``W_L ... W_1`` for weights from the input's side; leading dimensions are batches."""
    _chain(weights)
    total = weights[-1]
    for w in reversed(weights[:-1]):
        total = total @ w
    return total


def descent(
    weights: Matrices, sigma31: Tensor, sigma11: Tensor, lr: float | Tensor
) -> Iterator[tuple]:
    """Gradient descent without end; yields (weights, product) before each update.

    All products keep at most `out` rows. Weights are updated in place: copy those to keep. The
    inputs are those of `gd_correlations`, unchecked.
    """
    weights = [w.clone() for w in weights]
    while True:
        above = [weights[-1]]  # W_L ... W_{l+1} for l = L - 1, ..., 0
        for w in reversed(weights[:-1]):
            above.append(above[-1] @ w)
        total = above.pop() if above[1:] else weights[0].clone()
        yield weights, total
        error = sigma31 - total @ sigma11  # times (W_{l-1} ... W_1)^T, for l = 1, 2, ...
        for w in weights[:-1]:
            step = lr * (above.pop().mT @ error)  # (13)
            error = error @ w.mT
            w += step
        weights[-1] += lr * error


def gd_correlations(
    weights: Matrices,
    sigma31: Float[Tensor, "out in"],
    sigma11: Float[Tensor, "in in"],
    lr: float,
    steps: int,
    record: Callable[[Float[Tensor, "out in"]], Any] | None = None,
) -> tuple[list[Float[Tensor, "... _ _"]], list[Any]]:
    r"""Batch gradient descent (13) from the correlations alone.

    The loss is :math:`\frac12\sum_\mu\|y^\mu-\hat y^\mu\|^2`.

    Parameters
    ----------
    weights : L matrices from the input's side; leading dimensions are independent networks.
    sigma31, sigma11 : :math:`\sum_\mu y^\mu x^{\mu T}` and :math:`\sum_\mu x^\mu x^{\mu
        T}`. Divide both by the number of examples to descend on the mean instead.
    lr : learning rate :math:`\lambda = 1/\tau`.
    record : called with the product of the matrices before each update and after the last.

    Returns
    -------
    (weights, records) : the trained matrices, and the ``steps + 1`` values that `record`
        returned.

    Raises
    ------
    ValueError : no matrix, shapes that do not fit, or an asymmetric `sigma11`.
    """
    _correlations(weights, sigma31, sigma11)
    records = []
    for trained, total in islice(descent(weights, sigma31, sigma11, lr), steps + 1):  # noqa: B007
        if record:
            records.append(record(total))
    return trained, records


def crossing_time(curves: Float[Tensor, "steps ..."], level: float | Tensor) -> Tensor:
    """First time at which each curve is at `level` or above, interpolated; nan if it never is."""
    above = curves >= level
    after = above.double().argmax(0, keepdim=True)
    before = (after - 1).clamp(min=0)
    low, high = curves.gather(0, before)[0], curves.gather(0, after)[0]
    time = torch.where(after == 0, 0.0, before + (level - low) / (high - low))[0]
    return torch.where(above.any(0), time, math.nan)


def race(
    unexplained: Iterator[Float[Tensor, " rates"]],
    rates: Tensor,
    level: float,
    cap: int,
    hold: int = 20,
) -> tuple[int, float]:
    """Iterations to learn with the best of several learning rates that descend side by side.

    A rate has learned at the first iteration from which at most `level` is unexplained, and
    stays so for `hold` further iterations: a jump across the target does not count. No rate
    is skipped; the race ends when the first has learned.

    Parameters
    ----------
    unexplained : yields, before each update, the share of the error that is left at each
        rate; nan if it diverged.

    Returns
    -------
    (iterations, rate) : ``(cap, nan)`` if no rate learns within `cap` iterations.
    """
    since = torch.full((len(rates),), cap, device=rates.device)
    for step, share in enumerate(islice(unexplained, cap + hold)):
        since = torch.where(share <= level, since.clamp(max=step), cap)  # nan <= level is False
        first, winner = since.min(0)
        if step - first >= hold:
            return int(first), rates[winner].item()
    return cap, math.nan


def fastest_rate(
    weights: Matrices,
    sigma31: Float[Tensor, "out in"],
    sigma11: Float[Tensor, "in in"],
    rates: Float[Tensor, " rates"],
    level: float = 0.05,
    cap: int = 900,
) -> tuple[int, float]:
    """Iterations to learn with the best learning rate (Figures 4 and 6A).

    It is a `race` in which all rates start from the same `weights`. The unexplained share
    is 0 at the best linear map and 1 at the zero map, whatever the weights start from.

    Raises
    ------
    ValueError : as `gd_correlations`; or a rate that is not positive.
    """
    _correlations(weights, sigma31, sigma11)
    _positive(rates=rates.min().item(), level=level)
    best = sigma31 @ torch.linalg.pinv(sigma11, rtol=1e-6, hermitian=True)
    explainable = (best @ sigma11 * best).sum()
    stacked = [w.expand(len(rates), *w.shape) for w in weights]
    runs = descent(stacked, sigma31, sigma11, rates.to(sigma31)[:, None, None])
    off = (total - best for _, total in runs)
    return race(
        (((d @ sigma11) * d).sum((-2, -1)) / explainable for d in off),
        rates.to(sigma31),
        level,
        cap,
    )


def greedy_pretrain(
    sigma11: Float[Tensor, "n n"],
    hidden: Sequence[int],
    lr: float = 0.3,
    tol: float = 0.03,
    max_steps: int = 10_000,
    generator: Generator | None = None,
) -> tuple[list[Float[Tensor, "_ _"]], list[int]]:
    """Train one linear autoencoder per hidden layer, on the layer below (Section 3).

    Each starts from Gaussian weights of standard deviation 0.1 / sqrt(n). It descends until
    the Frobenius norm of the correlations that it misses is below `tol` times the top
    eigenvalue, so that no large direction is left behind: a direction that one layer
    shrinks the next one would learn later still.

    Returns
    -------
    (weights, steps) : one encoder per hidden layer, and the gradient steps that each took.

    Raises
    ------
    ValueError : `sigma11` is not symmetric, or an autoencoder does not reach `tol` (a
        hidden layer too small for it).
    """
    _symmetric(sigma11)
    weights, steps, c = [], [], sigma11
    for width in hidden:
        c = (
            c / torch.linalg.eigvalsh(c)[-1]
        )  # the unit of time: `lr` is relative to the top eigenvalue
        n, step = len(c), 0
        a = 0.1 * scaled_gaussian(width, n, generator).to(c)
        b = 0.1 * scaled_gaussian(width, n, generator).to(c).T
        while (error := c - b @ (a @ c)).norm() >= tol:
            if (step := step + 1) > max_steps:
                raise ValueError(
                    f"{width} units still miss {error.norm():.2g} of the correlations, above tol = {tol}"
                )
            a, b = a + lr * b.T @ error, b + lr * error @ a.T  # (1) and (2), the input as target
        weights.append(a)
        steps.append(step)
        c = a @ c @ a.T
    return weights, steps


def off_diagonal_ratio(a: Float[Tensor, "n n"], basis: Float[Tensor, "n k"] | None = None) -> float:
    r"""Share of the squared entries of :math:`B^TAB` off its diagonal.

    It is 0 where the `basis` diagonalises `a`, which is the condition (18) on the training
    data.
    """
    _symmetric(a)
    rotated = a if basis is None else basis.T @ a @ basis
    return (1 - rotated.diagonal().square().sum() / rotated.square().sum()).item()


def product_spectrum(
    n: int, matrices: int, kind: str, generator: Generator | None = None
) -> tuple[Float[Tensor, " n"], Tensor, float]:
    """Spectrum of a product of random n x n matrices (Figure 6).

    Parameters
    ----------
    matrices : number of factors, at least 1.
    kind : ``"orthogonal"`` or ``"gaussian"`` (standard deviation 1 / sqrt(n)).

    Returns
    -------
    (singular, eigen, log_singular) : singular values (n,), complex eigenvalues (n,), and
        the mean log singular value per factor. The last sums the factors' log determinants,
        since small singular values of a long product are lost to rounding.
    """
    draw = {"orthogonal": haar_orthogonal, "gaussian": scaled_gaussian}
    if kind not in draw or matrices < 1:
        raise ValueError(
            f"kind is one of {sorted(draw)} and matrices >= 1; got {kind!r}, {matrices}"
        )
    total, log_det = torch.eye(n, dtype=torch.float64), 0.0
    for _ in range(matrices):
        w = draw[kind](n, n, generator=generator)
        total, log_det = w @ total, log_det + torch.linalg.slogdet(w).logabsdet.item()
    return torch.linalg.svdvals(total), torch.linalg.eigvals(total), log_det / (n * matrices)


def tanh_jacobian(
    weights: Matrices, x1: Float[Tensor, "... n"], gain: float
) -> tuple[Float[Tensor, "... n n"], Float[Tensor, "layers ..."]]:
    r"""End-to-end Jacobian (22) of a tanh network, and the mean square activity (21).

    The network is :math:`x^{l+1} = g W^l \tanh(x^l)` (20), without a last nonlinearity.

    Returns
    -------
    (jacobian, q) : :math:`\partial x^{N_l} / \partial x^1`, and :math:`q^1, \dots, q^{N_l}`.
    """
    _positive(gain=gain)
    x, jacobian, q = x1, torch.eye(x1.shape[-1]).to(x1), [x1.square().mean(-1)]
    for w in weights:
        phi = x.tanh()
        jacobian = gain * w @ ((1 - phi.square())[..., None] * jacobian)  # phi' = 1 - phi^2
        x = gain * phi @ w.T
        q.append(x.square().mean(-1))
    return jacobian, torch.stack(q)


def q_fixed_point(gain: float) -> float:
    r"""Mean square activity of a deep tanh network: 0 up to gain 1, positive above (Section 4).

    It is the stable solution of :math:`q = g^2 \int Dz \tanh^2(\sqrt q z)`. For a Gaussian
    spread of the activity, which orthogonal and Gaussian weights both give in a wide
    network.
    """
    _positive(gain=gain)
    if gain <= 1:
        return 0.0

    def excess(q: float) -> float:
        return gain**2 * _gauss_mean(lambda z: math.tanh(math.sqrt(q) * z) ** 2) - q

    # tanh(x)^2 >= x^2 - 2 x^4 / 3 makes it positive at the lower end, tanh <= 1 negative above.
    return brentq(excess, (gain**2 - 1) / (4 * gain**2), gain**2)


def _gauss_mean(f: Callable[[float], float]) -> float:
    return quad(lambda z: f(z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -10, 10)[0]


def _positive(**values: int | float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _chain(weights: Matrices) -> None:
    if len(weights) < 1:
        raise ValueError("a network needs at least 1 weight matrix, got 0")
    for before, after in pairwise(weights):
        if after.shape[-1] != before.shape[-2]:
            raise ValueError(
                f"consecutive weights do not fit: {tuple(before.shape)}, then {tuple(after.shape)}"
            )


def _symmetric(a: Tensor) -> None:
    if a.shape[-1] != a.shape[-2] or not torch.allclose(
        a, a.mT, rtol=1e-4, atol=1e-6 * a.abs().max().item()
    ):
        raise ValueError(
            f"a correlation matrix is square and symmetric; got shape {tuple(a.shape)}, or asymmetry"
        )


def _correlations(weights: Matrices, sigma31: Tensor, sigma11: Tensor) -> None:
    _chain(weights)
    _symmetric(sigma11)
    expected = (weights[-1].shape[-2], weights[0].shape[-1])
    if tuple(sigma31.shape) != expected or len(sigma11) != expected[1]:
        raise ValueError(
            f"weights map {expected[1]} to {expected[0]} units, so sigma31 must be {expected} and sigma11 "
            f"{(expected[1],) * 2}; got {tuple(sigma31.shape)} and {tuple(sigma11.shape)}"
        )
