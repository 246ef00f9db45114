r"""Magnitude invariant parametrizations: hypernetworks whose output does not scale with their input.

A hypernetwork predicts the weights :math:`\theta = h(\gamma)` of a primary network. Built from linear layers without
biases and piecewise-linear activations it is positively homogeneous, :math:`h(c\gamma) = c\,h(\gamma)`, and so is the
signal that updates it. The cure is an input of constant norm and a prediction that is added to ordinary weights:

.. math:: \theta = \theta^0 + h(E(\gamma)), \qquad E(\gamma) = [\cos(\pi\gamma/2), \sin(\pi\gamma/2)].

Source: Gonzalez Ortiz, Guttag, Dalca (2024), "Magnitude Invariant Parametrizations Improve Hypernetwork Learning".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def encode_l2(gamma: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch two_d"]:
    r"""Inputs in the unit cube as vectors of norm :math:`\sqrt d`: first all cosines, then all sines.

    Parameters
    ----------
    gamma : :math:`\gamma`, entries in [0, 1]. Map other ranges there first, decades by a logarithm.

    Raises
    ------
    ValueError : an entry lies outside [0, 1] by more than 1e-6, where the encoding folds over, or is nan.

    Source: Gonzalez Ortiz et al. (2024), section 4, input encoding :math:`E_{L2}`.
    """
    outside = ~((gamma >= -1e-6) & (gamma <= 1 + 1e-6))  # true for nan too
    if outside.any():
        raise ValueError(
            f"the encoding takes inputs in [0, 1], got {gamma[outside][0].item():g}; rescale them first"
        )
    angle = math.pi / 2 * gamma
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (..., 2 d)


class HyperNetwork(nn.Module):
    r"""A fully connected network that predicts named tensors.

    Parameters
    ----------
    input_dim : :math:`D`, entries of the input :math:`\gamma`.
    shapes : the tensors to predict, name to shape; a name that ends in ``bias`` starts at 0.
    hidden : widths of the hidden layers.
    encoding : ``"l2"`` for `encode_l2`, or None to feed :math:`\gamma` as it is.
    residual : whether the output bias starts at :math:`\theta^0`, ordinary weights of the primary network, and not
        at 0. Predicting a change of :math:`\theta^0` is just that: the bias of the last layer *is* :math:`\theta^0`.
    activation : one of `ACTIVATIONS`.
    norm : ``"layer"`` for a LayerNorm between each hidden linear layer and its activation, or None.
    init : ``"fan_out"`` (the paper's) or ``"fan_in"``, the Kaiming mode of the linear layers. The rows of the last
        layer that predict one tensor count as a layer of their own.
    base : :math:`\theta^0`, name to tensor; default is a Kaiming-normal draw, 0 for biases and 1 for other vectors.
    generator : source of the random weights.

    Raises
    ------
    ValueError : `input_dim`, a width or a size is below 1, `shapes` is empty, an option is unknown, or `base`
        does not have the names and shapes of `shapes`, or comes with ``residual=False``.

    Source: Gonzalez Ortiz et al. (2024), sections 3 and 4; initialisation as in the official library.
    """

    def __init__(
        self,
        input_dim: int,
        shapes: Mapping[str, Sequence[int]],
        hidden: Sequence[int] = (16, 64, 128),
        *,
        encoding: str | None = "l2",
        residual: bool = True,
        activation: str = "leaky_relu",
        norm: str | None = None,
        init: str = "fan_out",
        base: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        if not self.shapes or min([input_dim, *hidden, *self.sizes]) < 1:
            raise ValueError(
                f"need sizes of at least 1, got {input_dim=}, hidden={tuple(hidden)}, shapes={self.shapes}"
            )
        for what, value, known in [
            ("encoding", encoding, ["l2", None]),
            ("activation", activation, [*ACTIVATIONS]),
            ("norm", norm, ["layer", None]),
            ("init", init, ["fan_out", "fan_in"]),
        ]:
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; choose one of {known}")
        if base is not None and (
            not residual or {k: tuple(v.shape) for k, v in base.items()} != self.shapes
        ):
            raise ValueError(
                f"base needs residual=True and the tensors {self.shapes}, got {residual=}, {list(base)}"
            )
        self.input_dim, self.encoding, self.residual = input_dim, encoding, residual

        widths = [input_dim * (1 if encoding is None else 2), *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers.append(nn.utils.skip_init(nn.Linear, fan_in, fan_out))
            layers += [nn.LayerNorm(fan_out)] if norm == "layer" else []
            layers.append(ACTIVATIONS[activation]())
        self.backbone = nn.Sequential(*layers)
        self.output = nn.utils.skip_init(nn.Linear, widths[-1], sum(self.sizes))
        self._initialise(init, base, generator)

    @torch.no_grad()
    def _initialise(
        self, mode: str, base: Mapping[str, Tensor] | None, generator: torch.Generator | None
    ) -> None:
        for layer in self.backbone:
            if isinstance(layer, nn.Linear):
                _kaiming(layer.weight, mode, generator)
                layer.bias.zero_()
        self.output.bias.zero_()
        blocks = self.output.weight.split(self.sizes)  # one for each predicted tensor
        for (name, theta_0), block in zip(self.base_parameters().items(), blocks, strict=True):
            if name.endswith("bias"):
                block.zero_()
            else:
                _kaiming(block, mode, generator)
            if base is not None:
                theta_0.copy_(base[name])
            elif self.residual and theta_0.ndim > 1:
                _kaiming(theta_0, "fan_in", generator)
            elif self.residual and not name.endswith("bias"):
                theta_0.fill_(1.0)  # the scale of a normalisation layer

    def features(self, gamma: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch width"]:
        r"""The last hidden layer; every row of :math:`\partial\theta / \partial W_\text{out}` holds this vector.

        Raises
        ------
        TypeError : `gamma` is not floating point.
        ValueError : its last dimension is not `input_dim`, or it lies outside [0, 1] with an encoding.
        """
        if not gamma.is_floating_point():
            raise TypeError(f"gamma must be floating point, got {gamma.dtype}")
        if gamma.ndim not in (1, 2) or gamma.shape[-1] != self.input_dim:
            raise ValueError(
                f"gamma must be ({self.input_dim},) or (batch, {self.input_dim}), got {tuple(gamma.shape)}"
            )
        return self.backbone(gamma if self.encoding is None else encode_l2(gamma))

    def flat(self, gamma: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch p"]:
        r"""All predicted weights :math:`\theta` in one vector, in the order of `shapes`."""
        return self.output(self.features(gamma))

    def forward(self, gamma: Float[Tensor, "*batch d"]) -> dict[str, Tensor]:
        """The tensors for one input (d,); for a batch (b, d) each has a first dimension b."""
        theta = self.flat(gamma).split(self.sizes, dim=-1)
        named = zip(self.shapes.items(), theta, strict=True)
        return {name: t.reshape(*gamma.shape[:-1], *shape) for (name, shape), t in named}

    def base_parameters(self) -> dict[str, Tensor]:
        r""":math:`\theta^0`, the part of the prediction that no input changes: views of the output bias."""
        named = zip(self.shapes.items(), self.output.bias.split(self.sizes), strict=True)
        return {name: t.view(shape) for (name, shape), t in named}


def _kaiming(weight: Tensor, mode: str, generator: torch.Generator | None) -> None:
    """Kaiming-normal draw in place; `weight` is (out, in, ...), with the gain of a LeakyReLU."""
    nn.init.kaiming_normal_(
        weight, a=0.01, mode=mode, nonlinearity="leaky_relu", generator=generator
    )


class Hypernetized(nn.Module):
    """A primary network together with the hypernetwork that writes its weights; made by `hypernetize`.

    Its `parameters()` are those of the hypernetwork and those of the primary network that are not predicted; the
    primary's own values of the predicted ones are never used and do not require a gradient.
    """

    def __init__(self, hypernetwork: HyperNetwork, primary: nn.Module) -> None:
        super().__init__()
        self.hypernetwork, self.primary = hypernetwork, primary
        for name in hypernetwork.shapes:
            primary.get_parameter(name).requires_grad_(False)

    def forward(self, gamma: Float[Tensor, "*batch d"], *inputs: Tensor) -> Tensor:
        """Run the primary network on `inputs` with the weights for `gamma`.

        A batch of gammas (b, d) runs it once for each on the same inputs; the output has a first dimension b.
        """
        theta = self.hypernetwork(gamma)
        if gamma.ndim == 1:
            return functional_call(self.primary, theta, inputs)
        return torch.vmap(lambda one: functional_call(self.primary, one, inputs))(theta)


def hypernetize(
    module: nn.Module, names: Iterable[str] | None = None, *, input_dim: int = 1, **options: object
) -> tuple[HyperNetwork, Hypernetized]:
    r"""Turn a module into the primary network of a hypernetwork.

    Parameters
    ----------
    module : any network; it is copied and not changed.
    names : parameters to predict, as in ``module.named_parameters()``; default all of them.
    input_dim : :math:`D`, entries of :math:`\gamma`.
    options : keywords of `HyperNetwork`. With ``residual=True``, its default, :math:`\theta^0`
        starts at the module's own values, random or trained.

    Returns
    -------
    (hypernetwork, model) : ``model(gamma, *inputs)`` runs the module with ``hypernetwork(gamma)``.

    Raises
    ------
    ValueError : a name is not a parameter of `module`, or there is nothing to predict.

    Source: Gonzalez Ortiz et al. (2024), conversion of existing networks.
    """
    own = dict(module.named_parameters())
    chosen = list(own) if names is None else list(names)
    if not chosen or not set(chosen) <= own.keys():
        raise ValueError(f"choose from the module's parameters {list(own)}, got {chosen}")
    values = {name: own[name].detach() for name in chosen}
    if options.get("residual", True):
        options = {"base": values} | options
    hypernetwork = HyperNetwork(input_dim, {k: v.shape for k, v in values.items()}, **options)
    hypernetwork.to(values[chosen[0]])
    return hypernetwork, Hypernetized(hypernetwork, copy.deepcopy(module))


@torch.no_grad()
def weight_scale(hypernetwork: HyperNetwork, gammas: Float[Tensor, "g d"]) -> Float[Tensor, " g"]:
    """Standard deviation over all predicted weights, for each input.

    Source: Gonzalez Ortiz et al. (2024), the quantity of figure 1.
    """
    return hypernetwork.flat(gammas).std(dim=-1)


def update_norms(
    hypernetwork: HyperNetwork, loss: Callable[[Tensor], Tensor], gammas: Float[Tensor, "g d"]
) -> Float[Tensor, " g"]:
    r"""Size of the gradient that trains the predicted weights, for each input.

    The norm of :math:`\partial\,\text{loss}(\gamma) / \partial W_\text{out}` over the rows that predict weights; the
    rows of biases are left out. For an unmodified hypernetwork and a primary network of `L` layers without biases,
    both piecewise linear, and a loss that is linear in the output, it is proportional to :math:`\gamma^L`.

    Parameters
    ----------
    loss : the loss at one input (d,), on a batch that stays the same.

    Source: consequence of Gonzalez Ortiz et al. (2024), section 3, by the chain rule.
    """
    rows = torch.cat(
        [
            torch.full((n,), not k.endswith("bias"))
            for k, n in zip(hypernetwork.shapes, hypernetwork.sizes, strict=True)
        ]
    )
    weight = hypernetwork.output.weight
    return torch.stack([torch.autograd.grad(loss(one), weight)[0][rows].norm() for one in gammas])


def relative_variance(samples: Float[Tensor, " n"]) -> float:
    r"""Variance in units of the squared mean, :math:`E[s^2]/E[s]^2 - 1`; 0 for equal samples, unchanged by a factor.

    For :math:`s = \gamma^L` with :math:`\gamma` uniform on [0, 1] it is :math:`L^2 / (2L + 1)`.
    """
    return (samples.var(correction=0) / samples.mean().square()).item()
