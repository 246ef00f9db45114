import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nnlib.hypernetworks import magnitude_invariant as mip

F64 = torch.float64
SHAPES = {
    "first.weight": (7, 5),
    "first.bias": (7,),
    "norm.weight": (7,),
    "last.weight": (2, 7),
    "last.bias": (2,),
}
DEFAULT = {"encoding": None, "residual": False}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hypernetwork(input_dim=1, shapes=SHAPES, hidden=(6, 9), seed=0, **options):
    return mip.HyperNetwork(input_dim, shapes, hidden, generator=generator(seed), **options).to(F64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=F64)


def slope(x, y):
    x, y = x.log(), y.log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


class MLP(nn.Module):
    def __init__(self, depth=2, width=8, bias=True):
        super().__init__()
        sizes = [3, *[width] * (depth - 1), 2]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)


# --- proportionality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
@pytest.mark.parametrize("input_dim", [1, 3])
@pytest.mark.parametrize("hidden", [(6,), (6, 9), (4, 5, 6, 7)])
def test_default_is_positively_homogeneous(activation, input_dim, hidden):
    h = hypernetwork(input_dim, hidden=hidden, activation=activation, **DEFAULT)
    gamma = torch.randn(4, input_dim, generator=generator(1), dtype=F64)
    for c in (0.01, 0.1, 2.0):
        torch.testing.assert_close(h.flat(c * gamma), c * h.flat(gamma), rtol=1e-12, atol=1e-15)


def test_a_negative_scalar_lies_on_another_ray():
    h = hypernetwork(**DEFAULT)
    plus, minus = h.flat(torch.tensor([[1.0], [-1.0]], dtype=F64))
    torch.testing.assert_close(
        h.flat(torch.tensor([-0.3], dtype=F64)), 0.3 * minus, rtol=1e-12, atol=1e-15
    )
    assert F.cosine_similarity(plus, -minus, dim=0) < 0.99  # the map is not linear


@pytest.mark.parametrize("change", ["tanh", "biases", "MIP"])
def test_proportionality_needs_its_assumptions(change):
    options = {"activation": "tanh"} if change == "tanh" else {}
    h = hypernetwork(**options) if change == "MIP" else hypernetwork(**DEFAULT, **options)
    if change == "biases":
        with torch.no_grad():
            h.backbone[0].bias.fill_(0.1)
    grid = torch.logspace(-2, 0, 9, dtype=F64)[:, None]
    assert abs(slope(grid[:, 0], mip.weight_scale(h, grid)) - 1) > 1e-3


def test_layer_norm_hides_a_positive_scalar():
    gammas = torch.tensor([[0.1], [0.9]], dtype=F64)
    for norm, low, high in [("layer", 0.0, 1e-9), (None, 0.888, 0.889)]:
        one, two = hypernetwork(hidden=(16, 64, 128), norm=norm, **DEFAULT).flat(gammas)
        assert low <= (one - two).norm() / two.norm() <= high


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_update_of_weights_grows_like_gamma_to_the_depth(depth):
    h, model = mip.hypernetize(MLP(depth, bias=False).to(F64), generator=generator(), **DEFAULT)
    x, probe = uniform(5, 3), torch.randn(5, 2, generator=generator(2), dtype=F64)
    grid = torch.tensor([[0.01], [0.1], [1.0]], dtype=F64)
    norms = mip.update_norms(h, lambda gamma: (probe * model(gamma, x)).sum(), grid)
    assert slope(grid[:, 0], norms) == pytest.approx(depth, abs=1e-9)


def test_update_norms_leave_the_rows_of_biases_out():
    h, model = mip.hypernetize(MLP().to(F64), generator=generator())
    x, gamma = uniform(5, 3), torch.tensor([0.3], dtype=F64)
    model(gamma, x).square().sum().backward()
    rows = dict(zip(h.shapes, h.output.weight.grad.split(h.sizes), strict=True))
    wanted = torch.cat([g for name, g in rows.items() if name.endswith("weight")]).norm()
    got = mip.update_norms(h, lambda g: model(g, x).square().sum(), gamma[None])
    torch.testing.assert_close(got, wanted[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [1, 3, 5])
def test_relative_variance_of_a_power(power):
    grid = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    assert mip.relative_variance(grid**power) == pytest.approx(power**2 / (2 * power + 1), rel=1e-5)
    assert mip.relative_variance(torch.full((4,), 3.0)) == 0


# --- encoding ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_encoding_has_constant_norm(values):
    code = mip.encode_l2(torch.tensor(values, dtype=F64))
    assert code.square().sum().item() == pytest.approx(len(values), abs=1e-12)


def test_encoding_puts_cosines_first_and_keeps_inputs_apart():
    code = mip.encode_l2(torch.tensor([[0.0, 1.0], [1 / 3, 2 / 3]], dtype=F64))
    half, root = 0.5, math.sqrt(3) / 2
    wanted = torch.tensor([[1, 0, 0, 1], [root, half, half, root]], dtype=F64)
    torch.testing.assert_close(code, wanted, rtol=0, atol=1e-15)
    grid = torch.linspace(0, 1, 101, dtype=F64)[:, None]
    angle = torch.atan2(mip.encode_l2(grid)[:, 1], mip.encode_l2(grid)[:, 0])
    torch.testing.assert_close(
        angle * 2 / math.pi, grid[:, 0], rtol=0, atol=1e-14
    )  # it can be inverted


# --- the hypernetwork -------------------------------------------------------------------------------------


def test_residual_is_an_additive_parameter():
    h, bare = hypernetwork(), hypernetwork(residual=False)
    with torch.no_grad():
        for mine, theirs in zip(h.parameters(), bare.parameters(), strict=True):
            if mine is not h.output.bias:
                theirs.copy_(mine)
    theta_0 = {name: t.detach().clone().requires_grad_() for name, t in h.base_parameters().items()}
    gamma = uniform(4, 1)
    mine = h(gamma)
    other = {name: t + theta_0[name] for name, t in bare(gamma).items()}
    for name in SHAPES:
        torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-12)
    sum(t.pow(3).sum() for t in mine.values()).backward()
    sum(t.pow(3).sum() for t in other.values()).backward()
    gradients = dict(zip(SHAPES, h.output.bias.grad.split(h.sizes), strict=True))
    for name, t in theta_0.items():
        torch.testing.assert_close(gradients[name], t.grad.flatten(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        h.backbone[0].weight.grad, bare.backbone[0].weight.grad, rtol=0, atol=1e-12
    )


def test_theta_0_starts_like_an_ordinary_network():
    shapes = {"a.weight": (80, 50, 3, 3), "a.bias": (80,), "norm.weight": (80,)}
    base = mip.HyperNetwork(1, shapes, (2,), generator=generator()).base_parameters()
    assert base["a.weight"].std().item() == pytest.approx(
        math.sqrt(2 / 1.0001 / (50 * 9)), rel=0.02
    )
    assert base["a.bias"].abs().max() == 0 and base["norm.weight"].eq(1).all()
    bare = mip.HyperNetwork(1, shapes, (2,), residual=False, generator=generator())
    assert bare.output.bias.abs().max() == 0


def test_rows_of_each_tensor_are_a_layer_of_their_own():
    shapes = {"a.weight": (60, 10), "b.weight": (20, 5), "a.bias": (60,)}
    for init, fans in [("fan_out", (600, 100)), ("fan_in", (128, 128))]:
        h = mip.HyperNetwork(1, shapes, init=init, generator=generator())
        blocks = h.output.weight.split(h.sizes)
        for block, fan in zip(blocks, fans, strict=False):
            assert block.std().item() == pytest.approx(math.sqrt(2 / 1.0001 / fan), rel=0.05)
        assert blocks[2].abs().max() == 0
    assert h.backbone[0].weight.shape == (16, 2)  # D = 1, encoded


def test_a_batch_equals_a_loop():
    h = hypernetwork(2)
    gammas = uniform(5, 2)
    batch = h(gammas)
    for i, gamma in enumerate(gammas):
        for name, tensor in h(gamma).items():
            assert tensor.shape == SHAPES[name]
            torch.testing.assert_close(batch[name][i], tensor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, DEFAULT, {"norm": "layer"}, {"activation": "gelu"}])
def test_gradients_of_all_parameters_against_finite_differences(options):
    h = hypernetwork(1, {"weight": (1, 2), "bias": (1,)}, hidden=(3, 4), **options)
    x, names = uniform(6, 2), [name for name, _ in h.named_parameters()]
    gamma = torch.tensor([0.4], dtype=F64)

    def loss(*parameters):
        theta = torch.func.functional_call(h, dict(zip(names, parameters, strict=True)), gamma)
        return (x @ theta["weight"].T + theta["bias"]).sin().sum()

    assert torch.autograd.gradcheck(
        loss, [p.detach().clone().requires_grad_() for p in h.parameters()]
    )


@pytest.mark.parametrize("encoding, mode", [("l2", "cos|sin"), (None, None)])
def test_equals_the_official_library_with_the_same_weights(encoding, mode):
    hyperlight = pytest.importorskip("hyperlight")
    shapes = {k: v for k, v in SHAPES.items() if len(v) > 1 or k.endswith("bias")}
    mine = mip.HyperNetwork(2, shapes, (6, 9), encoding=encoding, generator=generator())
    theirs = hyperlight.HyperNet({"gamma": (2,)}, shapes, [6, 9], encoding=mode)
    with torch.no_grad():
        for p, q in zip(mine.parameters(), theirs.backbone.parameters(), strict=True):
            q.copy_(p)
    gammas = uniform(3, 2).float()
    wanted, got = theirs(gamma=gammas), mine(gammas)
    for name in shapes:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-6)


# --- hypernetize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_hypernetized_equals_the_network_written_out(bias):
    net = MLP(3, bias=bias).to(F64)
    h, model = mip.hypernetize(net, generator=generator())
    assert h.shapes == {name: tuple(p.shape) for name, p in net.state_dict().items()}
    x, gammas = uniform(5, 3), uniform(4, 1)
    for gamma, out in zip(gammas, model(gammas, x), strict=True):
        theta, z = h(gamma), x
        for i in range(3):
            z = z @ theta[f"layers.{i}.weight"].T + theta.get(f"layers.{i}.bias", 0)
            z = torch.where(z > 0, z, 0.2 * z) if i < 2 else z
        torch.testing.assert_close(model(gamma, x), z, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out, z, rtol=1e-12, atol=1e-14)


def test_the_module_is_where_training_starts_and_stays_as_it_was():
    net = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).to(F64).eval()
    )
    before = {name: t.clone() for name, t in net.state_dict().items()}
    h, model = mip.hypernetize(net, generator=generator())
    with torch.no_grad():
        h.output.weight.zero_()  # no change predicted: the module itself, whatever gamma
    x = uniform(5, 3)
    torch.testing.assert_close(
        model(torch.tensor([0.7], dtype=F64), x), net(x), rtol=1e-12, atol=1e-14
    )
    model(torch.tensor([0.7], dtype=F64), x).sum().backward()
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_only_the_named_parameters_are_predicted_and_the_rest_is_trained():
    h, model = mip.hypernetize(MLP().to(F64), ["layers.1.weight"], generator=generator())
    assert list(h.shapes) == ["layers.1.weight"]
    model(torch.tensor([0.5], dtype=F64), uniform(5, 3)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert "primary.layers.0.weight" in trained and "primary.layers.1.weight" not in trained
    assert h.output.bias.grad.abs().max() > 0  # theta^0 is trained


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_encoding_refuses_what_is_not_in_the_unit_interval(value):
    with pytest.raises(ValueError, match=r"\[0, 1\], got"):
        mip.encode_l2(torch.tensor([0.5, value]))
    assert mip.encode_l2(torch.tensor([1 + 5e-7, -5e-7])).isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_dim": 0}, "at least 1, got input_dim=0"),
        ({"shapes": {}}, "shapes={}"),
        ({"shapes": {"a": (3, 0)}}, "at least 1"),
        ({"hidden": (4, 0)}, r"hidden=\(4, 0\)"),
        ({"encoding": "sine"}, "unknown encoding 'sine'"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"init": "zeros"}, "unknown init 'zeros'"),
        ({"base": {"a": torch.zeros(2)}}, "base needs residual=True"),
        ({"base": {"a.weight": torch.zeros(2, 3)}, "residual": False}, "got residual=False"),
    ],
)
def test_construction_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        mip.HyperNetwork(**{"input_dim": 1, "shapes": {"a.weight": (2, 3)}} | change)


def test_forward_refuses_wrong_shape_and_integers():
    h = hypernetwork(2)
    for shape in [(3,), (4, 1), (2, 2, 2)]:
        with pytest.raises(ValueError, match=r"gamma must be \(2,\) or \(batch, 2\)"):
            h(torch.zeros(shape, dtype=F64))
    with pytest.raises(TypeError):
        h(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("names", [[], ["layers.7.weight"]])
def test_hypernetize_refuses_names_the_module_lacks(names):
    with pytest.raises(ValueError, match="choose from the module's parameters"):
        mip.hypernetize(MLP(), names)
