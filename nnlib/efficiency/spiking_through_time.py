r"""Training spiking networks without gradients through time: SLTT and SLTT-K beside backpropagation through time.

A layer of leaky integrate-and-fire (LIF) neurons receives a current :math:`I[t]` at each step, here
:math:`W s^{l-1}[t] + b`, and answers with spikes:

.. math:: u[t] = \lambda\,(u[t-1] - V s[t-1]) + I[t], \qquad s[t] = \Theta(u[t] - V), \qquad \lambda = 1 - 1/\tau.

Backpropagation through time (BPTT) follows two routes: through the layers, and along :math:`u[t] \to u[t+1]`.
Spatial learning through time (SLTT) cuts the second one, so each step can be differentiated and forgotten at once;
SLTT-K does so at K random steps and runs the others without a graph.

Source: Meng, Xiao, Yan, Wang, Lin, Luo (2023), "Towards Memory- and Time-Efficient Backpropagation for Training
Spiking Neural Networks".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Surrogate = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def triangle(x: Float[Tensor, "*shape"], alpha: float = 1.0) -> Float[Tensor, "*shape"]:
    r"""The paper's stand-in for :math:`\Theta'(x)`: :math:`\max(0, \alpha - \alpha^2|x|)`, of area 1.

    Raises
    ------
    ValueError : `alpha` is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return (alpha - alpha**2 * x.abs()).clamp(min=0)


def rectangle(x: Float[Tensor, "*shape"], width: float = 1.0) -> Float[Tensor, "*shape"]:
    r"""The stand-in :math:`1/w` for :math:`|x| < w/2` and 0 elsewhere, of area 1.

    Raises
    ------
    ValueError : `width` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    return (x.abs() < width / 2).to(x.dtype) / width


def sigmoid_slope(x: Float[Tensor, "*shape"], alpha: float = 4.0) -> Float[Tensor, "*shape"]:
    r"""The stand-in :math:`\alpha\,\sigma(\alpha x)(1 - \sigma(\alpha x))`, the slope of a logistic step, of area 1.

    Raises
    ------
    ValueError : `alpha` is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    s = (alpha * x).sigmoid()
    return alpha * s * (1 - s)


class _ChargeFireReset(torch.autograd.Function):
    """One step of LIF neurons. Keeps one tensor for the backward pass, the distance to the threshold."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, v: Tensor | None, leak: float, threshold: float, psi: Surrogate
    ) -> tuple[Tensor, Tensor]:
        u = current if v is None else torch.add(current, v, alpha=leak)
        x = u - threshold
        spikes = (x >= 0).to(u.dtype)
        ctx.save_for_backward(x)
        ctx.leak, ctx.threshold, ctx.psi = leak, threshold, psi
        return spikes, torch.sub(u, spikes, alpha=threshold)

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # dL/du[t] = dL/ds[t] psi + dL/dv[t] (1 - V psi)
        grad_u = grad_v + ctx.psi(x) * (grad_spikes - ctx.threshold * grad_v)
        grad_before = ctx.leak * grad_u if ctx.needs_input_grad[1] else None
        return grad_u, grad_before, None, None, None


class LIF(nn.Module):
    r"""A layer of leaky integrate-and-fire neurons with soft reset; call it once per time step.

    Parameters
    ----------
    tau : time constant :math:`\tau \ge 1` in steps; a share :math:`\lambda = 1 - 1/\tau` of the potential stays.
    v_threshold : :math:`V > 0`, the potential at which a neuron fires, and what a spike takes away from it.
    surrogate : :math:`\psi`, used for :math:`\Theta'` in the backward pass; `triangle`, `rectangle`, `sigmoid_slope`,
        or a function of your own, of the distance to the threshold.
    through_time : whether gradients pass from a step to the one before. False is SLTT; the forward pass is the same.

    Attributes
    ----------
    v : potential after the last step's reset, :math:`u[t] - V s[t]`; None before the first step.

    Raises
    ------
    ValueError : `tau` is below 1 or `v_threshold` is not positive.

    Source: Meng et al. (2023), iterative LIF model; reset not detached, no decay of the input.
    """

    def __init__(
        self,
        tau: float = 1.1,
        v_threshold: float = 1.0,
        surrogate: Surrogate = triangle,
        through_time: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= tau < float("inf"):
            raise ValueError(f"tau must be at least 1 and finite, got {tau}")
        if not v_threshold > 0:
            raise ValueError(f"v_threshold must be positive, got {v_threshold}")
        self.tau, self.v_threshold, self.surrogate = tau, v_threshold, surrogate
        self.through_time = through_time
        self.v: Tensor | None = None

    def forward(self, current: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """One time step: the spikes, 0 or 1, that answer a current.

        Raises
        ------
        RuntimeError : the shape differs from the step before; call `reset_state` between batches.
        """
        v = self.v
        if v is not None and v.shape != current.shape:
            raise RuntimeError(
                f"the current has shape {tuple(current.shape)}, the potential {tuple(v.shape)}; "
                "call reset_state(net) before a new batch"
            )
        if v is not None and not self.through_time:
            v = v.detach()
        spikes, self.v = _ChargeFireReset.apply(
            current, v, 1 - 1 / self.tau, self.v_threshold, self.surrogate
        )
        return spikes

    def reset(self) -> None:
        """Forget the potential, as before a new batch."""
        self.v = None

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"tau={self.tau}, v_threshold={self.v_threshold}, through_time={self.through_time}"


def _neurons(net: nn.Module) -> list[LIF]:
    layers = [module for module in net.modules() if isinstance(module, LIF)]
    if not layers:
        raise ValueError(f"the network has no LIF layer: {net}")
    return layers


def reset_state(net: nn.Module) -> None:
    """Forget the potentials of all LIF layers, as before a new batch.

    Raises
    ------
    ValueError : the network has no LIF layer.
    """
    for layer in _neurons(net):
        layer.reset()


def set_through_time(net: nn.Module, flag: bool) -> None:
    """Let gradients pass along time in all LIF layers (BPTT), or cut these routes (SLTT).

    Raises
    ------
    ValueError : the network has no LIF layer.
    """
    for layer in _neurons(net):
        layer.through_time = flag


def tet_loss(
    logits: Float[Tensor, "batch classes"],
    y: Int[Tensor, " batch"],
    beta: float = 0.05,
    one_hot: bool = False,
) -> Float[Tensor, ""]:
    r"""The loss of one time step, :math:`(1-\beta)\,\mathrm{CE}(o, y) + \beta\,\mathrm{MSE}(o, \mathbf 1)`.

    Parameters
    ----------
    one_hot : pull the outputs towards the one-hot label, as the paper does for DVS-CIFAR10, and not towards 1.

    Raises
    ------
    ValueError : `beta` is not in [0, 1].

    Source: Deng et al. (2022), "Temporal Efficient Training"; values of Meng et al. (2023).
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    target = F.one_hot(y, logits.shape[1]).to(logits) if one_hot else torch.ones_like(logits)
    return (1 - beta) * F.cross_entropy(logits, y) + beta * F.mse_loss(logits, target)


def bptt_backward(
    net: nn.Module, frames: Float[Tensor, "T B *shape"], y: Int[Tensor, " B"], loss: Loss = tet_loss
) -> Float[Tensor, "B classes"]:
    r"""Add the gradient of :math:`\frac1T\sum_t L(o[t], y)` to the parameters' ``grad``, by BPTT.

    Parameters
    ----------
    net : maps one step's frame (B, ...) to logits (B, classes) and has LIF layers; their state is reset first.
    frames : the input at steps 1 to T. A still image is expanded: ``image.expand(T, *image.shape)``.
    loss : of one step's logits and the labels, a mean over the batch.

    Returns
    -------
    The sum of the logits over time, detached; its argmax is the prediction.

    Raises
    ------
    ValueError : there is no step, or the network has no LIF layer.
    """
    _start(net, frames, through_time=True)
    outputs = [net(frame) for frame in frames]
    sum(loss(output, y) / len(frames) for output in outputs).backward()
    return torch.stack(outputs).detach().sum(0)


def sltt_backward(
    net: nn.Module,
    frames: Float[Tensor, "T B *shape"],
    y: Int[Tensor, " B"],
    loss: Loss = tet_loss,
    *,
    k: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B classes"]:
    r"""Add the SLTT gradient of :math:`\frac1T\sum_t L(o[t], y)` to the parameters' ``grad``.

    Each step is differentiated at once and its graph is dropped, so memory does not depend on T.

    Parameters
    ----------
    net, frames, y, loss : as for `bptt_backward`.
    k : number of steps to differentiate, drawn without replacement (SLTT-K); default is all of them. The factor 1/T
        stays, so that the gradient's mean is K/T of SLTT's.
    generator : draws the steps.

    Returns
    -------
    The sum of the logits over time, detached.

    Raises
    ------
    ValueError : `k` is not in 1 to T, there is no step, or the network has no LIF layer.

    Source: Meng et al. (2023), algorithm of SLTT and SLTT-K.
    """
    _start(net, frames, through_time=False)
    T = len(frames)
    k = T if k is None else k
    if not 1 <= k <= T:
        raise ValueError(f"k must be from 1 to the number of steps {T}, got {k}")
    chosen = set(torch.randperm(T, generator=generator)[:k].tolist())
    total: Tensor | float = 0.0
    for t, frame in enumerate(frames):
        with torch.set_grad_enabled(t in chosen):
            output = net(frame)
        if t in chosen:
            (loss(output, y) / T).backward()
        total = total + output.detach()
    return total


def _start(net: nn.Module, frames: Tensor, through_time: bool) -> None:
    if len(frames) == 0:
        raise ValueError(f"need at least one time step, got frames of shape {tuple(frames.shape)}")
    reset_state(net)
    set_through_time(net, through_time)


class Similarity(NamedTuple):
    """How close the SLTT gradient is: its cosine with BPTT's, and the norm of what it lacks relative to BPTT's."""

    cosine: float
    missing: float


def gradient_similarity(
    net: nn.Module, frames: Float[Tensor, "T B *shape"], y: Int[Tensor, " B"], loss: Loss = tet_loss
) -> dict[str, Similarity]:
    """Compare the SLTT and the BPTT gradient of each weight matrix or kernel that lies below a LIF layer.

    The last layer is left out, as are vectors: nothing is cut above the readout. Buffers (running statistics) and
    ``grad`` of the network are as before afterwards.

    Parameters
    ----------
    net, frames, y, loss : as for `bptt_backward`.

    Returns
    -------
    Parameter name to `Similarity`; nan where a gradient that divides is zero.
    """
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    before = [p.grad for p in net.parameters()]
    found = []
    for backward in (bptt_backward, sltt_backward):
        net.zero_grad(set_to_none=True)
        backward(net, frames, y, loss)
        found.append({n: p.grad for n, p in net.named_parameters() if p.ndim > 1})
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
    for p, grad in zip(net.parameters(), before, strict=True):
        p.grad = grad
    full, spatial = found
    compared = {}
    for name in list(full)[:-1]:
        a, b = full[name].flatten().double(), spatial[name].flatten().double()
        compared[name] = Similarity(
            (a @ b / (a.norm() * b.norm())).item(), ((a - b).norm() / a.norm()).item()
        )
    return compared


class Gradients(NamedTuple):
    r"""What `manual_backward` finds: gradients of each layer, errors :math:`\partial L/\partial u^l[t]`, and costs.

    `errors` and `spatial` have one tensor (T, B, n_l) per hidden layer; `spatial` is the part
    :math:`\psi^l_t\,\partial L/\partial s^l[t]` of the error that does not come through time, and `decay` is
    :math:`\epsilon^l[t]`. `multiplications` counts scalar products per sample.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    errors: list[Tensor]
    spatial: list[Tensor]
    decay: list[Tensor]
    multiplications: int


def manual_backward(
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    frames: Float[Tensor, "T B n0"],
    y: Int[Tensor, " B"],
    *,
    tau: float = 1.1,
    v_threshold: float = 1.0,
    surrogate: Surrogate = triangle,
    through_time: bool = True,
    steps: Collection[int] | None = None,
) -> Gradients:
    r"""The gradient of a plain LIF network's mean cross-entropy, by the recursion written out and without autograd.

    .. math:: \frac{\partial L}{\partial u^l[t]} = \psi^l_t\,(W^{l+1})^\top \frac{\partial L}{\partial u^{l+1}[t]}
              + \epsilon^l[t]\,\frac{\partial L}{\partial u^l[t+1]}, \qquad
              \epsilon^l[t] = \lambda\,(1 - V\psi^l_t)

    Parameters
    ----------
    weights, biases : of layers 1 to L, (n_l, n_{l-1}) and (n_l,); all but the last feed LIF neurons.
    frames : the input of each step. y : labels.
    through_time : False drops the second term (SLTT).
    steps : the steps, from 0, at which SLTT-K differentiates; only without `through_time`.

    Raises
    ------
    ValueError : layers do not fit together, `steps` with `through_time`, or a step outside 0 to T - 1.

    Source: Meng et al. (2023), Section 4; the recursion derived anew.
    """
    T, B, leak = len(frames), frames.shape[1], 1 - 1 / tau
    steps = range(T) if steps is None else sorted(steps)
    if through_time and len(steps) < T:
        raise ValueError(f"BPTT needs all {T} steps, got {list(steps)}; pass through_time=False")
    if any(not 0 <= t < T for t in steps):
        raise ValueError(f"steps must lie in 0 to {T - 1}, got {list(steps)}")
    sizes = [frames.shape[2], *(len(w) for w in weights)]
    if len(weights) != len(biases) or any(
        w.shape != (n, m) or b.shape != (n,)
        for w, b, (m, n) in zip(weights, biases, pairwise(sizes), strict=False)
    ):
        raise ValueError(
            f"layers do not fit: frames have {sizes[0]} inputs, weights "
            f"{[tuple(w.shape) for w in weights]}, biases {[tuple(b.shape) for b in biases]}"
        )
    hidden = len(weights) - 1
    s: list[list[Tensor]] = [list(frames)] + [[] for _ in range(hidden)]  # s[l][t]: (B, n_l)
    psi: list[list[Tensor]] = [[] for _ in range(hidden)]
    v: list[Any] = [0.0] * hidden
    top = []  # dL/do[t]
    for t in range(T):
        for l in range(hidden):  # noqa: E741 - the paper's letter for a layer
            u = leak * v[l] + s[l][t] @ weights[l].T + biases[l]
            s[l + 1].append((u >= v_threshold).to(u.dtype))
            psi[l].append(surrogate(u - v_threshold))
            v[l] = u - v_threshold * s[l + 1][t]
        output = s[hidden][t] @ weights[-1].T + biases[-1]
        top.append((output.softmax(1) - F.one_hot(y, output.shape[1])) / (T * B))

    grad_w, grad_b = [torch.zeros_like(w) for w in weights], [torch.zeros_like(b) for b in biases]
    spatial = [[torch.zeros_like(p) for p in layer] for layer in psi]
    errors = [[torch.zeros_like(p) for p in layer] for layer in psi]
    decay = [[leak * (1 - v_threshold * p) for p in layer] for layer in psi]
    count = 0
    for t in reversed(steps):
        error = top[t]
        for l in range(hidden, -1, -1):  # noqa: E741
            if l < hidden:
                error = errors[l][t] = spatial[l][t].clone()
                if through_time and t + 1 < T:
                    error += decay[l][t] * errors[l][t + 1]
                    count += 2 * sizes[l + 1]  # (1 - V psi) e, and lambda times it
            grad_w[l] += error.T @ s[l][t]
            grad_b[l] += error.sum(0)
            count += sizes[l] * sizes[l + 1]
            if l > 0:
                spatial[l - 1][t] = psi[l - 1][t] * (error @ weights[l])
                count += sizes[l] * sizes[l + 1]
    stacked = [[torch.stack(layer) for layer in kind] for kind in (errors, spatial, decay)]
    return Gradients(grad_w, grad_b, *stacked, count)


def backward_multiplications(widths: Sequence[int], steps: int, *, through_time: bool) -> int:
    r"""Scalar multiplications per sample of a fully connected network's backward pass, biases aside.

    One step through the layers takes :math:`M_s = n_0 n_1 + 2\sum_{l\ge2} n_{l-1} n_l`, one through time
    :math:`M_t = 2\sum_{l<L} n_l`. The surrogate's elementwise factor is common to all methods and left out.

    Parameters
    ----------
    widths : :math:`n_0, \dots, n_L`, inputs first, outputs last.
    steps : steps that are differentiated: T for BPTT and SLTT, K for SLTT-K.
    through_time : True for BPTT.

    Raises
    ------
    ValueError : fewer than three widths, or one or `steps` below 1.
    """
    if len(widths) < 3 or min([*widths, steps]) < 1:
        raise ValueError(f"need at least three widths and all >= 1, got {widths}, steps {steps}")
    layers = [m * n for m, n in pairwise(widths)]
    spatial, temporal = 2 * sum(layers) - layers[0], 2 * sum(widths[1:-1])
    return steps * spatial + (steps - 1) * temporal * through_time


def spiking_mlp(widths: Sequence[int], tau: float = 1.1) -> nn.Sequential:
    """Linear, BatchNorm and LIF for each hidden width, and a linear readout without neurons.

    Raises
    ------
    ValueError : fewer than three widths, or one below 1.
    """
    if len(widths) < 3 or min(widths) < 1:
        raise ValueError(f"need at least three widths, all >= 1, got {widths}")
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), LIF(tau)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class _PreActBlock(nn.Module):
    """LIF, convolution, BatchNorm, twice; and a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int, tau: float) -> None:
        super().__init__()
        self.first = LIF(tau)
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(n_out),
            LIF(tau),
            nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        same = stride == 1 and n_in == n_out
        self.shortcut = (
            None
            if same
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.first(x)
        return self.body(spikes) + (x if self.shortcut is None else self.shortcut(spikes))


def spiking_resnet(
    channels: int = 3,
    classes: int = 10,
    *,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    tau: float = 1.1,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A pre-activation residual network of LIF neurons for small images, (B, channels, side, side) to (B, classes).

    The default is the ResNet-18 of the paper's CIFAR experiments: 64 to 512 channels, halved three times. Convolutions
    start Kaiming-normal (fan out), drawn from `generator` or the global one.

    Raises
    ------
    ValueError : a size is below 1.
    """
    if min([channels, classes, width, *blocks]) < 1:
        raise ValueError(f"sizes must be >= 1, got {channels=}, {classes=}, {width=}, {blocks=}")
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
    ]
    n_in = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            layers.append(_PreActBlock(n_in, width * 2**stage, stride, tau))
            n_in = width * 2**stage
    layers += [LIF(tau), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes)]
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
    return net


def drifting_events(
    images: Float[Tensor, "n side side"],
    steps: int,
    *,
    threshold: float = 0.25,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "steps n inputs"]:
    """Still images as an event camera sees them while they drift: ON and OFF maps of brightness changes.

    Each image starts at a random place of a canvas two pixels larger than itself. At each step it is pushed by -1, 0
    or 1 pixels along each axis (never by nothing; the canvas' edge may stop it), and a pixel whose brightness rises
    by more than `threshold` sends an ON event, one that falls an OFF event.

    Parameters
    ----------
    images : brightness, 0 to 1.
    steps : T, number of frames.
    generator : draws places and moves.

    Returns
    -------
    frames : 0 or 1; inputs = 2 (side + 2)^2, first the ON map, then the OFF map.

    Raises
    ------
    ValueError : `steps` is below 1, or `threshold` is not positive.
    """
    if steps < 1 or not threshold > 0:
        raise ValueError(f"need steps >= 1 and threshold > 0, got {steps=}, {threshold=}")
    n, side = images.shape[:2]
    moves = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j])
    place = torch.randint(0, 3, (n, 2), generator=generator)
    rows, grid = torch.arange(n)[:, None, None], torch.arange(side)

    def view() -> Tensor:
        canvas = images.new_zeros(n, side + 2, side + 2)
        down = (place[:, 0, None] + grid)[:, :, None]
        right = (place[:, 1, None] + grid)[:, None, :]
        canvas[rows, down, right] = images
        return canvas

    before, frames = view(), []
    for _ in range(steps):
        place = (place + moves[torch.randint(0, len(moves), (n,), generator=generator)]).clamp(0, 2)
        now = view()
        change = now - before
        frames.append(torch.stack([change > threshold, change < -threshold], 1).flatten(1))
        before = now
    return torch.stack(frames).to(images.dtype)
