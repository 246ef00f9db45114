r"""Prior-fitted networks: a transformer that learns to predict as a Bayesian from draws of the prior alone.

Müller, Hollmann, Pineda Arango, Grabocka and Hutter, "Transformers Can Do Bayesian Inference", ICLR 2022,
arXiv:2112.10510.

A *sampler* is any function ``sampler(batch, n) -> (x, y)`` that draws `batch` data sets of `n` points from the prior,
``x`` of shape (batch, n, features) and ``y`` of shape (batch, n). The samplers made here draw on the device of their
generator. Exact and sampled posteriors are mixtures of Gaussians: log weights, means and variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnlib.training import fit

Sampler = Callable[[int, int], tuple[Tensor, Tensor]]
HALF_NORMAL_MEDIAN = math.sqrt(2) * torch.erfinv(torch.tensor(0.5, dtype=torch.float64)).item()


# --- what the network puts out ----------------------------------------------------------------------------


class RiemannHead(nn.Module):
    r"""A density that is constant on buckets, with half-normal tails in place of the two outer buckets.

    With bucket probabilities :math:`p = \mathrm{softmax}(\text{logits})` the density in an inner bucket of width `w`
    is :math:`p_b / w`. An outer bucket becomes a half-normal that starts at its inner border and has half of its
    mass within the bucket's width.

    Parameters
    ----------
    borders : the ends of the buckets, ascending, at least four of them.

    Raises
    ------
    ValueError : fewer than four borders, or borders that are not finite and strictly ascending.

    Source: Section 4 and Appendix E.
    """

    def __init__(self, borders: Float[Tensor, " b1"]) -> None:
        super().__init__()
        if len(borders) < 4 or not borders.isfinite().all() or not (borders.diff() > 0).all():
            raise ValueError(f"borders must be 4 or more, finite and ascending, got {borders}")
        self.register_buffer("borders", borders)
        self.n_out, self.n_in = len(borders) - 1, 1

    @classmethod
    def from_samples(cls, y: Float[Tensor, " samples"], n_buckets: int) -> RiemannHead:
        """Buckets of equal mass under the sample `y`, halfway between neighbouring order statistics.

        The outermost borders halve the mass of the outer buckets, as the half-normal tails do.

        Raises
        ------
        ValueError : fewer than three buckets, or fewer than two samples for each.
        """
        y = y.sort().values
        if n_buckets < 3 or len(y) < 2 * n_buckets:
            raise ValueError(
                f"{n_buckets} buckets from {len(y)} samples; use 3 or more, 2 samples each"
            )
        inner = torch.arange(1, n_buckets, dtype=torch.float64) / n_buckets
        ends = torch.tensor([0.5 / n_buckets, 1 - 0.5 / n_buckets], dtype=torch.float64)
        rank = (torch.cat([ends[:1], inner, ends[1:]]) * len(y)).round().long().to(y.device)
        return cls((y[rank - 1] + y[rank]) / 2)

    def encode(self, y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape 1"]:
        """A label as the network reads it."""
        return y[..., None]

    @property
    def tail_scales(self) -> Tensor:
        """Scales of the left and the right half-normal."""
        return self.borders.diff()[[0, -1]] / HALF_NORMAL_MEDIAN

    def log_prob(
        self, logits: Float[Tensor, "*shape b"], y: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Log density of `y`."""
        bucket = torch.searchsorted(self.borders[1:-1], y.contiguous())  # 0 ... b - 1
        log_p = logits.log_softmax(-1).gather(-1, bucket[..., None])[..., 0]
        left, right = self.tail_scales
        inner = -self.borders.diff().log()[bucket]
        below = _half_normal_log_prob(self.borders[1] - y, left)
        above = _half_normal_log_prob(y - self.borders[-2], right)
        shape = torch.where(bucket == 0, below, torch.where(bucket == self.n_out - 1, above, inner))
        return log_p + shape

    def mean(self, logits: Float[Tensor, "*shape b"]) -> Float[Tensor, "*shape"]:
        """Mean of the predicted density."""
        centres = (self.borders[1:] + self.borders[:-1]) / 2
        left, right = self.tail_scales * math.sqrt(2 / math.pi)
        ends = torch.stack([self.borders[1] - left, self.borders[-2] + right])
        centres = torch.cat([ends[:1], centres[1:-1], ends[1:]])
        return logits.softmax(-1) @ centres

    def quantile(self, logits: Float[Tensor, "*shape b"], q: float) -> Float[Tensor, "*shape"]:
        """The value below which a share `q` of the mass lies.

        Raises
        ------
        ValueError : `q` is not strictly between 0 and 1.
        """
        if not 0 < q < 1:
            raise ValueError(f"q must lie strictly between 0 and 1, got {q}")
        p = logits.softmax(-1)
        total = p.cumsum(-1)
        bucket = (total < q).sum(-1, keepdim=True).clamp_max(self.n_out - 1)
        share = ((q - (total - p).gather(-1, bucket)) / p.gather(-1, bucket))[..., 0].clamp(0, 1)
        bucket = bucket[..., 0]
        left, right = self.tail_scales * math.sqrt(2)
        inner = self.borders[bucket] + share * self.borders.diff()[bucket]
        below = self.borders[1] - left * torch.erfinv(1 - share)
        above = self.borders[-2] + right * torch.erfinv(share)
        return torch.where(bucket == 0, below, torch.where(bucket == self.n_out - 1, above, inner))


def _half_normal_log_prob(distance: Tensor, scale: Tensor) -> Tensor:
    return 0.5 * math.log(2 / math.pi) - scale.log() - 0.5 * (distance / scale).square()


class NormalHead(nn.Module):
    """A normal density: logits are its mean and the logarithm of its standard deviation. Source: Section 6."""

    n_out, n_in = 2, 1
    encode = RiemannHead.encode

    def log_prob(
        self, logits: Float[Tensor, "*shape 2"], y: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Log density of `y`."""
        mean, log_sd = logits.unbind(-1)
        return -0.5 * ((y - mean) / log_sd.exp()).square() - log_sd - 0.5 * math.log(2 * math.pi)


class CategoricalHead(nn.Module):
    """Probabilities of `n_classes` classes; labels are 0, 1, ... as floating-point numbers."""

    def __init__(self, n_classes: int = 2) -> None:
        super().__init__()
        self.n_out = self.n_in = n_classes

    def encode(self, y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape classes"]:
        """One-hot labels."""
        return F.one_hot(y.long(), self.n_in).to(y.dtype)

    def log_prob(
        self, logits: Float[Tensor, "*shape classes"], y: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Log probability of `y`."""
        return logits.log_softmax(-1).gather(-1, y.long()[..., None])[..., 0]


# --- the network ------------------------------------------------------------------------------------------


class PriorFittedNetwork(nn.Module):
    """A transformer from a set of labelled points to predictions at further points.

    No positional encoding, so the order of the set does not matter; no token sees a query but the query itself.

    Parameters
    ----------
    n_features : of an input.
    head : `RiemannHead`, `NormalHead`, `CategoricalHead`, or a module with their attributes.
    width, n_layers, n_heads, d_ff : of the transformer; `d_ff` is twice the width if it is not given.

    Raises
    ------
    ValueError : a size below 1, or a width that the heads do not divide.

    Source: Section 4 and Appendix F.
    """

    def __init__(
        self,
        n_features: int,
        head: nn.Module,
        *,
        width: int = 64,
        n_layers: int = 3,
        n_heads: int = 4,
        d_ff: int | None = None,
    ) -> None:
        super().__init__()
        if min(n_features, width, n_layers, n_heads) < 1 or width % n_heads:
            raise ValueError(
                f"sizes must be positive and the heads divide the width, got {n_features} features, "
                f"width {width}, {n_layers} layers, {n_heads} heads"
            )
        self.head, d_ff = head, d_ff or 2 * width
        self.encode_x = nn.Linear(n_features, width)
        self.encode_y = nn.Linear(head.n_in, width)
        self.layers = nn.ModuleList(SetLayer(width, n_heads, d_ff) for _ in range(n_layers))
        self.decode = nn.Sequential(nn.Linear(width, d_ff), nn.GELU(), nn.Linear(d_ff, head.n_out))

    def forward(
        self, x: Float[Tensor, "batch n d"], y: Float[Tensor, "batch n"], n_context: int
    ) -> Float[Tensor, "batch m out"]:
        """The head's logits at the points after the first `n_context`, whose labels are never read.

        Raises
        ------
        ValueError : `n_context` outside [0, n - 1], a wrong number of features, or a context that is not finite.
        """
        n, context = x.shape[1], y[:, :n_context]
        if not 0 <= n_context < n:
            raise ValueError(f"n_context must be between 0 and {n - 1}, got {n_context}")
        if x.shape[2] != self.encode_x.in_features:
            raise ValueError(f"expected {self.encode_x.in_features} features, got {x.shape[2]}")
        if not (context.isfinite().all() and x.isfinite().all()):
            raise ValueError("inputs and context labels must be finite; found nan or inf")
        token = self.encode_x(x)  # a query: A x + a
        labels = self.encode_y(self.head.encode(context))  # a context point: + B y + b
        h = torch.cat([token[:, :n_context] + labels, token[:, n_context:]], 1)  # (batch, n, width)
        mask = torch.eye(n, dtype=torch.bool, device=x.device)
        mask[:, :n_context] = True  # all see the context; a query sees itself, too
        for layer in self.layers:
            h = layer(h, mask)
        return self.decode(h[:, n_context:])

    @torch.no_grad()
    def predict(
        self,
        x: Float[Tensor, "batch n d"],
        y: Float[Tensor, "batch n"],
        x_query: Float[Tensor, "batch m d"],
    ) -> Float[Tensor, "batch m out"]:
        """The logits at `x_query` given the data sets `(x, y)`: one forward pass, no gradient."""
        unknown = y.new_zeros(x_query.shape[:2])
        return self(torch.cat([x, x_query], 1), torch.cat([y, unknown], 1), y.shape[1])


class SetLayer(nn.Module):
    """Attention and feed-forward layer, each followed by a normalisation; both start as the identity."""

    def __init__(self, width: int, n_heads: int, d_ff: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, d_ff), nn.Linear(d_ff, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, h: Float[Tensor, "batch n width"], mask: Bool[Tensor, "n n"]
    ) -> Float[Tensor, "batch n width"]:
        qkv = self.qkv(h).unflatten(
            -1, (3, self.n_heads, -1)
        )  # (batch, n, 3, heads, width / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, n, width / heads)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = self.norm1(h + self.out(seen.transpose(1, 2).flatten(2)))
        return self.norm2(h + self.down(F.gelu(self.up(h))))


def sample_context_size(set_size: int, generator: torch.Generator) -> int:
    """Draw `n` from 0, ..., `set_size` - 1 with weight 1 / (set_size - n): each `n` meets as many queries.

    Source: Appendix F.
    """
    weights = 1 / torch.arange(set_size, 0, -1, device=generator.device)
    return int(torch.multinomial(weights, 1, generator=generator))


def fit_prior(
    model: PriorFittedNetwork,
    sampler: Sampler,
    *,
    steps: int,
    batch_size: int,
    set_size: int,
    lr: float,
    generator: torch.Generator,
    warmup: float = 0.1,
) -> list[float]:
    """Fit a network to a prior: Adam on the negative log density of hidden labels, with fresh data sets in each step.

    Parameters
    ----------
    sampler : the prior; draws on the model's device.
    batch_size, set_size : data sets in a step, points in each.
    lr, warmup : largest learning rate and the share of the steps in which it rises; then it falls like a cosine.
    generator : draws the sizes of the context.

    Returns
    -------
    losses : one for each step.

    Raises
    ------
    ValueError : `steps`, `batch_size` or `set_size` below 1, or `warmup` outside [0, 1).

    Source: Algorithm 1.
    """
    if min(steps, batch_size, set_size) < 1 or not 0 <= warmup < 1:
        raise ValueError(
            "steps, batch_size, set_size must be positive and warmup in [0, 1), "
            f"got {steps}, {batch_size}, {set_size}, {warmup}"
        )
    rise = max(1, round(warmup * steps))

    def loss(_: int) -> Tensor:
        n = sample_context_size(set_size, generator)
        x, y = sampler(batch_size, set_size)
        return -model.head.log_prob(model(x, y, n), y[:, n:]).mean()

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def optimizer(params: object) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(params, lr=lr, fused=True)
        adam.register_step_pre_hook(clip)
        return adam

    def factor(t: int) -> float:
        return min(
            (t + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, t - rise) / (steps - rise + 1))
        )

    def schedule(adam: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(adam, factor)

    every = dict(every=steps)  # nothing to note on the way
    return fit(model, loss, steps=steps, optimizer=optimizer, schedule=schedule, **every)["loss"]


# --- priors, and posteriors to compare with ---------------------------------------------------------------


def gp_sampler(grid: Float[Tensor, "g 3"], n_features: int, generator: torch.Generator) -> Sampler:
    """Gaussian processes on uniform inputs in the unit cube; each data set draws a row of the grid.

    Parameters
    ----------
    grid : rows (length scale, output variance, noise variance); a single row fixes the process.

    Raises
    ------
    ValueError : an entry is not positive.

    Source: Section 5.1 (one row) and 5.2 (a hyper-prior).
    """
    _check_grid(grid)

    def sampler(batch: int, n: int) -> tuple[Tensor, Tensor]:
        where = dict(generator=generator, device=generator.device)
        x = torch.rand(batch, n, n_features, **where)
        rows = grid.to(x.device)[torch.randint(len(grid), (batch,), **where)]
        white = torch.randn(batch, n, 1, dtype=torch.float64, **where)
        cov = _rbf(x, x, rows) + rows[:, 2, None, None].double() * torch.eye(n).to(white)
        return x, (torch.linalg.cholesky(cov) @ white)[..., 0].to(x.dtype)

    return sampler


def gp_posterior(
    x: Float[Tensor, "batch n d"],
    y: Float[Tensor, "batch n"],
    x_query: Float[Tensor, "batch m d"],
    grid: Float[Tensor, "g 3"],
) -> tuple[Float[Tensor, "batch g"], Float[Tensor, "batch g m"], Float[Tensor, "batch g m"]]:
    """The exact predictive distribution of the Gaussian processes of a grid, noise included.

    Returns
    -------
    (log_evidence, mean, variance) : log p(y | x) under each row, and its prediction; float64. Under a uniform prior
        on the rows the predictive distribution is their mixture with weights ``log_evidence.log_softmax(-1)``; the
        row of largest evidence alone is type-II maximum likelihood (MLE-II) on the grid.

    Raises
    ------
    ValueError : an entry of the grid is not positive.
    """
    _check_grid(grid)
    b, n, g = len(x), x.shape[1], len(grid)
    rows = grid.to(x.device).double().expand(b, g, 3)
    x, x_query, y = x[:, None], x_query[:, None], y.double()[:, None, :, None]
    noise = rows[..., 2, None, None] * torch.eye(n).to(rows)
    chol = torch.linalg.cholesky(_rbf(x, x, rows) + noise)  # (b, g, n, n)
    cross = _rbf(x, x_query, rows)  # (b, g, n, m)
    white = torch.linalg.solve_triangular(
        chol, torch.cat([cross, y.expand(b, g, n, 1)], -1), upper=False
    )
    cross, y = white[..., :-1], white[..., -1:]
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_evidence = -0.5 * y.square().sum((-2, -1)) - log_det - 0.5 * n * math.log(2 * math.pi)
    variance = rows[..., 1:2] + rows[..., 2:3] - cross.square().sum(-2)
    return log_evidence, (cross * y).sum(-2), variance


def _rbf(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """variance * exp(-|x - y|^2 / (2 length^2)), in float64."""
    length, variance = rows[..., 0, None, None].double(), rows[..., 1, None, None].double()
    return variance * (-0.5 * torch.cdist(x.double(), y.double()).square() / length**2).exp()


def _check_grid(grid: Tensor) -> None:
    if not (grid > 0).all():
        raise ValueError(f"length scales and variances must be positive, got {grid.min().item()}")


def mixture_log_prob(
    log_weight: Float[Tensor, "batch g"],
    mean: Float[Tensor, "batch g m"],
    variance: Float[Tensor, "batch g m"] | float,
    y: Float[Tensor, "batch m"],
) -> Float[Tensor, "batch m"]:
    """Log density of a mixture of Gaussians, its weights normalised first."""
    variance = torch.as_tensor(variance).to(mean)
    terms = -0.5 * ((y[:, None] - mean).square() / variance + (2 * math.pi * variance).log())
    return (log_weight.log_softmax(-1)[..., None] + terms).logsumexp(1)


def gaussian_riemann_kl(
    mean: Float[Tensor, "*shape"],
    variance: Float[Tensor, "*shape"],
    head: RiemannHead,
    logits: Float[Tensor, "*shape b"],
) -> Float[Tensor, "*shape"]:
    r"""KL divergence from a Gaussian to a Riemann prediction, in closed form and in float64.

    It is :math:`-\frac12\log(2\pi e s^2) - E[\log q]`, where the expectation of :math:`\log q` needs the
    Gaussian's mass in each bucket and, for the half-normal tails, its second moment beyond the inner border.
    """
    s, borders = variance.double().sqrt(), head.borders.double()
    z = (borders[1:-1] - mean.double()[..., None]) / s[..., None]
    cdf, log_p = torch.special.ndtr(z), logits.double().log_softmax(-1)
    upper = torch.special.ndtr(-z[..., -1:])
    mass = torch.cat([cdf[..., :1], cdf.diff(), upper], -1)  # P_b
    left, right = head.tail_scales.double()
    tail = 0.5 * math.log(2 / math.pi) - torch.stack([left, right]).log()
    shape = torch.cat([tail[:1], -borders.diff()[1:-1].log(), tail[1:]])
    a = torch.stack([-z[..., 0], z[..., -1]], -1)  # both tails, seen from the right
    density = (-0.5 * a.square()).exp() / math.sqrt(2 * math.pi)
    beyond = s[..., None].square() * ((1 + a.square()) * torch.special.ndtr(-a) - a * density)
    quadratic = (beyond / (2 * torch.stack([left, right]).square())).sum(-1)
    entropy = 0.5 * (2 * math.pi * math.e * s.square()).log()
    return quadratic - entropy - (mass * (log_p + shape)).sum(-1)


def bnn_size(n_features: int, width: int) -> int:
    """The number of weights of `bnn_function`."""
    return width * (n_features + 1 + width + 1 + 1)


def bnn_function(
    theta: Float[Tensor, "... p"], x: Float[Tensor, "... n d"], width: int
) -> Float[Tensor, "... n"]:
    """A tanh network of two hidden layers whose weights and biases stand in `theta`, all N(0, 1) under the prior.

    The read-out has no bias and is divided by the root of the width. Batch dimensions broadcast.

    Raises
    ------
    ValueError : `theta` does not have `bnn_size` entries.

    Source: Section 5.3.
    """
    d = x.shape[-1]
    if theta.shape[-1] != bnn_size(d, width):
        raise ValueError(f"expected {bnn_size(d, width)} weights, got {theta.shape[-1]}")
    first, b1, second, b2, last = theta.split([width * d, width, width**2, width, width], -1)
    h = torch.tanh(x @ first.unflatten(-1, (d, width)) + b1[..., None, :])
    h = torch.tanh(h @ second.unflatten(-1, (width, width)) + b2[..., None, :])
    return (h @ last[..., None])[..., 0] / width**0.5


def bnn_sampler(n_features: int, width: int, noise: float, generator: torch.Generator) -> Sampler:
    """Data sets of random networks on normal inputs; `noise` is the variance of a label. Source: Section 5.3."""

    def sampler(batch: int, n: int) -> tuple[Tensor, Tensor]:
        where = dict(generator=generator, device=generator.device)
        x = torch.randn(batch, n, n_features, **where)
        f = bnn_function(torch.randn(batch, bnn_size(n_features, width), **where), x, width)
        return x, f + noise**0.5 * torch.randn(batch, n, **where)

    return sampler


def importance_weights(
    f: Float[Tensor, "batch s n"], y: Float[Tensor, "batch n"], noise: float
) -> tuple[Float[Tensor, "batch s"], Float[Tensor, " batch"]]:
    """Posterior log weights of functions drawn from the prior, and the effective sample size.

    Parameters
    ----------
    f : `s` functions at the `n` context points.
    noise : variance of a label.
    """
    log_weight = (-0.5 * (y[:, None] - f).square() / noise).sum(-1).log_softmax(-1)
    return log_weight, 1 / log_weight.exp().square().sum(-1)


def hmc(
    log_density: Callable[[Tensor], Tensor],
    start: Float[Tensor, "*chains p"],
    *,
    warmup: int,
    draws: int,
    step_size: float,
    leapfrog: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "draws *chains p"], float]:
    """Hamiltonian Monte Carlo with a unit mass matrix, all chains at once.

    Parameters
    ----------
    log_density : from positions to one value for each chain, up to a constant.
    warmup, draws : proposals that are dropped, and that are kept.
    step_size, leapfrog : size and number of the steps of one proposal.

    Returns
    -------
    (kept, acceptance) : positions, and the share of accepted proposals.
    """

    def value_and_slope(position: Tensor) -> tuple[Tensor, Tensor]:
        position = position.detach().requires_grad_()
        value = log_density(position)
        return value.detach(), torch.autograd.grad(value.sum(), position)[0]

    where = dict(generator=generator, device=start.device, dtype=start.dtype)
    here, (value, slope), kept, accepted = start, value_and_slope(start), [], 0.0
    for _ in range(warmup + draws):
        momentum = torch.randn(start.shape, **where)
        energy = value - 0.5 * momentum.square().sum(-1)
        there, new_value, new_slope = here, value, slope
        for _ in range(leapfrog):
            momentum = momentum + 0.5 * step_size * new_slope
            there = there + step_size * momentum
            new_value, new_slope = value_and_slope(there)
            momentum = momentum + 0.5 * step_size * new_slope
        gain = new_value - 0.5 * momentum.square().sum(-1) - energy
        yes = torch.rand(gain.shape, **where).log() < gain
        here, slope = (
            torch.where(yes[..., None], a, b) for a, b in ((there, here), (new_slope, slope))
        )
        value, accepted = torch.where(yes, new_value, value), accepted + yes.double().mean().item()
        kept.append(here)
    return torch.stack(kept[warmup:]), accepted / (warmup + draws)
