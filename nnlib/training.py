"""The training loop that chapters share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the message gives step, loss and learning rate."""


def fit(
    params: nn.Module | Iterable[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    callback: Callable[[int], dict[str, Any]] | None = None,
    every: int = 1,
) -> dict[str, list[Any]]:
    """Minimise `loss` for a number of steps.

    Parameters
    ----------
    params : a module, or the tensors to train.
    loss : called with the step (0, 1, ...), returns a scalar; it draws its own batch.
    steps : number of updates, at least 0.
    optimizer : makes the optimiser from the parameters, ``lambda p: torch.optim.SGD(p, lr=0.1)`` say.
    schedule : makes a learning-rate scheduler from the optimiser; it is stepped after each update.
    callback : called without gradients before update 0, `every`, 2 `every`, ... and after the last one, with the
        number of updates made; what it returns is appended to the history.
    every : steps between two entries of the history.

    Returns
    -------
    history : lists of equal length: `step`, and each of the callback's entries; and `loss`, one value per update.

    Raises
    ------
    ValueError : `steps` is negative, `every` is below 1, or there is nothing to train.
    TrainingDiverged : the loss became nan or infinite; the parameters keep their values of that step.
    """
    if steps < 0 or every < 1:
        raise ValueError(f"steps must be >= 0 and every >= 1, got steps={steps}, every={every}")
    tensors = list(params.parameters()) if isinstance(params, nn.Module) else list(params)
    if not any(t.requires_grad for t in tensors):
        raise ValueError("nothing to train: no parameter requires a gradient")
    opt = optimizer(tensors)
    scheduler = schedule(opt) if schedule else None
    history: dict[str, list[Any]] = {"step": [], "loss": []}

    def note(step: int) -> None:
        with torch.no_grad():
            entry = {"step": step} | (callback(step) if callback else {})
        for name, value in entry.items():
            history.setdefault(name, []).append(value)

    for step in range(steps):
        if step % every == 0:
            note(step)
        opt.zero_grad(set_to_none=True)
        value = loss(step)
        history["loss"].append(value.item())
        if not math.isfinite(history["loss"][-1]):
            lr = opt.param_groups[0]["lr"]
            raise TrainingDiverged(
                f"the loss is {history['loss'][-1]} at step {step} (learning rate {lr:g}); lower it"
            )
        value.backward()
        opt.step()
        if scheduler:
            scheduler.step()
    note(steps)
    return history


class _Held:
    """A tensor that a graph keeps for its backward pass; it signs off when the graph lets go of it."""

    def __init__(self, tensor: Tensor, held: Counter[int], change: Callable[[int], None]) -> None:
        self.tensor = tensor.detach()
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        self.held, self.change = held, change
        held[self.key] += 1
        if held[self.key] == 1:
            change(self.size)

    def __del__(self) -> None:
        self.held[self.key] -= 1
        if self.held[self.key] == 0:
            self.change(-self.size)


def saved_bytes(fn: Callable[[], Any]) -> int:
    """The most bytes that autograd holds for backward passes at any moment while `fn` runs.

    Every storage counts once, however often it is saved; saved parameters and inputs count, too, since the graph
    keeps them alive. The number does not depend on the machine.

    Parameters
    ----------
    fn : does the work, backward passes included; what it returns is dropped.
    """
    held: Counter[int] = Counter()
    now = most = 0

    def change(size: int) -> None:
        nonlocal now, most
        now += size
        most = max(most, now)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor, held, change), lambda kept: kept.tensor
    ):
        fn()
    return most
