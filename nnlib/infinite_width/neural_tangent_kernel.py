r"""The neural tangent kernel: the kernel along whose gradient a network's function moves in training.

Jacot, Gabriel and Hongler, "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
NeurIPS 2018, arXiv:1806.07572 (equation and section numbers are those of version 4).

A network of depth `L` has `L` affine maps, that is `L - 1` hidden layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnlib.training import fit

Expectations = tuple[Tensor, Tensor]
BLOCK = 2**16  # kernel entries computed at a time, so that the temporaries stay in the cache


def relu_expectations(cov_xx: Tensor, cov_xy: Tensor, cov_yy: Tensor) -> Expectations:
    r"""E[relu(u) relu(v)] and E[relu'(u) relu'(v)] for centred Gaussian `u`, `v`.

    Parameters
    ----------
    cov_xx, cov_xy, cov_yy : variance of `u`, covariance, variance of `v`; shapes that broadcast. A zero
        variance is allowed.

    Returns
    -------
    (values, slopes) : both in the broadcast shape.

    Source: the expectations of Proposition 1 and Theorem 1; closed form by Cho and Saul (2009).
    """
    size = cov_xx.sqrt() * cov_yy.sqrt()
    cosine = (cov_xy / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(
        -1.0, 1.0
    )  # round-off may leave [-1, 1]
    angle = torch.acos(cosine)
    values = size * ((1 - cosine.square()).sqrt() + (math.pi - angle) * cosine) / (2 * math.pi)
    return values, (math.pi - angle) / (2 * math.pi)


def _erf_expectations(cov_xx: Tensor, cov_xy: Tensor, cov_yy: Tensor) -> Expectations:
    size = (1 + 2 * cov_xx) * (1 + 2 * cov_yy)
    return 2 / math.pi * torch.asin(2 * cov_xy / size.sqrt()), 4 / math.pi * (
        size - 4 * cov_xy.square()
    ).rsqrt()


def _linear_expectations(cov_xx: Tensor, cov_xy: Tensor, cov_yy: Tensor) -> Expectations:
    return cov_xy, torch.ones_like(cov_xy)


def _square_expectations(cov_xx: Tensor, cov_xy: Tensor, cov_yy: Tensor) -> Expectations:
    return cov_xx * cov_yy + 2 * cov_xy.square(), 4 * cov_xy


# Each activation s: (E[s(u) s(v)], E[s'(u) s'(v)]), and E[s(u)^2] from the variance of u alone, which keeps the
# gradient finite where the cosine of `relu_expectations` is 1.
EXPECTATIONS: dict[
    str, tuple[Callable[[Tensor, Tensor, Tensor], Expectations], Callable[[Tensor], Tensor]]
] = {
    "relu": (relu_expectations, lambda a: a / 2),
    "erf": (_erf_expectations, lambda a: 2 / math.pi * torch.asin(2 * a / (1 + 2 * a))),
    "linear": (_linear_expectations, lambda a: a),
    "square": (_square_expectations, lambda a: 3 * a.square()),
}


def activation_expectations(
    name: str, cov_xx: Tensor, cov_xy: Tensor, cov_yy: Tensor
) -> Expectations:
    """E[s(u) s(v)] and E[s'(u) s'(v)] for the activation `name`: relu, erf, linear or square.

    Raises
    ------
    ValueError : no closed form is known for `name`.
    """
    return _known(name)[0](cov_xx, cov_xy, cov_yy)


def _known(
    name: str,
) -> tuple[Callable[[Tensor, Tensor, Tensor], Expectations], Callable[[Tensor], Tensor]]:
    if name not in EXPECTATIONS:
        raise ValueError(
            f"no closed form for activation {name!r}; there are: {', '.join(EXPECTATIONS)}"
        )
    return EXPECTATIONS[name]


def ntk_nngp(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"] | None = None,
    *,
    depth: int = 4,
    beta: float = 0.1,
    activation: str = "relu",
    dtype: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    r"""The two kernels of an infinitely wide network.

    Parameters
    ----------
    x, y : inputs; `y = None` stands for `x`.
    depth : the number `L` of affine maps.
    beta : standard deviation of a bias.
    activation : relu, erf, linear or square.
    dtype : of the computation; float32 loses about half of its digits near the diagonal.

    Returns
    -------
    (nngp, ntk) : :math:`\Sigma^{(L)}`, the covariance of the network's outputs at initialisation, and
        :math:`\Theta^{(L)}_\infty`, the neural tangent kernel; on the device of `x`.

    Raises
    ------
    ValueError : `depth` below 1, inputs that are not 2-D, of different width or not finite, unknown activation.

    Source: Proposition 1 and Theorem 1.
    """
    y = x if y is None else y
    if depth < 1:
        raise ValueError(f"depth counts affine maps and must be at least 1, got {depth}")
    _check_inputs(x, y)
    expectations, second_moment = _known(activation)
    x, y = x.to(dtype), y.to(dtype)
    rows = max(1, BLOCK // max(1, len(y)))
    blocks = [
        kernel_recursion(part, y, depth, beta, expectations, second_moment)
        for part in x.split(rows)
    ]
    nngp, ntk = zip(*blocks, strict=True)
    return torch.cat(nngp), torch.cat(ntk)


def kernel_recursion(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    depth: int,
    beta: float,
    expectations: Callable[[Tensor, Tensor, Tensor], Expectations],
    second_moment: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    r"""The recursion of Theorem 1 for one block of inputs; `ntk_nngp` checks and calls it.

    Parameters
    ----------
    expectations : E[s(u) s(v)] and E[s'(u) s'(v)] from var u, cov, var v.
    second_moment : E[s(u)^2] from var u.

    Source: Proposition 1 and Theorem 1.
    """
    sigma = x @ y.T / x.shape[1] + beta**2  # Sigma^(1)(x, y), (n, m)
    sxx = x.square().mean(1)[:, None] + beta**2  # Sigma^(1)(x, x), (n, 1)
    syy = y.square().mean(1)[None, :] + beta**2  # Sigma^(1)(y, y), (1, m)
    theta = sigma  # Theta^(1) = Sigma^(1)
    for _ in range(depth - 1):
        values, slopes = expectations(sxx, sigma, syy)
        sigma = values + beta**2  # Sigma^(l+1) = E[s s] + beta^2
        theta = theta * slopes + sigma  # Theta^(l+1) = Theta^(l) Sigma-dot^(l+1) + Sigma^(l+1)
        sxx, syy = second_moment(sxx) + beta**2, second_moment(syy) + beta**2
    return sigma, theta


class NTKMLP(nn.Module):
    r"""A fully connected network in NTK parametrisation, or many independent copies of it side by side.

    :math:`\tilde\alpha^{(l+1)} = W^{(l)} \alpha^{(l)} / \sqrt{n_l} + \beta b^{(l)}`, all of `W`, `b` drawn from
    N(0, 1): the scale stands beside the parameter, not in it.

    Parameters
    ----------
    widths : :math:`n_0, ..., n_L`.
    beta : influence of the biases.
    activation : element-wise and differentiable.
    copies : shape of the ensemble; `()` for a single network.
    generator, dtype, device : of the parameters.

    Raises
    ------
    ValueError : fewer than two widths, or a width below 1.

    Source: Section 2.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        beta: float = 0.1,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        copies: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"widths needs at least two entries, each at least 1, got {list(widths)}"
            )
        self.beta, self.activation = beta, activation

        def normal(*shape: int) -> nn.Parameter:
            draw = torch.randn(*copies, *shape, generator=generator, dtype=dtype)
            return nn.Parameter(draw.to(device))

        self.weights = nn.ParameterList(normal(n, m) for m, n in pairwise(widths))
        self.biases = nn.ParameterList(normal(n) for n in widths[1:])

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*copies n out"]:
        """The outputs of every copy."""
        return self.layers(x)[1][-1]

    def layers(self, x: Float[Tensor, "n d"]) -> tuple[list[Tensor], list[Tensor]]:
        r"""Activations :math:`\alpha^{(0)}, ..., \alpha^{(L-1)}` and preactivations :math:`\tilde\alpha^{(1)}, ..., \tilde\alpha^{(L)}`."""
        alphas, zs = [x], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            scale = alphas[-1].shape[-1] ** -0.5
            zs.append(
                scale * alphas[-1] @ weight.mT + self.beta * bias[..., None, :]
            )  # (*copies, n, n_(l+1))
            alphas.append(self.activation(zs[-1]))
        return alphas[:-1], zs


@torch.no_grad()
def empirical_ntk(
    net: NTKMLP, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None
) -> Float[Tensor, "*copies n m"]:
    r"""The kernel of a finite network with scalar output, layer by layer and without Jacobians.

    A layer's gradient is an outer product, hence
    :math:`\Theta(x,y) = \sum_l (\alpha^{(l)}(x)^\top\alpha^{(l)}(y)/n_l + \beta^2)\,\delta^{(l+1)}(x)^\top\delta^{(l+1)}(y)`.
    Needs memory for the activations only, where a Jacobian needs one number for each input and parameter.

    Raises
    ------
    ValueError : the network has more than one output, or the inputs do not fit.

    Source: the definition in Section 4.
    """
    if net.weights[-1].shape[-2] != 1:
        raise ValueError(
            f"empirical_ntk needs one output, this network has {net.weights[-1].shape[-2]}"
        )
    _check_inputs(x, x if y is None else y)
    alphas_x, deltas_x = _outer_factors(net, x)
    alphas_y, deltas_y = (alphas_x, deltas_x) if y is None else _outer_factors(net, y)
    theta = torch.zeros(())
    for ax, ay, dx, dy in zip(alphas_x, alphas_y, deltas_x, deltas_y, strict=True):
        theta = theta.to(dx) + (ax @ ay.mT / ax.shape[-1] + net.beta**2) * (dx @ dy.mT)
    return theta


def _outer_factors(net: NTKMLP, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    r"""alpha^(0..L-1) and delta^(1..L), where delta^(l) is the output's gradient by preactivation l."""
    alphas, zs = net.layers(x)
    deltas = [torch.ones_like(zs[-1])]  # delta^(L) = 1, (*copies, n, 1)
    for weight, z in zip(reversed(net.weights), reversed(zs[:-1]), strict=False):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(net.activation(z).sum(), z)  # element-wise: sigma'(z)
        deltas.insert(0, slope * (deltas[0] @ weight) * weight.shape[-1] ** -0.5)
    return alphas, deltas


def jacobian_ntk(
    model: nn.Module, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None
) -> Float[Tensor, "n m"]:
    """The kernel of any module with scalar output, as the Gram matrix of its parameter gradients.

    Takes memory for inputs times parameters. Every trainable parameter counts.

    Raises
    ------
    ValueError : the output is not one number for each input.

    Source: the definition in Section 4.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def output(p: dict[str, Tensor], row: Tensor) -> Tensor:
        out = torch.func.functional_call(model, p, (row[None],))
        if out.numel() != 1:
            raise ValueError(
                f"jacobian_ntk needs one output for each input, got shape {tuple(out.shape[1:])}"
            )
        return out.squeeze()

    def gradients(rows: Tensor) -> Tensor:
        grads = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))(params, rows)
        return torch.cat([g.flatten(1) for g in grads.values()], dim=1)  # (rows, parameters)

    jx = gradients(x)
    return jx @ (jx if y is None else gradients(y)).T


def kernel_gradient_step(
    f: Float[Tensor, " m"], k: Float[Tensor, "m n"], residual: Float[Tensor, " n"], lr: float
) -> Float[Tensor, " m"]:
    r"""One step of :math:`\partial_t f = -\nabla_K C` on any `m` inputs.

    Parameters
    ----------
    f : the function on the inputs.
    k : the kernel between these inputs and the `n` training inputs.
    residual : the cost's functional derivative `d` on the training inputs; `f - y` for least squares.
    lr : step size.

    Source: Section 3.
    """
    return f - lr * (k @ residual) / residual.shape[0]


def kernel_principal_components(
    k: Float[Tensor, "n n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    r"""Eigenvalues of :math:`\Pi`, that is of the Gram matrix over `N`, descending, and its eigenfunctions.

    Column `i` of the second matrix holds :math:`f^{(i)}` on the data, with mean square 1.

    Raises
    ------
    ValueError : `k` is not symmetric, not finite, or not positive semi-definite up to round-off.

    Source: Section 5.1.
    """
    values, vectors = _psd_eigen(k)
    n = k.shape[0]
    return values.flip(0) / n, vectors.flip(1) * n**0.5


def gradient_flow_posterior(
    k_train: Float[Tensor, "n n"],
    k_test_train: Float[Tensor, "m n"],
    y: Float[Tensor, " n"] | Float[Tensor, "n out"],
    t: float = math.inf,
    *,
    nngp: tuple[Tensor, Tensor, Tensor] | None = None,
    normalise: bool = True,
) -> tuple[Tensor, Tensor | None]:
    r"""Mean and covariance of an infinitely wide network after training for time `t` on least squares.

    With :math:`M_t = \kappa \tilde K^{-1} (I - e^{-t \tilde K / N})` the mean is :math:`M_t y` and the covariance is
    :math:`\Sigma_{**} - M_t \Sigma_{X*} - \Sigma_{*X} M_t^\top + M_t \Sigma_{XX} M_t^\top`.

    Parameters
    ----------
    k_train, k_test_train : the kernel among training inputs, and between test and training inputs.
    y : targets, (n,) or (n, outputs).
    t : learning rate times number of steps, for the cost 1/2 mean (f - y)^2; infinity is allowed.
    nngp : covariances at initialisation: train-train (n, n), test-train (m, n), test-test (m, m).
    normalise : whether the cost is a mean over the data, as in the paper, or a sum.

    Returns
    -------
    (mean, covariance) : shapes (m,) or (m, outputs), and (m, m); the covariance is None without `nngp`.

    Raises
    ------
    ValueError : negative `t`, shapes that do not fit, or a kernel that is not positive semi-definite. Along null
        directions of a singular kernel nothing is learned, as under the flow itself.

    Source: Section 5; the finite-time form follows by integrating its equation for `f_t`.
    """
    n = k_train.shape[0]
    if not t >= 0:
        raise ValueError(f"t must be at least 0, got {t}")
    if y.shape[0] != n or k_test_train.shape[1] != n:
        raise ValueError(
            f"{n} training inputs, but {y.shape[0]} targets and {k_test_train.shape[1]} kernel columns"
        )
    values, vectors = _psd_eigen(k_train)
    null = values <= values[-1] * n * torch.finfo(values.dtype).eps
    safe = torch.where(null, 1.0, values)
    learned = -torch.expm1(-(t / n if normalise else t) * safe)  # 1 - exp(-t lambda)
    weight = torch.where(null, 0.0, learned / safe)
    transfer = (k_test_train @ vectors * weight) @ vectors.mT  # M_t, (m, n)
    mean = transfer @ y.to(transfer.dtype)
    if nngp is None:
        return mean, None
    train, test_train, test = nngp
    cross = transfer @ test_train.mT
    return mean, test - cross - cross.mT + transfer @ train @ transfer.mT


def train_full_batch(
    net: NTKMLP,
    x: Float[Tensor, "n d"],
    y: Tensor,
    *,
    lr: float = 1.0,
    steps: int,
    callback: Callable[[int], dict[str, Any]] | None = None,
    every: int = 1,
) -> dict[str, list[Any]]:
    """Full-batch gradient descent on 1/2 mean (f - y)^2, for every copy of `net` by itself.

    Parameters
    ----------
    y : targets, ``(n,)``, or one row for each copy, ``(*copies, n)``.
    callback, every : see `nnlib.training.fit`; the returned history is its history. Its loss is the sum over copies.

    Source: Section 6 (learning rate 1.0).
    """

    def loss(_: int) -> Tensor:
        return 0.5 * (net(x)[..., 0] - y).square().mean(-1).sum()

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr)

    return fit(net, loss, steps=steps, optimizer=optimizer, callback=callback, every=every)


def _check_inputs(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"inputs must be (n, d) and (m, d), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("inputs must be finite; found nan or inf")


def _psd_eigen(k: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, round-off below zero removed) and eigenvectors of a kernel matrix."""
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not k.isfinite().all():
        raise ValueError(f"a kernel matrix must be square and finite, got shape {tuple(k.shape)}")
    tolerance = k.abs().max().item() * k.shape[0] * torch.finfo(k.dtype).eps
    if (k - k.mT).abs().max().item() > 10 * tolerance:
        raise ValueError(
            f"a kernel matrix must be symmetric; it differs from its transpose by {(k - k.mT).abs().max():.3g}"
        )
    values, vectors = torch.linalg.eigh((k + k.mT) / 2)
    if values[0].item() < -10 * tolerance:
        raise ValueError(
            f"the kernel is not positive semi-definite: smallest eigenvalue {values[0].item():.3g}"
        )
    return values.clamp_min(0.0), vectors
