"""SLTT and BPTT against the recursion written out, autograd of plain formulas, limits, and other libraries."""

from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnlib.efficiency import spiking_through_time as stt
from nnlib.training import saved_bytes

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_net(widths, tau=1.1, seed=0, surrogate=stt.triangle, v_threshold=1.0):
    """Linear and LIF layers without normalisation, float64; weights large enough for spikes in all layers."""
    layers = []
    for m, n in pairwise(widths[:-1]):
        layers += [nn.Linear(m, n), stt.LIF(tau, v_threshold, surrogate)]
    net = nn.Sequential(*layers, nn.Linear(*widths[-2:])).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator(seed), dtype=F64) / p.shape[-1] ** 0.5
        p.data *= 2.0 if p.ndim > 1 else 0.5
    return net


def problem(T=5, B=7, n=6, classes=3, seed=1):
    g = generator(seed)
    return (
        torch.randn(T, B, n, generator=g, dtype=F64),
        torch.randint(0, classes, (B,), generator=g),
    )


def gradients(net, backward, *args, **keywords):
    net.zero_grad(set_to_none=True)
    backward(net, *args, **keywords)
    return [p.grad.clone() for p in net.parameters()]


def by_hand(net, *args, **keywords):
    linear = [m for m in net if isinstance(m, nn.Linear)]
    found = stt.manual_backward(
        [m.weight.detach() for m in linear], [m.bias.detach() for m in linear], *args, **keywords
    )
    return [g for pair in zip(found.weights, found.biases, strict=True) for g in pair], found


def largest(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


@pytest.mark.parametrize(
    ("surrogate", "values"),
    [
        (stt.triangle, [0.0, 0.5, 1.0, 0.5, 0.0]),
        (stt.rectangle, [0.0, 0.0, 1.0, 0.0, 0.0]),
        (
            lambda x: stt.sigmoid_slope(x, 2.0),
            [0.20998717, 0.39322387, 0.5, 0.39322387, 0.20998717],
        ),
    ],
)
def test_surrogates_have_the_stated_values_and_area_one(surrogate, values):
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(surrogate(x), torch.tensor(values, dtype=F64))
    grid = torch.linspace(-20, 20, 400_001, dtype=F64)
    assert torch.trapezoid(surrogate(grid), grid).item() == pytest.approx(1, abs=2e-4)


def test_triangle_with_another_slope():
    x = torch.tensor([0.0, 0.25, -0.4, 0.5, 0.6], dtype=F64)
    expected = (-4 * x.abs() + 2).clamp(min=0)
    torch.testing.assert_close(stt.triangle(x, 2.0), expected)


def test_the_threshold_itself_fires():
    assert stt.LIF()(torch.tensor([1.0, 1.0 - 1e-6])).tolist() == [1.0, 0.0]


def test_without_memory_a_neuron_fires_if_and_only_if_its_current_reaches_the_threshold():
    lif = stt.LIF(tau=1.0)
    current = torch.tensor([0.5, 0.999, 1.0, 1.7], dtype=F64)
    for _ in range(4):
        assert lif(current).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("tau", [1.1, 2.0, 5.0])
def test_a_small_constant_current_never_fires_and_its_potential_nears_the_fixed_point(tau):
    lif, leak = stt.LIF(tau), 1 - 1 / tau
    current = torch.tensor([0.9 * (1 - leak), 1.1 * (1 - leak)], dtype=F64)
    spikes = torch.stack([lif(current) for _ in range(200)])
    assert spikes[:, 0].sum() == 0 and lif.v[0].item() == pytest.approx(0.9)
    assert spikes[:, 1].sum() > 0


def test_soft_reset_follows_the_equations_step_by_step():
    lif = stt.LIF(tau=2.0, v_threshold=0.5)
    current, v = torch.tensor([0.2, 0.6, 1.4], dtype=F64), torch.zeros(3, dtype=F64)
    for _ in range(6):
        u = 0.5 * v + current
        s = (u >= 0.5).double()
        v = u - 0.5 * s
        assert torch.equal(lif(current), s)
        torch.testing.assert_close(lif.v, v)


class _Step(torch.autograd.Function):
    """A spike with the triangle's slope, to write the neuron in ordinary autograd operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


@pytest.mark.parametrize("cut", [False, True])
def test_the_fused_step_has_the_gradient_of_the_plain_operations(cut):
    leak, threshold = 0.6, 1.3
    currents = 2 * torch.randn(5, 40, generator=generator(), dtype=F64)
    weights = torch.randn(5, 40, generator=generator(2), dtype=F64)

    a = currents.clone().requires_grad_()
    lif = stt.LIF(1 / (1 - leak), threshold, through_time=not cut)
    (weights * torch.stack([lif(c) for c in a])).sum().backward()

    b, v, total = currents.clone().requires_grad_(), torch.zeros(40, dtype=F64), 0.0
    for t in range(5):
        u = leak * (v.detach() if cut else v) + b[t]
        s = _Step.apply(u - threshold)
        v = u - threshold * s
        total = total + (weights[t] * s).sum()
    total.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tau", [1.0, 1.1, 4.0])
@pytest.mark.parametrize("surrogate", [stt.triangle, stt.rectangle, stt.sigmoid_slope])
def test_the_recursion_equals_autograd(tau, surrogate):
    net, (frames, y) = plain_net([6, 9, 8, 3], tau, surrogate=surrogate), problem()
    full = gradients(net, stt.bptt_backward, frames, y, cross_entropy)
    spatial = gradients(net, stt.sltt_backward, frames, y, cross_entropy)
    keywords = dict(tau=tau, surrogate=surrogate)
    assert largest(full, by_hand(net, frames, y, **keywords)[0]) < 1e-13
    assert largest(spatial, by_hand(net, frames, y, through_time=False, **keywords)[0]) < 1e-13
    assert (largest(full, spatial) < 1e-14) == (tau == 1.0)


def test_with_one_step_both_methods_agree():
    net, (frames, y) = plain_net([6, 9, 8, 3], tau=4.0), problem(T=1)
    full = gradients(net, stt.bptt_backward, frames, y)
    assert largest(full, gradients(net, stt.sltt_backward, frames, y)) < 1e-14


def test_the_sigmoid_slope_is_the_derivative_of_the_smooth_step():
    u = torch.randn(30, generator=generator(), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad((4.0 * u).sigmoid().sum(), u)
    torch.testing.assert_close(stt.sigmoid_slope(u.detach()), slope)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_mean_over_all_subsets_is_k_over_t_of_sltt(k):
    net, (frames, y) = plain_net([6, 9, 8, 3], tau=2.0), problem(T=5)
    whole = by_hand(net, frames, y, tau=2.0, through_time=False)[0]
    subsets = list(combinations(range(5), k))
    parts = [by_hand(net, frames, y, tau=2.0, through_time=False, steps=s)[0] for s in subsets]
    mean = [torch.stack(gs).mean(0) for gs in zip(*parts, strict=True)]
    assert largest(mean, [k / 5 * g for g in whole]) < 1e-15


def test_sltt_k_is_the_recursion_on_the_drawn_steps_and_all_steps_give_sltt():
    net, (frames, y) = plain_net([6, 9, 8, 3], tau=2.0), problem(T=5)
    drawn = torch.randperm(5, generator=generator(3))[:2].tolist()
    ours = gradients(net, stt.sltt_backward, frames, y, cross_entropy, k=2, generator=generator(3))
    hand = by_hand(net, frames, y, tau=2.0, through_time=False, steps=drawn)[0]
    assert largest(ours, hand) < 1e-14
    assert (
        largest(
            gradients(net, stt.sltt_backward, frames, y, k=5),
            gradients(net, stt.sltt_backward, frames, y),
        )
        < 1e-15
    )


@pytest.mark.parametrize("tau", [1.1, 2.0, 4.0])
def test_the_part_through_time_is_bounded_by_tau_minus_one(tau):
    net, (frames, y) = plain_net([6, 9, 8, 3], tau), problem(T=12, B=50)
    found = by_hand(net, frames, y, tau=tau)[1]
    for e, spatial, decay in zip(found.errors, found.spatial, found.decay, strict=True):
        assert decay.min() >= 0 and decay.max() <= 1 - 1 / tau + 1e-15
        bound = (tau - 1) * spatial.abs().amax(0)
        assert ((e - spatial).abs() <= bound + 1e-15).all()
        assert (e - spatial).abs().max() > 0  # so that the bound says something


def test_the_forward_pass_is_the_same_in_all_methods():
    frames, y = problem(T=6, B=30)
    states, outputs = [], []
    for backward, keywords in [
        (stt.bptt_backward, {}),
        (stt.sltt_backward, {}),
        (stt.sltt_backward, {"k": 2}),
    ]:
        torch.manual_seed(0)
        net = stt.spiking_mlp([6, 9, 8, 3], tau=2.0).double()
        outputs.append(backward(net, frames, y, **keywords))
        states.append([m.v.detach() for m in net if isinstance(m, stt.LIF)] + list(net.buffers()))
    for other, output in zip(states[1:], outputs[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))
        torch.testing.assert_close(output, outputs[0])


def test_memory_is_constant_for_sltt_and_affine_for_bptt():
    y = torch.zeros(8, dtype=torch.long)
    net = stt.spiking_mlp([6, 9, 8, 3])
    x = torch.randn(8, 6, generator=generator())
    count = {}
    for backward in (stt.bptt_backward, stt.sltt_backward):
        count[backward] = [
            saved_bytes(lambda T=T, b=backward: b(net, x.expand(T, 8, 6), y)) for T in (1, 2, 3, 7)
        ]
    bptt, sltt = count.values()
    assert sltt == [sltt[0]] * 4 and bptt[0] == sltt[0]
    # per step and sample: BatchNorm's input, the distance to the threshold and the spikes of 17 neurons; their
    # statistics; and three tensors and a number for the two losses
    step = 4 * (8 * 3 * 17 + 2 * 17 + 3 * 8 * 3 + 1)
    assert [b - bptt[0] for b in bptt] == [0, step, 2 * step, 6 * step]


@pytest.mark.parametrize(
    ("T", "k", "through_time", "known"),
    [(6, 6, True, 263_680), (6, 6, False, 261_120), (6, 2, False, 87_040), (12, 1, False, 43_520)],
)
def test_multiplications_agree_with_the_recursion_that_counts_them(T, k, through_time, known):
    widths = [64, 128, 128, 10]
    net, (frames, y) = plain_net(widths), problem(T=T, B=2, n=64, classes=10)
    steps = range(k)
    counted = by_hand(net, frames, y, through_time=through_time, steps=steps)[1].multiplications
    formula = stt.backward_multiplications(widths, k, through_time=through_time)
    assert counted == formula == known


def test_similarity_is_the_cosine_of_the_two_gradients_and_leaves_the_network_alone():
    frames, y = problem(T=6, B=30)
    torch.manual_seed(0)
    net = stt.spiking_mlp([6, 9, 8, 3], tau=3.0).double()
    stt.bptt_backward(net, frames, y)
    grads = [p.grad.clone() for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    found = stt.gradient_similarity(net, frames, y)
    assert list(found) == ["0.weight", "3.weight"]
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    full = gradients(net, stt.bptt_backward, frames, y)[0].flatten()
    for buffer, value in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(value)
    spatial = gradients(net, stt.sltt_backward, frames, y)[0].flatten()
    cosine, missing = found["0.weight"]
    assert cosine == pytest.approx(F.cosine_similarity(full, spatial, dim=0).item())
    assert missing == pytest.approx(((full - spatial).norm() / full.norm()).item())
    assert 0.5 < cosine < 0.9999 and 0.01 < missing < 1


def test_similarity_is_one_without_memory():
    frames, y = problem()
    found = stt.gradient_similarity(plain_net([6, 9, 8, 3], tau=1.0), frames, y)
    assert all(s == pytest.approx((1, 0), abs=1e-12) for s in found.values())


def test_loss_is_the_stated_mixture():
    logits, y = torch.randn(4, 3, generator=generator(), dtype=F64), torch.tensor([0, 2, 1, 1])
    ce = -logits.log_softmax(1)[range(4), y].mean()
    ones = (logits - 1).square().mean()
    hot = (logits - torch.eye(3, dtype=F64)[y]).square().mean()
    torch.testing.assert_close(stt.tet_loss(logits, y), 0.95 * ce + 0.05 * ones)
    torch.testing.assert_close(stt.tet_loss(logits, y, 0.3, one_hot=True), 0.7 * ce + 0.3 * hot)


def test_both_methods_of_a_residual_network_run_through_its_shortcuts():
    torch.manual_seed(0)
    net = stt.spiking_resnet(1, 3, width=4, blocks=(1, 1)).double()
    g = generator()
    frames = torch.rand(4, 8, 1, 8, 8, generator=g, dtype=F64)
    cosines = stt.gradient_similarity(net, frames, torch.randint(0, 3, (8,), generator=g))
    assert len(cosines) == 6  # the stem, two in each block, and the shortcut that halves the side
    assert min(s.cosine for s in cosines.values()) > 0.8
    count = sum(p.numel() for p in stt.spiking_resnet().parameters())
    assert 11.1e6 < count < 11.2e6  # ResNet-18 for CIFAR has 11.17 million


def test_events_of_a_still_image_and_their_two_signs():
    images = torch.rand(20, 8, 8, generator=generator())
    frames = stt.drifting_events(images, 6, generator=generator(1))
    assert frames.shape == (6, 20, 200) and set(frames.unique().tolist()) == {0.0, 1.0}
    on, off = frames.view(6, 20, 2, 100).unbind(2)
    assert (on * off).sum() == 0 and on.sum() > 0 and off.sum() > 0
    assert stt.drifting_events(torch.zeros(3, 8, 8), 4).sum() == 0
    assert stt.drifting_events(images, 4, threshold=1.0).sum() == 0


def test_events_of_a_single_bright_pixel_follow_it():
    image = torch.zeros(50, 8, 8)
    image[:, 3, 3] = 1.0
    frames = stt.drifting_events(image, 5, generator=generator()).view(5, 50, 2, 100)
    on, off = frames.unbind(2)
    moved = on.sum(2) > 0
    assert torch.equal(on.sum(2), off.sum(2)) and moved.any()  # it leaves one place and enters one
    for t in range(1, 5):  # the place it leaves is where it last arrived
        both = moved[t] & moved[t - 1]
        assert torch.equal(off[t][both], on[t - 1][both])


@pytest.mark.parametrize("surrogate", [stt.triangle, stt.rectangle, stt.sigmoid_slope])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_surrogates_refuse_a_scale_that_is_not_positive(surrogate, value):
    with pytest.raises(ValueError, match=f"{value}"):
        surrogate(torch.zeros(2), value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stt.LIF(tau=0.9), "0.9"),
        (lambda: stt.LIF(tau=float("nan")), "nan"),
        (lambda: stt.LIF(v_threshold=0.0), "0.0"),
        (lambda: stt.reset_state(nn.Linear(2, 2)), "Linear"),
        (lambda: stt.set_through_time(nn.Linear(2, 2), True), "Linear"),
        (lambda: stt.tet_loss(torch.zeros(2, 3), torch.tensor([0, 1]), beta=1.5), "1.5"),
        (lambda: stt.backward_multiplications([4, 3], 2, through_time=True), r"\[4, 3\]"),
        (lambda: stt.backward_multiplications([4, 3, 2], 0, through_time=True), "steps 0"),
        (lambda: stt.spiking_mlp([4, 3]), r"\[4, 3\]"),
        (lambda: stt.spiking_mlp([4, 0, 3]), r"\[4, 0, 3\]"),
        (lambda: stt.spiking_resnet(width=0), "width=0"),
        (lambda: stt.drifting_events(torch.zeros(1, 8, 8), 0), "steps=0"),
        (lambda: stt.drifting_events(torch.zeros(1, 8, 8), 3, threshold=-0.1), "-0.1"),
    ],
)
def test_bad_settings_are_refused_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("k", [0, 6, -1])
def test_a_number_of_steps_outside_of_the_sequence_is_refused(k):
    frames, y = problem(T=5)
    with pytest.raises(ValueError, match=f"got {k}"):
        stt.sltt_backward(plain_net([6, 9, 8, 3]), frames, y, k=k)


@pytest.mark.parametrize("backward", [stt.bptt_backward, stt.sltt_backward])
def test_an_empty_sequence_is_refused(backward):
    frames, y = problem(T=5)
    with pytest.raises(ValueError, match=r"\(0, 7, 6\)"):
        backward(plain_net([6, 9, 8, 3]), frames[:0], y)


def test_the_recursion_refuses_what_does_not_fit():
    net, (frames, y) = plain_net([6, 9, 8, 3]), problem(T=5)
    with pytest.raises(ValueError, match=r"got \[0, 1\]"):
        by_hand(net, frames, y, steps=[0, 1])
    with pytest.raises(ValueError, match=r"got \[5\]"):
        by_hand(net, frames, y, steps=[5], through_time=False)
    with pytest.raises((ValueError, TypeError), match="5 inputs"):
        by_hand(net, frames[..., :5], y)


def test_a_new_batch_shape_needs_a_reset():
    lif = stt.LIF()
    lif(torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match=r"\(4, 2\).*\(3, 2\)"):
        lif(torch.zeros(4, 2))
    stt.reset_state(lif)
    lif(torch.zeros(4, 2))


def _sequence_gradient(layer, weight, frames, readout):
    """Spikes and weight gradient of one layer, driven by `layer` step by step."""
    w = weight.clone().requires_grad_()
    spikes = torch.stack([layer(frame @ w.T) for frame in frames])
    (spikes * readout).sum().backward()
    return spikes.detach(), w.grad


@pytest.mark.parametrize("through_time", [True, False])
def test_agreement_with_spikingjelly(through_time):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    kind = neuron.LIFNode if through_time else neuron.SLTTLIFNode
    peer = kind(
        tau=2.0,
        decay_input=False,
        v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=False,
    )
    frames = torch.randn(6, 5, 4, generator=generator())
    weight = torch.randn(3, 4, generator=generator(1))
    readout = torch.randn(6, 5, 3, generator=generator(2))
    ours = _sequence_gradient(stt.LIF(2.0, through_time=through_time), weight, frames, readout)
    theirs = _sequence_gradient(peer, weight, frames, readout)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_spikes_agree_with_snntorch():
    snn = pytest.importorskip("snntorch")
    peer = snn.Leaky(beta=0.5, threshold=1.0, reset_mechanism="subtract", reset_delay=False)
    lif, mem = stt.LIF(2.0), None
    # its reset counts potentials above the threshold twice, which currents below 1.5 never reach
    for frame in 2 * torch.rand(8, 200, generator=generator()) - 0.5:
        spikes, mem = peer(frame, mem)
        assert torch.equal(lif(frame), spikes)
        torch.testing.assert_close(lif.v, mem)
