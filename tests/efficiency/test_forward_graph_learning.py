from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnlib.efficiency import forward_graph_learning as fgl

F64 = torch.float64
SHORT = fgl.Recipe(hidden=8, lr=0.01, epochs=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def weights():
    torch.manual_seed(0)


@pytest.fixture
def task():
    return fgl.csbm(60, 3, degree=5.0, features=6, distance=2.0, generator=generator())


def double(task):
    return replace(task, x=task.x.double())


def dense(edge_index, n):
    a = torch.zeros(n, n, dtype=F64)
    a[edge_index[1], edge_index[0]] = 1
    return a


def dense_gcn(edge_index, n):
    a = dense(edge_index, n) + torch.eye(n)
    scale = a.sum(1).rsqrt()
    return scale[:, None] * a * scale


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# Graphs and convolutions


def test_gcn_operator_is_the_dense_formula_and_has_eigenvalue_one(task):
    n = len(task.x)
    a = fgl.gcn_operator(task.edge_index, n, F64).to_dense()
    torch.testing.assert_close(a, dense_gcn(task.edge_index, n))
    assert torch.equal(a, a.T)
    root = (torch.bincount(task.edge_index[1], minlength=n) + 1).double().sqrt()
    torch.testing.assert_close(a @ root, root)  # the largest eigenvalue is 1
    assert torch.linalg.eigvalsh(a).abs().max() <= 1 + 1e-12


def test_constant_matrix_multiplies_differentiates_and_counts():
    a = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], dtype=F64)
    matrix, x = fgl.ConstantMatrix(a.to_sparse_csr()), random(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matrix @ x, x)
    matrix.products = 0
    (matrix @ x).square().sum().backward()
    assert matrix.products == 2  # forward and backward
    torch.testing.assert_close(x.grad, 2 * a.T @ a @ x)


@pytest.mark.parametrize("kind", fgl.CONVS)
def test_convolutions_are_their_dense_formulas(task, kind):
    n, x = len(task.x), random(60, 6)
    conv, graph = fgl.CONVS[kind](6, 8).to(x), fgl.Graph(task.edge_index, x)
    nn.init.normal_(conv.bias)
    a = dense(task.edge_index, n)
    if kind == "gcn":
        expected = dense_gcn(task.edge_index, n) @ x @ conv.weight
    elif kind == "sage":
        mean = a / a.sum(1, keepdim=True).clamp_min(1)
        expected = x @ conv.weight[:6] + mean @ x @ conv.weight[6:]
    else:
        parts = []
        for k in range(4):
            v = (x @ conv.weight)[:, 2 * k : 2 * k + 2]
            raw = F.leaky_relu((v @ conv.target[k])[:, None] + v @ conv.source[k], 0.2)
            raw[a + torch.eye(n) == 0] = -torch.inf
            parts.append(raw.softmax(1) @ v)
        expected = torch.cat(parts, 1)
    torch.testing.assert_close(conv(x, graph), expected + conv.bias)
    torch.testing.assert_close(conv.transform(conv.aggregate(x, graph), graph), conv(x, graph))
    assert graph.passes == 3


def test_attention_sums_to_one_over_what_a_node_receives(task):
    v, graph = random(60, 4, 2), fgl.Graph(task.edge_index, task.x.double())
    weight = fgl.GATConv(6, 8).double().attention(100 * v, graph)  # large logits: no overflow
    total = torch.zeros(60, 4, dtype=F64).index_add(0, graph.loops[1], weight)
    torch.testing.assert_close(total, torch.ones(60, 4, dtype=F64))


@pytest.mark.parametrize("kind", fgl.CONVS)
def test_convolutions_equal_torch_geometric(task, kind):
    peer = pytest.importorskip("torch_geometric.nn")
    conv, graph = fgl.CONVS[kind](6, 8), fgl.Graph(task.edge_index, task.x)
    state = conv.state_dict()
    if kind == "gcn":
        other, names = peer.GCNConv(6, 8), {"bias": state["bias"], "lin.weight": state["weight"].T}
    elif kind == "sage":
        other = peer.SAGEConv(6, 8)
        names = {"lin_l.bias": state["bias"], "lin_r.weight": state["weight"][:6].T}
        names["lin_l.weight"] = state["weight"][6:].T
    else:
        other, names = peer.GATConv(6, 2, heads=4), {"bias": state["bias"]}
        names |= {"att_src": state["source"][None], "att_dst": state["target"][None]}
        names["lin.weight"] = state["weight"].T
    other.load_state_dict(names)
    torch.testing.assert_close(conv(task.x, graph), other(task.x, task.edge_index))


@pytest.mark.parametrize("kind", fgl.CONVS)
def test_a_fixed_input_may_be_cached_or_sparse(task, kind):
    x = task.x * (task.x > 1.6)  # mostly zeros
    assert isinstance(fgl._compact(x), fgl.ConstantMatrix)
    conv, graph = fgl.CONVS[kind](6, 8), fgl.Graph(task.edge_index, x)
    for inputs in (x, task.x):
        outputs = [fgl.fixed_input(conv, inputs, graph, cache)() for cache in (True, False)]
        for out in outputs:
            torch.testing.assert_close(out, conv(inputs, graph).relu())


# The augmented graph


def test_class_nodes_are_counted_and_touch_training_nodes_only(task):
    x, edges = fgl.augment_with_class_nodes(task, generator=generator())
    n, count = len(task.x), int(task.train.sum())
    assert len(x) == n + 3 and torch.equal(x[:n], task.x)
    assert edges.shape[1] == task.edge_index.shape[1] + 2 * count
    new = edges[:, task.edge_index.shape[1] :]
    assert set(new.min(0).values.tolist()) == set(task.train.nonzero()[:, 0].tolist())
    there = new[:, new[0] < n]
    assert torch.equal(task.y[there[0]] + n, there[1])
    degree = torch.bincount(new.flatten(), minlength=n + 3)[n:]
    assert torch.equal(degree, 2 * torch.bincount(task.y[task.train]))
    assert torch.equal(dense(edges, n + 3), dense(edges, n + 3).T)
    _, one_way = fgl.augment_with_class_nodes(task, bidirectional=False)
    assert one_way.shape[1] == task.edge_index.shape[1] + count and (one_way[0] < n).all()


def test_local_gradient_is_that_of_the_dense_loss_and_of_finite_differences(task):
    model = fgl.SingleForwardGNN(double(task), SHORT, generator=generator())
    conv, x = fgl.GCNConv(6, 5).double(), fgl.row_normalize(model.x)
    model.loss(fgl.fixed_input(conv, x, model.graph)()).backward()
    a, w = dense_gcn(model.graph.edge_index, 63), conv.weight.detach().clone().requires_grad_()

    def loss(w):
        h = torch.relu(a @ x @ w)
        chosen = [-(h[i] @ h[60:].T).log_softmax(0)[task.y[i]] for i in task.train.nonzero()[:, 0]]
        return torch.stack(chosen).mean()

    torch.testing.assert_close(conv.weight.grad, torch.autograd.grad(loss(w), w)[0])
    step = 1e-6 * random(6, 5, seed=1)
    numeric = loss(w + step) - loss(w - step)
    torch.testing.assert_close((conv.weight.grad * 2 * step).sum(), numeric, rtol=1e-5, atol=0)


# Single forward


def test_finished_layers_and_their_predictions_do_not_change(task):
    model = fgl.SingleForwardGNN(task, SHORT, generator=generator()).fit(1)
    before = [p.clone() for p in model.layers[0].parameters()]
    shallow = model.scores()
    model.add_layer()
    for p, q in zip(before, model.layers[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(shallow, model.scores(depth=1)) and not torch.equal(shallow, model.scores())
    torch.testing.assert_close(model.scores().sum(1), torch.ones(60))


def test_cross_layer_gradients_are_diagonal_unless_layers_are_chained(task):
    model = fgl.SingleForwardGNN(task, SHORT, generator=generator()).fit(3)
    local, chained = (fgl.cross_layer_gradients(model, detach=d) for d in (True, False))
    assert torch.equal(local, local.diag().diag()) and (local.diag() > 0).all()
    assert torch.equal(chained, chained.tril()) and (chained[[1, 2, 2], [0, 0, 1]] > 0).all()
    torch.testing.assert_close(chained.diag(), local.diag())


def test_order_of_the_nodes_does_not_matter(task):
    order = torch.randperm(60, generator=generator(3))
    place = order.argsort()
    mixed = fgl.NodeTask(
        task.x[order],
        place[task.edge_index],
        task.y[order],
        *(m[order] for m in (task.train, task.val, task.test)),
    )
    answers = []
    for t in (task, mixed):
        torch.manual_seed(0)
        model = fgl.SingleForwardGNN(double(t), SHORT, generator=generator())
        answers.append(model.fit(2).scores())
    torch.testing.assert_close(answers[0][order], answers[1])


@pytest.mark.parametrize("kind", fgl.CONVS)
def test_caching_changes_nothing_but_the_number_of_products(task, kind):
    answers, products = [], []
    for cache in (True, False):
        torch.manual_seed(0)
        recipe = replace(SHORT, cache=cache, conv=kind)
        model = fgl.SingleForwardGNN(double(task), recipe, generator=generator()).fit(2)
        answers.append(model.scores())
        graph = model.graph
        products.append((graph.gcn if kind == "gcn" else graph.mean).products)
    torch.testing.assert_close(*answers, atol=1e-6, rtol=0)
    if kind != "gat":  # 12 updates: 13 outputs and gradients on the way, one output at the end
        assert products == [2, 2 * (13 + 13 + 1)]


def test_without_any_link_each_node_is_on_its_own(task):
    bare = replace(task, edge_index=task.edge_index[:, :0])
    model = fgl.SingleForwardGNN(bare, SHORT, bidirectional=False, generator=generator()).fit(1)
    conv = model.layers[0]
    hidden = F.relu(F.linear(F.normalize(task.x), conv.weight.T, conv.bias))
    keys = model.state[60:]  # what the class nodes make of the nodes that they hear
    torch.testing.assert_close(model.scores(), (hidden @ keys.T).softmax(1))


def test_early_stopping_keeps_the_best_state_and_waits_as_long_as_told():
    module = nn.Linear(1, 1, bias=False)
    values = iter([0.1, 0.5, 0.3, 0.4, 0.2, 0.9])
    seen = []

    def score():
        seen.append(module.weight.item())
        return next(values)

    recipe = fgl.Recipe(epochs=100, val_every=2, patience=3)
    history = fgl.descend(module, lambda: iter([module.weight.sum()]), score, recipe)
    assert history["score"] == [0.1, 0.5, 0.3, 0.4, 0.2] and len(history["loss"]) == 10
    assert module.weight.item() == seen[1]


# Top-down


@pytest.mark.parametrize("to", ["loss", "input"])
def test_a_layer_hears_the_one_above_but_gets_no_gradient_from_it(task, to):
    model = fgl.TopDownGNN(task, SHORT, layers=3, to=to, generator=generator())
    states = model.bottom_up()
    other = [*states[:2], fgl.row_normalize(random(63, 8, dtype=torch.float32)), *states[3:]]
    first, changed = (next(model.sweep(s)) for s in (list(states), other))
    assert not torch.allclose(model.loss(first), model.loss(changed))
    for k in (1, 2):
        weights = list(model.layers[k].parameters())
        grads = torch.autograd.grad(
            model.loss(first), weights, retain_graph=True, allow_unused=True
        )
        assert all(g is None for g in grads)


def test_the_top_layer_of_top_to_loss_is_plain_sf(task):
    recipe = replace(SHORT, val_every=1)
    answers = []
    for make in (
        lambda g: fgl.SingleForwardGNN(task, recipe, generator=g),
        lambda g: fgl.TopDownGNN(task, recipe, layers=1, generator=g),
    ):
        torch.manual_seed(0)
        model = make(generator())
        # gradients of this small problem are far below the clipping norm
        model.fit(1) if isinstance(model, fgl.SingleForwardGNN) else model.fit()
        answers.append(model.scores())
    torch.testing.assert_close(*answers)


def test_alternating_update_uses_fresh_states(task):
    model = fgl.TopDownGNN(task, SHORT, layers=3, to="input", generator=generator())
    states = model.bottom_up()
    new = list(states)
    assert len(list(model.sweep(new))) == 3
    h = model.layers[1](torch.cat((new[1], new[3]), 1), model.graph).relu()  # layer 2 comes last
    torch.testing.assert_close(new[2], fgl.row_normalize(h))
    h = model.layers[2](torch.cat((states[2], model.labels), 1), model.graph).relu()
    torch.testing.assert_close(new[3], fgl.row_normalize(h))


# Forward-forward


@pytest.mark.parametrize("positive", [True, False])
def test_ff_loss_is_binary_cross_entropy_of_the_margin(positive):
    g = random(7, 3).exp()
    target = torch.full_like(g, float(positive))
    expected = F.binary_cross_entropy_with_logits(g - 2.0, target)
    torch.testing.assert_close(fgl.ff_loss(g, 2.0, positive), expected)


def test_copies_hold_each_wrong_label_once_and_show_no_held_out_label(task):
    model = fgl.ForwardForwardGNN(task, SHORT, generator=generator())
    shown = model.states["train"].unflatten(0, (3, 60))[:, :, 6:]
    assert torch.equal(shown[0, task.train], F.one_hot(task.y)[task.train].float())
    torch.testing.assert_close(shown.sum(0)[task.train], torch.ones(int(task.train.sum()), 3))
    torch.testing.assert_close(
        shown[:, ~task.train], torch.full((3, int((~task.train).sum()), 3), 1 / 3)
    )
    asked = model.states["test"].unflatten(0, (3, 60))[:, :, 6:].argmax(2)
    for k in range(3):
        assert (asked[k, task.test] == k).all()
        assert torch.equal(asked[k, ~task.test], task.y[~task.test])


def test_copies_linked_to_class_nodes_differ_in_links_alone(task):
    model = fgl.ForwardForwardGNN(task, SHORT, label="nodes", generator=generator()).fit(1)
    copies = model.states["train"].unflatten(0, (3, 63))
    assert torch.equal(copies[0], copies[1]) and torch.equal(copies[0], copies[2])
    links = [
        dense(model.graphs["train"].edge_index, 189)[63 * k :][:63, 63 * k :][:, :63]
        for k in range(3)
    ]
    assert not torch.equal(links[0], links[1]) and torch.equal(
        links[0][:60, :60], links[1][:60, :60]
    )


@pytest.mark.parametrize("label", ["features", "nodes"])
def test_negatives_cost_a_pass_for_every_class(task, label):
    updates, passes = (4, 14), []
    for epochs in updates:
        recipe = replace(SHORT, epochs=epochs)
        ff = fgl.ForwardForwardGNN(task, recipe, label=label, generator=generator()).fit(1)
        sf = fgl.SingleForwardGNN(task, recipe, generator=generator()).fit(1)
        passes.append((ff.graphs["train"].passes, sf.graph.passes, ff.graphs["test"].passes))
    per_update = [(b - a) / 10 for a, b in zip(*passes, strict=True)]
    assert per_update == [3, 1, 0] and passes[0][2] == 3  # three to predict


def test_goodness_of_layers_is_averaged(task):
    model = fgl.ForwardForwardGNN(task, SHORT, generator=generator()).fit(2)
    torch.testing.assert_close(2 * model.scores() - model.scores(1), model.parts[1])


# Links


def test_held_out_links_are_gone_and_sets_are_balanced(task):
    links = fgl.hold_out_links(task.x, task.edge_index, generator())
    code = lambda index: set((index[0] * 60 + index[1]).tolist())  # noqa: E731
    whole, kept = code(task.edge_index), code(links.edge_index)
    count = task.edge_index.shape[1] // 2
    for pairs, size in ((links.test, count // 10), (links.val, count // 10)):
        true, false = pairs.index[:, pairs.linked == 1], pairs.index[:, pairs.linked == 0]
        assert true.shape == false.shape == (2, size)
        assert code(true) <= whole and not code(true) & kept and not code(false) & whole
    assert links.edge_index.shape[1] == 2 * (count - 2 * (count // 10))


def test_link_loss_is_the_mean_log_likelihood():
    pairs = fgl.Pairs(torch.tensor([[0, 1], [2, 3]]), torch.tensor([1.0, 0.0], dtype=F64))
    h = random(4, 3)
    p = torch.sigmoid(torch.stack((h[0] @ h[2], h[1] @ h[3])))
    torch.testing.assert_close(pairs.loss(h), -(p[0].log() + (1 - p[1]).log()) / 2)


def test_links_of_a_clustered_graph_are_found():
    graph = fgl.csbm(200, 4, degree=10.0, homophily=0.95, distance=3.0, generator=generator())
    task = fgl.hold_out_links(graph.x, graph.edge_index, generator())
    recipe = fgl.Recipe(hidden=32, lr=0.01, epochs=60)
    model = fgl.SingleForwardLinks(task, recipe).fit(2)
    assert task.test.auc(model.scores()) > 0.8 and task.test.auc(model.scores(1)) > 0.8
    assert task.test.auc(fgl.fit_backprop(task, recipe, layers=2)[2]) > 0.8


# Data and the baseline


def test_generated_graph_has_its_degree_homophily_and_means():
    task = fgl.csbm(2000, 4, degree=8.0, homophily=0.75, distance=3.0, generator=generator())
    source, target = task.edge_index
    assert len(source) / 2000 == pytest.approx(8, rel=0.05)
    assert (task.y[source] == task.y[target]).float().mean().item() == pytest.approx(0.75, abs=0.02)
    means = torch.stack([task.x[task.y == k].mean(0) for k in range(4)])
    torch.testing.assert_close(means.norm(dim=1), torch.full((4,), 3.0), atol=0.3, rtol=0)
    assert [int(m.sum()) for m in (task.train, task.val, task.test)] == [1280, 320, 400]


def test_folds_split_every_node_once():
    masks = [fgl.five_fold_split(100, k) for k in range(5)]
    assert [int(m.sum()) for m in masks[0]] == [64, 16, 20]
    assert torch.equal(torch.stack([m[2] for m in masks]).sum(0), torch.ones(100, dtype=torch.long))
    assert all(
        torch.equal(sum(m.int() for m in three), torch.ones(100, dtype=torch.int))
        for three in masks
    )


@pytest.mark.parametrize("kind", fgl.CONVS)
def test_backprop_network_is_a_chain_of_convolutions(task, kind):
    net, graph = fgl.GNN(6, 3, layers=2, hidden=8, conv=kind), fgl.Graph(task.edge_index, task.x)
    first, last = net.layers
    torch.testing.assert_close(net(task.x, graph), last(first(task.x, graph).relu(), graph))


def test_every_scheme_learns_and_uses_the_graph():
    task = fgl.csbm(300, 3, degree=8.0, homophily=0.85, generator=generator())
    recipe = fgl.Recipe(hidden=32, lr=0.01, epochs=60)
    bare = replace(task, edge_index=task.edge_index[:, :0])
    mlp = task.accuracy(fgl.fit_backprop(bare, recipe, layers=2)[2], task.test)
    found = {"BP": fgl.fit_backprop(task, recipe, layers=2)[2]}
    for to in ("loss", "input"):
        model = fgl.TopDownGNN(task, recipe, to=to, generator=generator())
        model.fit()
        found[to] = model.scores()
    for make in (fgl.SingleForwardGNN, fgl.ForwardForwardGNN):
        found[make.__name__] = make(task, recipe, generator=generator()).fit(2).scores()
    for name, scores in found.items():
        assert task.accuracy(scores, task.test) > mlp + 0.1, name


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: fgl.gcn_operator(torch.tensor([[0], [5]]), 3), "0 to 2, got 0 to 5"),
        (lambda t: fgl.gcn_operator(torch.tensor([[1], [1]]), 3), "to itself"),
        (lambda t: fgl.gcn_operator(torch.zeros(2, 0, dtype=torch.long), 0), "nodes 0 to -1"),
        (lambda t: replace(t, x=t.x / 0), "finite"),
        (lambda t: replace(t, val=t.train), "more than one"),
        (lambda t: replace(t, train=t.train & (t.y != 1)), r"0 to 2, holds \[0, 2\]"),
        (lambda t: fgl.Recipe(conv="gin"), "'gin'"),
        (lambda t: fgl.Recipe(hidden=0), "hidden=0"),
        (lambda t: fgl.Recipe(lr=0.0), r"lr=0\.0"),
        (lambda t: fgl.GATConv(3, 6), "multiple of the 4 heads, got 6"),
        (lambda t: fgl.SingleForwardGNN(t, SHORT).fit(0), "got 0"),
        (lambda t: fgl.SingleForwardGNN(t, SHORT).fit(1).scores(2), "1 to 1 trained layers, got 2"),
        (lambda t: fgl.TopDownGNN(t, SHORT, to="top"), "'top'"),
        (lambda t: fgl.ForwardForwardGNN(t, SHORT, label="edges"), "'edges'"),
        (lambda t: fgl.GNN(3, 2, layers=0), "got 0"),
        (lambda t: fgl.five_fold_split(10, 5), "got 5"),
        (lambda t: fgl.csbm(20, 4), "20 nodes"),
        (lambda t: fgl.csbm(40, 4, degree=30.0), "degree 30"),
        (lambda t: fgl.hold_out_links(t.x, t.edge_index[:, :30]), "both directions"),
    ],
)
def test_bad_input_is_named(task, call, message):
    with pytest.raises(ValueError, match=message):
        call(task)


def test_labels_of_another_length_are_refused(task):
    with pytest.raises((ValueError, TypeError)):  # a TypeError where shapes are checked
        replace(task, y=task.y[:-1])
