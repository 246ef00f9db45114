"""The shared training loop, against descents that are known in closed form."""

import pytest
import torch
from torch import nn

from nnlib.training import TrainingDiverged, fit, saved_bytes


def weight(value=1.0):
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


def test_gradient_descent_on_a_parabola_follows_its_closed_form():
    w = weight()
    history = fit([w], lambda step: (w**2).sum() / 2, steps=10, optimizer=sgd(0.1))
    assert w.item() == pytest.approx(0.9**10, rel=1e-12)
    assert history["loss"] == pytest.approx([0.5 * 0.81**k for k in range(10)], rel=1e-12)
    assert history["step"] == list(range(11))


def test_history_is_written_before_the_first_update_every_so_often_and_after_the_last():
    w = weight()
    history = fit(
        [w],
        lambda step: (w**2).sum() / 2,
        steps=7,
        optimizer=sgd(0.1),
        callback=lambda step: {"w": w.item(), "graph": (2 * w).requires_grad},
        every=3,
    )
    assert history["step"] == [0, 3, 6, 7]
    assert history["w"] == pytest.approx([0.9**k for k in (0, 3, 6, 7)])
    assert history["graph"] == [False] * 4
    assert len(history["loss"]) == 7


def test_no_steps_change_nothing_and_are_noted_once():
    w = weight(3.0)
    assert fit([w], lambda step: w.sum(), steps=0, optimizer=sgd(1.0)) == {"step": [0], "loss": []}
    assert w.item() == 3.0


def test_the_loss_is_told_the_step_and_the_schedule_is_followed():
    w, seen = weight(0.0), []

    def loss(step):
        seen.append(step)
        return -w.sum()  # each update adds the learning rate

    halve = lambda opt: torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)  # noqa: E731
    fit([w], loss, steps=4, optimizer=sgd(1.0), schedule=halve)
    assert seen == [0, 1, 2, 3]
    assert w.item() == pytest.approx(1 + 1 / 2 + 1 / 4 + 1 / 8)


def test_a_module_trains_all_its_parameters_and_a_generator_of_tensors_is_fine():
    module = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in module.parameters()]
    fit(module, lambda step: module(torch.ones(1, 2)).sum(), steps=1, optimizer=sgd(1.0))
    moved = [b - p.detach() for b, p in zip(before, module.parameters(), strict=True)]
    torch.testing.assert_close(moved, [torch.ones(1, 2), torch.ones(1)])
    w = weight()
    fit((p for p in [w]), lambda step: w.sum(), steps=1, optimizer=sgd(0.5))
    assert w.item() == 0.5


def test_a_diverged_run_says_loss_step_and_learning_rate_and_keeps_the_parameters():
    w = weight()  # the updates give 1 - 1e100 and then about 1e200, whose square is no double
    with pytest.raises(
        TrainingDiverged, match=r"the loss is inf at step 2 \(learning rate 1e\+100\); lower it"
    ):
        fit([w], lambda step: (w**2).sum() / 2, steps=9, optimizer=sgd(1e100))
    assert w.item() == pytest.approx(1e200)


def test_nan_is_divergence_too():
    w = weight()
    with pytest.raises(TrainingDiverged, match=r"nan at step 0 \(learning rate 0\.1\)"):
        fit([w], lambda step: (w * float("nan")).sum(), steps=1, optimizer=sgd(0.1))
    assert w.item() == 1.0


@pytest.mark.parametrize("options", [{"steps": -1}, {"steps": 1, "every": 0}])
def test_impossible_step_counts_are_refused(options):
    with pytest.raises(ValueError, match="steps must be >= 0 and every >= 1"):
        fit([weight()], lambda step: None, optimizer=sgd(0.1), **options)


@pytest.mark.parametrize("params", [[], [torch.ones(1)]])
def test_nothing_to_train_is_refused(params):
    with pytest.raises(ValueError, match="nothing to train"):
        fit(params, lambda step: None, steps=1, optimizer=sgd(0.1))


def test_saved_bytes_counts_storages_once_and_lets_go_of_them():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    once = 4 * (
        32 * 8 + 32 * 16 + 16 * 4 + 32 * 4
    )  # input, hidden layer, second weight, exponential

    def steps(n, at_once):
        losses = []
        for _ in range(n):
            loss = net(x).exp().sum()
            loss.backward() if at_once else losses.append(loss)
        if losses:
            sum(losses).backward()

    assert [saved_bytes(lambda n=n: steps(n, True)) for n in (1, 2, 5)] == [once] * 3
    again = 4 * (32 * 16 + 32 * 4)  # input and weight are shared
    assert [saved_bytes(lambda n=n: steps(n, False)) for n in (1, 2, 5)] == [
        once + (n - 1) * again for n in (1, 2, 5)
    ]
    with torch.no_grad():
        assert saved_bytes(lambda: net(x)) == 0
