r"""Dense Hebbian networks that learn from examples with a teacher: memory by couplings among P neurons at a time.

Of each hidden archetype :math:`\xi^\mu \in \{-1, 1\}^N` the network sees M noisy examples and keeps their mean
:math:`\bar\eta^\mu`. Spins :math:`\sigma_i` have the energy

.. math:: H(\sigma) = -\frac{1}{\mathcal R^{P/2} N^{P-1}} \sum_\mu \sum_{i_1 < \dots < i_P}
          \bar\eta^\mu_{i_1} \cdots \bar\eta^\mu_{i_P}\, \sigma_{i_1} \cdots \sigma_{i_P}.

The inner sum is an elementary symmetric polynomial of :math:`x_i = \bar\eta^\mu_i \sigma_i`, and Newton's identities
give it from power sums: a field on all spins costs :math:`O(NKP)`, and no tensor of :math:`N^P` entries is formed.

Source: Agliari, Albanese, Alemanno, Alessandrelli, Barra, Giannotti, Lotito, Pedreschi (2022), "Dense Hebbian neural
networks: a replica symmetric picture of supervised learning". The equations are derived in the book's chapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import erf
from torch import Tensor

FORMS = ("distinct", "power")
Numbers = float | np.floating | np.ndarray | Sequence[float]


def archetypes(
    K: int, N: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "K N"]:
    """K random patterns of N entries, +1 or -1 with equal probability; on the device of the generator.

    Raises
    ------
    ValueError : a size is below 1.
    """
    if min(K, N) < 1:
        raise ValueError(f"need at least one pattern and one neuron, got K={K}, N={N}")
    device = generator.device if generator else None
    return 2 * torch.randint(0, 2, (K, N), generator=generator, device=device).to(dtype) - 1


def dataset_entropy(quality: float, n_examples: float | int) -> float:
    r""":math:`\rho = (1 - r^2)/(M r^2)`, the variance of a class mean's entry relative to its squared mean.

    Parameters
    ----------
    quality : r in (0, 1]; an entry of an example agrees with the archetype with probability (1 + r)/2.
    n_examples : M >= 1.

    Raises
    ------
    ValueError : out of range.
    """
    if not 0 < quality <= 1:
        raise ValueError(f"the quality must lie in (0, 1], got {quality}")
    if not n_examples >= 1:
        raise ValueError(f"need at least one example, got {n_examples}")
    return (1 - quality**2) / (n_examples * quality**2)


def class_means(
    archetypes: Float[Tensor, "K N"],
    n_examples: int,
    quality: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "K N"]:
    r"""Means of M noisy examples of each archetype, drawn without drawing the examples.

    Of M entries a binomial number B agrees with the archetype, and the mean is :math:`\xi(2B/M - 1)`.

    Raises
    ------
    ValueError : as for `dataset_entropy`.
    """
    dataset_entropy(quality, n_examples)
    agree = torch.full_like(archetypes, (1 + quality) / 2)
    count = torch.binomial(torch.full_like(archetypes, n_examples), agree, generator=generator)
    return archetypes * (2 * count / n_examples - 1)


def class_means_from_data(
    x: Float[Tensor, "n N"], y: Int[Tensor, " n"], n_examples: int | None = None
) -> Float[Tensor, "K N"]:
    """The mean of each class's first `n_examples` rows (default: all), classes in increasing order.

    Raises
    ------
    ValueError : a class has fewer rows.
    """
    means = []
    for label in y.unique():
        rows = x[y == label]
        if n_examples is not None and not 1 <= n_examples <= len(rows):
            raise ValueError(
                f"class {label.item()} has {len(rows)} rows, asked for n_examples={n_examples}"
            )
        means.append(rows[:n_examples].mean(0))
    return torch.stack(means)


def elementary_symmetric(
    power_sums: Float[Tensor, "orders ..."],
) -> Float[Tensor, "orders+1 ..."]:
    r"""Elementary symmetric polynomials :math:`e_0, \dots, e_k` from power sums :math:`p_1, \dots, p_k`.

    Newton's identities: :math:`k e_k = \sum_{j=1}^k (-1)^{j-1} e_{k-j}\, p_j`.

    Parameters
    ----------
    power_sums : :math:`p_j = \sum_i x_i^j`, stacked along the first axis.
    """
    e = [torch.ones_like(power_sums[0])]
    for k in range(1, len(power_sums) + 1):
        terms = [(-1) ** (j - 1) * e[k - j] * power_sums[j - 1] for j in range(1, k + 1)]
        e.append(torch.stack(terms).sum(0) / k)
    return torch.stack(e)


class DenseHebbian:
    r"""A network with couplings among `order` spins, learned from class means by Hebb's rule.

    Parameters
    ----------
    class_means : :math:`\bar\eta`, (K, N); for stored patterns the patterns themselves. Use float64: power sums cancel.
    order : P, even and at least 2; 2 is the Hopfield network.
    second_moment : :math:`\mathcal R = \mathbb E\bar\eta^2`; default is the mean square of `class_means`. It only scales
        the field.
    form : ``"distinct"`` sums over tuples of different spins, as the energy says. ``"power"`` keeps coinciding
        indices, :math:`e_{P-1} \to (N m_\mu)^{P-1}/(P-1)!` with the overlap :math:`m_\mu`; for large P and structured data.

    Raises
    ------
    ValueError : `order` is odd, below 2 or above N; the form is unknown; means are not finite; `second_moment` is not
        positive.

    Source: Agliari et al. (2022), definition of the model; sum over tuples by Newton's identities.
    """

    def __init__(
        self,
        class_means: Float[Tensor, "K N"],
        order: int,
        *,
        second_moment: float | None = None,
        form: str = "distinct",
    ) -> None:
        self.K, self.N = class_means.shape
        if order < 2 or order % 2 or order > self.N:
            raise ValueError(f"the order must be even, from 2 to N = {self.N}, got {order}")
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}; choose one of {FORMS}")
        if not class_means.isfinite().all():
            raise ValueError("class means must be finite; found nan or inf")
        if second_moment is None:
            second_moment = class_means.square().mean().item()
        if not 0 < second_moment < math.inf:
            raise ValueError(f"the second moment must be positive, got {second_moment}")
        self.class_means, self.order, self.form = class_means, order, form
        self.scale = second_moment ** (-order / 2) / self.N ** (order - 1)

    def overlaps(self, sigma: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch K"]:
        r"""Overlaps with the class means, :math:`\frac1N \sum_i \bar\eta^\mu_i \sigma_i`."""
        return sigma @ self.class_means.T / self.N

    def _symmetric(
        self, sigma: Float[Tensor, "*batch N"], top: int
    ) -> Float[Tensor, "top_plus_one *batch K"]:
        """e_0 to e_top of x_i = mean_i sigma_i, for each pattern: one matrix product per power sum."""
        sums, means, spins = [], self.class_means, sigma
        for k in range(top):
            if k:
                means, spins = means * self.class_means, spins * sigma
            sums.append(spins @ means.T)  # p_(k+1): (batch, K)
        return elementary_symmetric(torch.stack(sums))

    def field(
        self, sigma: Float[Tensor, "*batch N"], sites: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*batch n"]:
        r"""The field :math:`h_i = -\partial H/\partial\sigma_i` on all spins, or on those in `sites`.

        It needs the polynomials without spin i, :math:`e_{P-1}^{(-i)} = \sum_j (-x_i)^j e_{P-1-j}`; the sum over
        patterns of each term is a matrix product. Spins may be soft, anywhere in [-1, 1].
        """
        means = self.class_means if sites is None else self.class_means[:, sites]
        P = self.order
        if self.form == "power":
            e = (self.N * self.overlaps(sigma)) ** (P - 1) / float(math.factorial(P - 1))
            return self.scale * (e @ means)
        e = self._symmetric(sigma, P - 1)
        spins = sigma if sites is None else sigma[..., sites]
        powers, total = means, e[P - 1] @ means
        for j in range(1, P):
            powers = powers * means
            total = total + (-spins) ** j * (e[P - 1 - j] @ powers)
        return self.scale * total

    def energy(self, sigma: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
        """The energy H; a flip of spin i changes it by 2 sigma_i h_i if the form is ``"distinct"``."""
        P = self.order
        if self.form == "power":
            e = (self.N * self.overlaps(sigma)) ** P / float(math.factorial(P))
        else:
            e = self._symmetric(sigma, P)[P]
        return -self.scale * e.sum(-1)


def corrupted_couplings(
    archetypes: Float[Tensor, "K N"],
    order: int,
    noise: float,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "tuples order"], Float[Tensor, " tuples"]]:
    r"""Couplings of all P-tuples, each pattern's part with Gaussian noise of size :math:`\omega`.

    Parameters
    ----------
    noise : :math:`\omega \ge 0`, standard deviation of the noise beside a signal of 1, drawn for each pattern anew.

    Returns
    -------
    tuples, couplings : indices :math:`i_1 < \dots < i_P`, and
        :math:`\sum_\mu (\xi^\mu_{i_1} \cdots \xi^\mu_{i_P} + \omega w^\mu)`.

    Raises
    ------
    ValueError : `noise` is negative, or `order` is not in 2 to N.

    Source: Agliari et al. (2022), ultra-detection.
    """
    K, N = archetypes.shape
    if not noise >= 0 or not 2 <= order <= N:
        raise ValueError(f"need noise >= 0 and an order from 2 to {N}, got {noise=}, {order=}")
    where = dict(device=archetypes.device)
    tuples = torch.combinations(torch.arange(N, **where), order)
    signal = archetypes[:, tuples].prod(-1).sum(0)
    w = torch.randn(len(tuples), generator=generator, dtype=archetypes.dtype, **where)
    return tuples, signal + noise * math.sqrt(K) * w  # a sum of K independent Gaussians


def tensor_field(
    tuples: Int[Tensor, "tuples order"],
    couplings: Float[Tensor, " tuples"],
    sigma: Float[Tensor, "*batch N"],
    sites: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    r"""The field of explicit couplings, :math:`h_i = \sum_{i \in T} J_T \prod_{j \in T, j \ne i} \sigma_j`, by enumeration.

    It is given for all spins, or for those in `sites`.
    """
    spins = sigma[..., tuples]  # (batch, tuples, order)
    out = torch.zeros_like(sigma)
    for p in range(tuples.shape[1]):
        others = torch.cat([spins[..., :p], spins[..., p + 1 :]], dim=-1).prod(-1)
        out.index_add_(-1, tuples[:, p], couplings * others)
    return out if sites is None else out[..., sites]


def retrieve(
    field: Callable[[Tensor, Tensor], Tensor],
    sigma: Float[Tensor, "*batch N"],
    *,
    beta: float = math.inf,
    sweeps: int = 12,
    mean_field: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*batch N"], int]:
    r"""Let spins follow their field.

    Parameters
    ----------
    field : maps spins (..., N) and the numbers of n of them to the fields on these, (..., n): `DenseHebbian.field`, say.
    sigma : the start, (..., N).
    beta : inverse noise; infinite sets each spin to the sign of its field, a finite one draws it from
        :math:`P(\sigma_i = 1) = 1/(1 + e^{-2\beta h_i})` (Glauber dynamics). A field of 0 keeps the spin at infinite `beta`.
    sweeps : a sweep updates all spins once, in four random blocks; without noise it stops after a sweep without change.
    mean_field : iterate the mean values instead, :math:`m \leftarrow \tanh\beta h(m)`, the first order of Plefka's
        expansion: deterministic, all spins at once.
    generator : draws blocks and spins; on the device of `sigma`.

    Returns
    -------
    sigma, sweeps : the last spins, or their mean values, and the number of sweeps made.

    Raises
    ------
    ValueError : `beta` is not positive, or `sweeps` is below 1.
    """
    if not beta > 0 or sweeps < 1:
        raise ValueError(f"need beta > 0 and at least one sweep, got {beta=}, {sweeps=}")
    sigma, where = sigma.clone(), dict(generator=generator, device=sigma.device)
    every = torch.arange(sigma.shape[-1], device=sigma.device)
    for made in range(1, sweeps + 1):  # noqa: B007 - returned
        before = sigma.clone()
        if mean_field:
            sigma = _respond(field(sigma, every), sigma, beta)
        else:
            for block in torch.randperm(sigma.shape[-1], **where).chunk(4):
                h, old = field(sigma, block), sigma[..., block]
                if math.isinf(beta):
                    new = _respond(h, old, beta)
                else:
                    draw = torch.rand(h.shape, dtype=h.dtype, **where)
                    new = torch.where(draw < torch.sigmoid(2 * beta * h), 1.0, -1.0).to(h.dtype)
                sigma[..., block] = new
        if (mean_field or math.isinf(beta)) and torch.allclose(sigma, before, rtol=0, atol=1e-9):
            break
    return sigma, made


def _respond(h: Tensor, old: Tensor, beta: float) -> Tensor:
    """tanh(beta h), or the sign of h with 0 left as it was."""
    return torch.where(h == 0, old, h.sign()) if math.isinf(beta) else torch.tanh(beta * h)


def one_step_overlap(
    load: Numbers, rho: Numbers, P: int, N: int | None = None
) -> np.ndarray | np.floating:
    r"""Overlap with the archetype after one noiseless step from it, by signal and noise.

    .. math:: m^{(1)} = \mathbb E_g\,\mathrm{erf}\big(g\,[2(\rho g^2 + a\,(1+\rho)^P)]^{-1/2}\big)

    Here g is the archetype's own polynomial :math:`e_{P-1}` relative to its mean. For large N it is 1.

    Parameters
    ----------
    load : :math:`a = K/\binom{N-1}{P-1}`, patterns per independent coupling of a spin; for large N it is
        :math:`\alpha\,(P-1)!` with :math:`K = \alpha N^{P-1}`.
    rho : entropy of the data set, `dataset_entropy`.
    N : number of spins; g is then Gaussian with the variance of `polynomial_variance`. Default is the limit.

    Raises
    ------
    ValueError : a negative load or entropy, or N below P.
    """
    _check(load, rho, P)
    load, rho = np.asarray(load, float)[..., None], np.asarray(rho, float)[..., None]
    nodes, weights = np.polynomial.hermite_e.hermegauss(31)
    if N is None:
        nodes, weights = np.zeros(1), np.ones(1)
    g = 1 + np.sqrt(polynomial_variance(rho, P, N)) * nodes if N else np.ones(1)
    with np.errstate(divide="ignore"):
        inner = erf(g / np.sqrt(2 * (rho * g**2 + load * (1 + rho) ** P)))
    return inner @ (weights / weights.sum())


def polynomial_variance(rho: Numbers, P: int, N: int) -> np.ndarray | np.floating:
    r"""Variance of :math:`e_{P-1}` of N - 1 entries of a class mean relative to its squared mean.

    Two (P-1)-tuples that share j spins are correlated by :math:`(1+\rho)^j`, and
    :math:`\binom{P-1}{j}\binom{N-P}{P-1-j}` tuples share j with a given one.

    Raises
    ------
    ValueError : a negative entropy, or N below P.
    """
    _check(0.0, rho, P)
    if N < P:
        raise ValueError(f"need at least P = {P} spins, got N={N}")
    k, total = P - 1, math.comb(N - 1, P - 1)
    share = [math.comb(k, j) * math.comb(N - P, k - j) / total for j in range(k + 1)]
    return sum(w * ((1 + np.asarray(rho, float)) ** j - 1) for j, w in enumerate(share))


def learning_threshold(load: float, quality: float, P: int) -> float:
    r"""The number of examples M at which the signal equals one standard deviation of all noise.

    It solves :math:`\rho + a(1+\rho)^P = 1` (`load` and :math:`\rho` as in `one_step_overlap`); infinite for
    :math:`a \ge 1`. Without load it is :math:`(1-r^2)/r^2`, whatever P.

    Raises
    ------
    ValueError : a negative load, or a quality outside (0, 1).
    """
    if not 0 < quality < 1:
        raise ValueError(f"the quality must lie in (0, 1), got {quality}")
    _check(load, 0.0, P)
    low, high = 0.0, 1.0
    for _ in range(80):  # bisection in rho; the left side grows with it
        middle = (low + high) / 2
        low, high = (middle, high) if middle + load * (1 + middle) ** P < 1 else (low, middle)
    return math.inf if load >= 1 else (1 - quality**2) / (quality**2 * (low + high) / 2)


class ReplicaSymmetric(NamedTuple):
    r"""Order parameters: `m` overlap with the archetype, `q` of two replicas, `n` with the class mean over r."""

    m: np.ndarray | np.floating
    q: np.ndarray | np.floating
    n: np.ndarray | np.floating


def solve_replica_symmetric(
    alpha: Numbers, rho: Numbers, beta: Numbers, P: int, *, iterations: int = 400
) -> ReplicaSymmetric:
    r"""Retrieval solution of the replica-symmetric equations for P >= 4, :math:`K = \alpha N^{P-1}`, large N.

    .. math::
        g &= \frac{n^{P-1}(1 + \sqrt\rho z)}{(P-1)!(1+\rho)^{P/2}} + \sqrt{\frac{\alpha q^{P-1}}{(P-1)!}}\,x, \qquad
        m = \mathbb E\tanh\beta g, \quad q = \mathbb E\tanh^2\beta g, \\
        n &= m + \rho\beta\,\frac{n^{P-1}}{(P-1)!(1+\rho)^{P/2}}(1 - q)

    with standard Gaussians z and x. Damped iteration from m = n = q = 1: where no retrieval solution exists it ends in
    m = 0. All arguments broadcast; `beta` is infinite everywhere or finite everywhere.

    Raises
    ------
    ValueError : P is odd or below 4, a negative load or entropy, or `beta` not positive or mixed.
    """
    _check(alpha, rho, P, least=4)  # P = 2 has a reaction term
    alpha, rho, beta = np.broadcast_arrays(
        *(np.asarray(a, dtype=float) for a in (alpha, rho, beta))
    )
    if not (beta > 0).all() or np.isinf(beta).any() != np.isinf(beta).all():
        raise ValueError(f"beta must be positive, and infinite everywhere or nowhere, got {beta}")
    unit = math.factorial(P - 1) * (1 + rho) ** (P / 2)
    y = np.linspace(-7, 7, 801)
    weight = np.exp(-(y**2) / 2)
    weight /= weight.sum()
    m, q, n = np.ones(alpha.shape), np.ones(alpha.shape), np.ones(alpha.shape)
    for _ in range(iterations):
        signal = n ** (P - 1) / unit
        noise = alpha * q ** (P - 1) / float(math.factorial(P - 1))
        spread = np.sqrt(rho * signal**2 + noise)  # of g, which is Gaussian
        safe = np.where(spread > 0, spread, 1.0)
        if np.isinf(beta).all():
            ratio = np.where(spread > 0, signal / safe, np.where(signal > 0, np.inf, 0.0))
            m_new, q_new = erf(ratio / math.sqrt(2)), np.ones_like(q)
            slope = math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2) / safe
        else:
            t = np.tanh(beta[..., None] * (signal[..., None] + spread[..., None] * y))
            m_new, q_new = t @ weight, t**2 @ weight
            slope = (t * y) @ weight / safe  # E of the derivative of tanh(beta g), by parts
        n_new = m_new + rho * signal * slope
        m, q, n = (m + m_new) / 2, (q + q_new) / 2, (n + n_new) / 2
    return ReplicaSymmetric(m, q, n)


def critical_load(
    rho: Numbers, beta: Numbers, P: int, *, steps: int = 14, iterations: int = 400
) -> np.ndarray | np.floating:
    r"""The largest :math:`\alpha` with a retrieval solution, by bisection; 0 where there is none at any load.

    Parameters
    ----------
    rho, beta, P, iterations : as for `solve_replica_symmetric`; arrays broadcast.
    steps : halvings of the interval from 0 to twice the storage limit of `storage_limit`.

    Raises
    ------
    ValueError : as for `solve_replica_symmetric`.
    """
    rho, beta = np.broadcast_arrays(np.asarray(rho, float), np.asarray(beta, float))
    low, high = np.zeros(rho.shape), np.full(rho.shape, 2 * storage_limit(P))
    for _ in range(steps):
        middle = (low + high) / 2
        retrieved = solve_replica_symmetric(middle, rho, beta, P, iterations=iterations).m > 0.1
        low, high = np.where(retrieved, middle, low), np.where(retrieved, high, middle)
    return low


def storage_limit(P: int) -> float:
    r"""Critical load without noise, :math:`\rho = 0`: :math:`\max_x \mathrm{erf}(x)^{2(P-1)} / (2 (P-1)!\, x^2)`.

    Raises
    ------
    ValueError : P is odd or below 4.
    """
    _check(0.0, 0.0, P, least=4)
    best = minimize_scalar(lambda x: -(erf(x) ** (P - 1)) / x, bounds=(0.3, 5), method="bounded")
    return best.fun**2 / (2 * math.factorial(P - 1))


def critical_noise(P: int) -> float:
    r"""Largest T = 1/beta with retrieval, without load, :math:`\rho = 0`: :math:`\max_m m^{P-1}/((P-1)!\,\mathrm{artanh}\,m)`.

    Raises
    ------
    ValueError : P is odd or below 4.
    """
    _check(0.0, 0.0, P, least=4)
    best = minimize_scalar(
        lambda m: -(m ** (P - 1)) / np.arctanh(m), bounds=(0.1, 1 - 1e-12), method="bounded"
    )
    return -best.fun / math.factorial(P - 1)


def _check(load: Numbers, rho: Numbers, P: int, least: int = 2) -> None:
    if P < least or P % 2:
        raise ValueError(f"P must be even and at least {least}, got {P}")
    if not (np.asarray(load) >= 0).all() or not (np.asarray(rho) >= 0).all():
        raise ValueError(f"load and entropy must not be negative, got {load}, {rho}")
