r"""Forward learning of graph networks: layers that train one by one, with class nodes as targets.

`SingleForwardGNN` is the main method (SF), `TopDownGNN` lets a layer hear the layers above it,
`ForwardForwardGNN` is the forward-forward algorithm on graphs, `SingleForwardLinks` predicts links, and
`fit_backprop` trains a `GNN` the usual way. All take a `NodeTask` (or a `LinkTask`) and a `Recipe`, convolve with
``gcn``, ``sage`` or ``gat``, and answer with scores.

Source: Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed (2024), "Forward Learning of Graph Neural
Networks", arXiv:2403.11004; equation numbers below are the paper's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, train_test_split
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Edges = Int[Tensor, "2 _"]  # rows source and target
Mask = Bool[Tensor, " n"]
History = dict[str, list[float]]


# Graphs, and the matrices that convolutions multiply by


def _csr(index: Edges, values: Float[Tensor, " _"], shape: tuple[int, int]) -> Tensor:
    """The sparse matrix with `values` at rows ``index[0]`` and columns ``index[1]``; repeats add up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        return torch.sparse_coo_tensor(index, values, shape).coalesce().to_sparse_csr()


def _with_loops(edge_index: Edges, num_nodes: int) -> Edges:
    low, high = (int(f()) if edge_index.numel() else 0 for f in (edge_index.min, edge_index.max))
    if not 0 <= low <= high < num_nodes:
        raise ValueError(f"edges must be between nodes 0 to {num_nodes - 1}, got {low} to {high}")
    if loops := int((edge_index[0] == edge_index[1]).sum()):
        raise ValueError(f"{loops} edges link a node to itself; leave them out")
    loops = torch.arange(num_nodes, device=edge_index.device)
    return torch.cat((edge_index, loops.expand(2, -1)), 1)


def gcn_operator(
    edge_index: Edges, num_nodes: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n n"]:
    r"""Sparse :math:`\hat A=\tilde D^{-1/2}(A+I)\tilde D^{-1/2}`; a row is the node that receives.

    Parameters
    ----------
    edge_index : both directions of a link, no links of a node to itself.

    Raises
    ------
    ValueError : no node, a node outside 0 to `num_nodes` - 1, or a link of a node to itself.
    """
    source, target = _with_loops(edge_index, num_nodes)
    scale = torch.bincount(target, minlength=num_nodes).to(dtype).rsqrt()
    index = torch.stack((target, source))
    return _csr(index, scale[source] * scale[target], (num_nodes, num_nodes))


class ConstantMatrix:
    """A sparse matrix that is not trained; counts the products with it, those of backward passes included."""

    def __init__(self, csr: Float[Tensor, "n m"]) -> None:
        index = csr.to_sparse_coo().indices()
        self.csr, self.shape, self.products = csr, tuple(csr.shape), 0
        self.transposed = _csr(index.flip(0), csr.values(), self.shape[::-1])

    def __matmul__(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: ConstantMatrix) -> Tensor:
        ctx.matrix = matrix
        matrix.products += 1
        return matrix.csr @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.matrix.products += 1
        return ctx.matrix.transposed @ grad, None


class Beside:
    """Matrices side by side, multiplied part by part, so that a sparse part stays sparse."""

    def __init__(self, *parts: Float[Tensor, "n _"] | ConstantMatrix) -> None:
        self.parts, self.widths = parts, [part.shape[1] for part in parts]

    def __matmul__(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        return sum(p @ w for p, w in zip(self.parts, x.split(self.widths), strict=True))


Input = Float[Tensor, "n d"] | ConstantMatrix | Beside


class Graph:
    """Edges, and what convolutions need of them, made when first asked for.

    Parameters
    ----------
    x : features of the nodes; gives their number and the dtype.
    copies : of how many graphs of equal size this one is the disjoint union.

    Attributes
    ----------
    passes : convolutions evaluated on it so far, each copy counted.
    """

    def __init__(self, edge_index: Edges, x: Float[Tensor, "n d"], copies: int = 1) -> None:
        self.edge_index, self.num_nodes, self.dtype = edge_index, len(x), x.dtype
        self.loops, self.copies, self.passes = _with_loops(edge_index, len(x)), copies, 0

    @cached_property
    def gcn(self) -> ConstantMatrix:
        """The operator of `gcn_operator`."""
        return ConstantMatrix(gcn_operator(self.edge_index, self.num_nodes, self.dtype))

    @cached_property
    def mean(self) -> ConstantMatrix:
        """The mean over a node's neighbours; 0 without any."""
        target = self.edge_index[1]
        share = 1 / torch.bincount(target, minlength=self.num_nodes).to(self.dtype)
        shape = (self.num_nodes, self.num_nodes)
        return ConstantMatrix(_csr(self.edge_index.flip(0), share[target], shape))


def row_normalize(x: Float[Tensor, "n d"], eps: float = 1e-8) -> Float[Tensor, "n d"]:
    """Each row divided by its length plus `eps`, so that a layer cannot read its input's length."""
    return x / (x.norm(dim=1, keepdim=True) + eps)


# Convolutions: `aggregate` is the part without parameters, `transform` the rest; a call does both


class GCNConv(nn.Module):
    r""":math:`\hat AxW+b`. Calling it multiplies by :math:`W` first, which is cheaper for sparse or wide inputs.

    Weights are Glorot-uniform, drawn from `generator` or the global one.
    """

    def __init__(
        self, n_in: int, n_out: int, parts: int = 1, generator: Generator | None = None
    ) -> None:
        super().__init__()
        empty = torch.empty(parts * n_in, n_out)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(empty, generator=generator))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def aggregate(self, x: Float[Tensor, "n d"], graph: Graph) -> Float[Tensor, "n _"]:
        """What the input becomes before a parameter is applied."""
        return graph.gcn @ x

    def transform(self, z: Float[Tensor, "n _"], graph: Graph) -> Float[Tensor, "n k"]:
        """The layer's output for an aggregated input."""
        graph.passes += graph.copies
        return torch.addmm(self.bias, z, self.weight)

    def forward(self, x: Input, graph: Graph) -> Float[Tensor, "n k"]:
        graph.passes += graph.copies
        return graph.gcn @ (x @ self.weight) + self.bias


class SAGEConv(GCNConv):
    """A map of the node plus a map of its neighbours' mean (GraphSAGE)."""

    def __init__(self, n_in: int, n_out: int, generator: Generator | None = None) -> None:
        super().__init__(n_in, n_out, parts=2, generator=generator)

    def aggregate(self, x: Float[Tensor, "n d"], graph: Graph) -> Float[Tensor, "n _"]:
        """The node's features and its neighbours' mean, side by side."""
        return torch.cat((x, graph.mean @ x), 1)

    def forward(self, x: Input, graph: Graph) -> Float[Tensor, "n k"]:
        graph.passes += graph.copies
        own, others = self.weight.chunk(2)
        return x @ own + graph.mean @ (x @ others) + self.bias


class GATConv(GCNConv):
    """Graph attention: a learned weighted mean over the neighbours and the node itself.

    Nothing can be aggregated beforehand, since the weights depend on the parameters.
    """

    def __init__(
        self, n_in: int, n_out: int, heads: int = 4, generator: Generator | None = None
    ) -> None:
        if n_out % heads:
            raise ValueError(f"the width must be a multiple of the {heads} heads, got {n_out}")
        super().__init__(n_in, n_out, generator=generator)
        pair = torch.empty(2, heads, n_out // heads)
        self.source, self.target = (
            nn.Parameter(nn.init.xavier_uniform_(a, generator=generator)) for a in pair
        )

    def aggregate(self, x: Float[Tensor, "n d"], graph: Graph) -> Float[Tensor, "n d"]:
        """The input as it is."""
        return x

    def attention(
        self, v: Float[Tensor, "n heads d"], graph: Graph
    ) -> Float[Tensor, "loops heads"]:
        """A weight for each edge of ``graph.loops``; 1 in sum over the edges that end at a node."""
        i, j = graph.loops
        raw = F.leaky_relu((v * self.source).sum(2)[i] + (v * self.target).sum(2)[j], 0.2)
        top = raw.detach().new_full(v.shape[:2], -math.inf)
        top = top.scatter_reduce(0, j[:, None].expand_as(raw), raw.detach(), "amax")
        weight = (raw - top[j]).exp()
        return weight / torch.zeros_like(top).index_add(0, j, weight)[j]

    def transform(self, z: Input, graph: Graph) -> Float[Tensor, "n k"]:
        """The layer's output."""
        graph.passes += graph.copies
        v, (i, j) = (z @ self.weight).unflatten(1, self.source.shape), graph.loops
        messages = self.attention(v, graph)[:, :, None] * v[i]
        return torch.zeros_like(v).index_add(0, j, messages).flatten(1) + self.bias

    forward = transform


CONVS = {"gcn": GCNConv, "sage": SAGEConv, "gat": GATConv}


def _compact(x: Float[Tensor, "n d"]) -> Input:
    """`x` as a sparse matrix if nine in ten entries are zero."""
    if x.count_nonzero() >= 0.1 * x.numel():
        return x
    return ConstantMatrix(_csr(x.nonzero().T, x[x != 0], tuple(x.shape)))


def fixed_input(
    conv: GCNConv, x: Float[Tensor, "n d"], graph: Graph, cache: bool = True
) -> Callable[[], Float[Tensor, "n k"]]:
    """The layer ``relu(conv(x))`` as a function of its parameters alone, for an input that stays as it is.

    The input is aggregated here, once. One that is mostly zeros is kept sparse instead, which saves more.
    """
    inputs = _compact(x)
    if isinstance(inputs, ConstantMatrix) or not cache:
        return lambda: conv(inputs, graph).relu()
    z = conv.aggregate(x, graph)
    return lambda: conv.transform(z, graph).relu()


# Tasks


@dataclass(frozen=True)
class NodeTask:
    """A graph whose nodes have classes.

    Parameters
    ----------
    y : classes 0 to C - 1, each of which occurs in the training set.
    train, val, test : masks that do not overlap; a node may be in none.

    Raises
    ------
    ValueError : `x` is not finite, masks overlap, a class is missing in `train`, or a bad edge.
    """

    x: Float[Tensor, "n d"]
    edge_index: Edges
    y: Int[Tensor, " n"]
    train: Mask
    val: Mask
    test: Mask

    def __post_init__(self) -> None:
        _with_loops(self.edge_index, len(self.x))
        lengths = [len(t) for t in (self.x, self.y, self.train, self.val, self.test)]
        if len(set(lengths)) > 1 or not self.x.isfinite().all():
            raise ValueError(f"x must be finite, x, y and masks of one length, got {lengths}")
        if shared := int(((self.train.int() + self.val + self.test) > 1).sum()):
            raise ValueError(f"{shared} nodes are in more than one of train, val and test")
        known = self.y[self.train].unique().tolist()
        if known != list(range(self.num_classes)):
            raise ValueError(f"train must hold classes 0 to {self.num_classes - 1}, holds {known}")

    @property
    def num_classes(self) -> int:
        """C, one more than the largest class."""
        return int(self.y.max()) + 1

    def to(self, device: torch.device) -> NodeTask:
        """The same task on another device."""
        return NodeTask(*(getattr(self, field.name).to(device) for field in fields(self)))

    def accuracy(self, scores: Float[Tensor, "n classes"], mask: Mask) -> float:
        """The share of the nodes in `mask` whose class has the largest score."""
        return (scores.argmax(1) == self.y)[mask].float().mean().item()


def five_fold_split(num_nodes: int, fold: int) -> tuple[Mask, Mask, Mask]:
    """Masks of 64, 16 and 20 % of the nodes for training, validation and test, as the paper splits.

    Raises
    ------
    ValueError : `fold` is not 0 to 4.
    """
    if not 0 <= fold < 5:
        raise ValueError(f"fold must be 0 to 4, got {fold}")
    rest, test = list(KFold(5, shuffle=True, random_state=101).split(range(num_nodes)))[fold]
    train, val = train_test_split(rest, test_size=0.2, random_state=127 * fold)
    masks = torch.zeros(3, num_nodes, dtype=torch.bool)
    for mask, index in zip(masks, (train, val, test), strict=True):
        mask[torch.from_numpy(index)] = True
    return tuple(masks)


def csbm(
    num_nodes: int = 600, num_classes: int = 4, *, degree: float = 6.0, homophily: float = 0.75,
    features: int = 32, distance: float = 1.5, generator: Generator | None = None,
) -> NodeTask:  # fmt: skip
    """A random graph with classes (contextual stochastic block model), split 64/16/20.

    Parameters
    ----------
    degree : expected number of neighbours. homophily : share of them in the node's own class.
    distance : norm of the class means; the noise around them has unit variance.

    Raises
    ------
    ValueError : fewer than two classes or ten nodes a class, or the probability of a link is above 1.
    """
    if num_classes < 2 or num_nodes < 10 * num_classes or not 0 <= homophily <= 1:
        raise ValueError(f"got {num_classes} classes, {num_nodes} nodes, homophily {homophily}")
    inside, total = homophily * degree * num_classes / num_nodes, degree * num_classes / num_nodes
    if not 0 <= max(inside, (total - inside) / (num_classes - 1)) <= 1:
        raise ValueError(f"degree {degree} is too large for {num_nodes} nodes")
    y = (torch.arange(num_nodes) % num_classes)[torch.randperm(num_nodes, generator=generator)]
    chance = torch.where(y[:, None] == y, inside, (total - inside) / (num_classes - 1))
    links = (torch.rand(num_nodes, num_nodes, generator=generator) < chance).triu(1).nonzero().T
    means = row_normalize(torch.randn(num_classes, features, generator=generator)) * distance
    x = means[y] + torch.randn(num_nodes, features, generator=generator)
    place = torch.randperm(num_nodes, generator=generator) / num_nodes
    masks = place < 0.64, (place >= 0.64) & (place < 0.8), place >= 0.8
    return NodeTask(x, torch.cat((links, links.flip(0)), 1), y, *masks)


class Pairs(NamedTuple):
    """Pairs of nodes, and 1 where they are linked."""

    index: Int[Tensor, "2 pairs"]
    linked: Float[Tensor, " pairs"]

    def auc(self, scores: Float[Tensor, " pairs"]) -> float:
        """The chance that a linked pair scores higher than another one."""
        return float(roc_auc_score(self.linked.cpu(), scores.cpu()))

    def logits(self, h: Float[Tensor, "n k"]) -> Float[Tensor, " pairs"]:
        """Inner products of the pairs' embeddings."""
        return (h[self.index[0]] * h[self.index[1]]).sum(1)

    def loss(self, h: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
        """Binary cross-entropy of `logits` (Equation 9)."""
        return F.binary_cross_entropy_with_logits(self.logits(h), self.linked)


class LinkTask(NamedTuple):
    """A graph without the links to be predicted; half of the pairs in each set are linked."""

    x: Float[Tensor, "n d"]
    edge_index: Edges
    train: Pairs
    val: Pairs
    test: Pairs


def hold_out_links(
    x: Float[Tensor, "n d"], edge_index: Edges, generator: Generator | None = None
) -> LinkTask:
    """Hide a tenth of the links of an undirected graph for test and another tenth for validation.

    Raises
    ------
    ValueError : an edge is there in one direction only, or there are fewer than ten links.
    """
    n, (i, j) = len(x), edge_index
    code = i * n + j
    if not torch.isin(j * n + i, code).all() or len(i) < 20:
        raise ValueError(f"need both directions of ten links or more, got {len(i)} edges")
    links = edge_index[:, i < j]
    count = links.shape[1]
    links = links[:, torch.randperm(count, generator=generator).to(x.device)]
    draws = torch.randint(n, (2, 4 * count + 100), generator=generator).to(x.device)
    others = draws[:, (draws[0] != draws[1]) & ~torch.isin(draws[0] * n + draws[1], code)]
    sizes = [count - 2 * (count // 10), count // 10, count // 10]
    parts = zip(links.split(sizes, 1), others[:, :count].split(sizes, 1), strict=True)
    sets = [Pairs(torch.cat(p, 1), torch.ones_like(p[0]).flatten().to(x)) for p in parts]
    for pairs in sets:
        pairs.linked[len(pairs.linked) // 2 :] = 0
    kept = links[:, : sizes[0]]
    return LinkTask(x, torch.cat((kept, kept.flip(0)), 1), *sets)


# Training


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the paper's.

    Parameters
    ----------
    conv : ``gcn``, ``sage`` or ``gat``.
    temperature : divides the logits of SF.
    epochs : updates of a layer (SF, FF) or of a network, at most.
    val_every, patience : updates between two validations, and validations without a new best that end the training.
    cache : aggregate a layer's fixed input only once.

    Raises
    ------
    ValueError : a number is out of range or `conv` is unknown.
    """

    conv: str = "gcn"
    hidden: int = 128
    lr: float = 1e-3
    weight_decay: float = 5e-4
    temperature: float = 1.0
    epochs: int = 1000
    val_every: int = 2
    patience: int = 100
    cache: bool = True

    def __post_init__(self) -> None:
        if self.conv not in CONVS:
            raise ValueError(f"conv must be one of {', '.join(CONVS)}, got {self.conv!r}")
        if min(self.hidden, self.val_every, self.patience, self.epochs) < 1:
            raise ValueError(f"hidden, val_every, patience and epochs must be at least 1: {self}")
        if min(self.lr, self.temperature) <= 0 or self.weight_decay < 0:
            raise ValueError(f"lr and temperature must be > 0 and weight_decay >= 0: {self}")

    def layer(self, n_in: int, like: Tensor) -> GCNConv:
        """A new hidden layer, with the dtype and on the device of `like`."""
        return CONVS[self.conv](n_in, self.hidden).to(like)


def descend(
    module: nn.Module,
    losses: Callable[[], Iterator[Tensor]],
    score: Callable[[], float],
    recipe: Recipe,
    clip: bool = False,
) -> History:
    """Adam with early stopping; leaves `module` in the state with the best score.

    Parameters
    ----------
    losses : yields the losses of the current state; each is differentiated before the next is made.
    score : on the validation set, called right after `losses`; larger is better.
    clip : limit the gradient of each child of `module` to norm 1.

    Returns
    -------
    history : `loss`, summed, before each update; `score` of each validation.
    """
    optimizer = torch.optim.Adam(module.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    history: History = {"loss": [], "score": []}
    best, kept, waited = -math.inf, {}, 0
    for epoch in range(recipe.epochs + 1):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses():
            loss.backward()
            total += loss.item()
        last = epoch == recipe.epochs
        if epoch and (epoch % recipe.val_every == 0 or last):
            with torch.no_grad():
                history["score"].append(score())
            waited += 1
            if history["score"][-1] > best:
                best, waited = history["score"][-1], 0
                kept = {name: value.clone() for name, value in module.state_dict().items()}
        if last or waited >= recipe.patience:
            break
        history["loss"].append(total)
        for child in module.children() if clip else ():
            nn.utils.clip_grad_norm_(child.parameters(), 1.0)
        optimizer.step()
    module.load_state_dict(kept)
    return history


class _LayerByLayer:
    """Networks that grow by `add_layer`; `parts` has the scores of each layer."""

    parts: list[Tensor]

    def add_layer(self) -> History:
        raise NotImplementedError

    def fit(self, layers: int) -> _LayerByLayer:
        """Add so many layers.

        Raises
        ------
        ValueError : `layers` is below 1.
        """
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        for _ in range(layers):
            self.add_layer()
        return self

    def scores(self, depth: int | None = None) -> Tensor:
        """The mean score of the first `depth` layers (default: all): probabilities or goodness.

        Raises
        ------
        ValueError : there are not so many layers.
        """
        depth = len(self.parts) if depth is None else depth
        if not 1 <= depth <= len(self.parts):
            raise ValueError(f"depth must be 1 to {len(self.parts)} trained layers, got {depth}")
        return sum(self.parts[:depth]) / depth


# Single forward


def link_labels(labels: Int[Tensor, " n"], mask: Mask, bidirectional: bool = True) -> Edges:
    """Edges from the nodes in `mask` to their class nodes ``len(labels) + label``, and back."""
    there = torch.stack((mask.nonzero()[:, 0], len(labels) + labels[mask]))
    return torch.cat((there, there.flip(0)), 1) if bidirectional else there


def augment_with_class_nodes(
    task: NodeTask, bidirectional: bool = True, generator: Generator | None = None
) -> tuple[Float[Tensor, "augmented d"], Edges]:
    """Features and edges with one more node for each class, linked to the training nodes of that class.

    The class nodes (the paper's virtual nodes) come last; their features are standard normal and stay as drawn.
    """
    drawn = torch.randn(task.num_classes, task.x.shape[1], generator=generator).to(task.x)
    links = link_labels(task.y, task.train, bidirectional)
    return torch.cat((task.x, drawn)), torch.cat((task.edge_index, links), 1)


def class_logits(
    h: Float[Tensor, "augmented k"], num_classes: int, temperature: float = 1.0
) -> Float[Tensor, "n classes"]:
    """Inner products of each node's embedding with those of the class nodes, which come last."""
    return h[:-num_classes] @ h[-num_classes:].T / temperature


class _ClassNodes:
    """A task on its augmented graph, and the local loss on it."""

    def __init__(
        self,
        task: NodeTask,
        recipe: Recipe | None,
        bidirectional: bool,
        generator: Generator | None,
    ) -> None:
        self.task, self.recipe = task, recipe or Recipe()
        self.x, edges = augment_with_class_nodes(task, bidirectional, generator)
        self.graph = Graph(edges, self.x)

    def loss(self, h: Float[Tensor, "augmented k"]) -> Float[Tensor, ""]:
        """Cross-entropy of the training nodes, for a layer with output `h`."""
        logits = class_logits(h, self.task.num_classes, self.recipe.temperature)
        return F.cross_entropy(logits[self.task.train], self.task.y[self.task.train])

    def probability(self, h: Float[Tensor, "augmented k"]) -> Tensor:
        """What a layer with output `h` predicts for every node."""
        return class_logits(h, self.task.num_classes, self.recipe.temperature).softmax(1)

    def validate(self, scores: Float[Tensor, "n classes"]) -> float:
        return self.task.accuracy(scores, self.task.val)


class SingleForwardGNN(_LayerByLayer, _ClassNodes):
    r"""Layers trained one after the other on the graph with class nodes (SF; Equation 6, Algorithm 2).

    A layer has its own loss and optimiser, and its input is detached. A finished layer is never touched again, so
    `add_layer` can be called at any time.

    Parameters
    ----------
    bidirectional : whether class nodes also send to their training nodes.
    generator : draws the features of the class nodes; weights come from the global one.

    Attributes
    ----------
    layers : the trained convolutions. graph : the augmented `Graph`, with features `x`.
    state : the output of the last layer, the next one's input before it is normalised.
    """

    def __init__(
        self, task: NodeTask, recipe: Recipe | None = None, *,
        bidirectional: bool = True, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(task, recipe, bidirectional, generator)
        self.state, self.layers, self.parts = self.x, nn.ModuleList(), []

    def add_layer(self) -> History:
        """Train one more layer on top of the finished ones; returns the history of `descend`."""
        x = row_normalize(self.state)
        conv = self.recipe.layer(x.shape[1], x)
        output, below = fixed_input(conv, x, self.graph, self.recipe.cache), sum(self.parts)

        h = x

        def losses() -> Iterator[Tensor]:
            nonlocal h
            h = output()
            yield self.loss(h)

        def score() -> float:
            return self.validate(below + self.probability(h))

        history = descend(conv, losses, score, self.recipe)
        with torch.no_grad():
            self.state = output()
            self.parts.append(self.probability(self.state))
        self.layers.append(conv)
        return history


class SingleForwardLinks(SingleForwardGNN):
    """SF for link prediction (ForwardGNN-CE, Equation 9); it needs no class nodes.

    `scores` are the probabilities of the pairs in ``task.test``.
    """

    def __init__(self, task: LinkTask, recipe: Recipe | None = None) -> None:
        self.task, self.recipe, self.x = task, recipe or Recipe(), task.x
        self.graph = Graph(task.edge_index, task.x)
        self.state, self.layers, self.parts = self.x, nn.ModuleList(), []

    def loss(self, h: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
        """Cross-entropy of the training pairs, for a layer with output `h`."""
        return self.task.train.loss(h)

    def probability(self, h: Float[Tensor, "n k"]) -> Float[Tensor, " pairs"]:
        """Probabilities of the pairs for validation, then of those for test."""
        return torch.cat((self.task.val.logits(h), self.task.test.logits(h))).sigmoid()

    def validate(self, scores: Float[Tensor, " pairs"]) -> float:
        """Area under the curve on the validation pairs."""
        return self.task.val.auc(scores[: len(self.task.val.linked)])

    def scores(self, depth: int | None = None) -> Float[Tensor, " pairs"]:
        """Mean probability of the test pairs over the first `depth` layers (default: all)."""
        return super().scores(depth)[len(self.task.val.linked) :]


def cross_layer_gradients(
    model: SingleForwardGNN, detach: bool = True
) -> Float[Tensor, "layers layers"]:
    r"""Norms of :math:`\partial L_l/\partial\theta_k`, row the loss, column the layer; 0 where there is no path.

    Parameters
    ----------
    detach : as in forward learning; False shows what backpropagation of the same losses sends.
    """
    x, losses = model.x, []
    for conv in model.layers:
        h = conv(row_normalize(x), model.graph).relu()
        losses.append(model.loss(h))
        x = h.detach() if detach else h
    norms = torch.zeros(len(losses), len(losses))
    for l, loss in enumerate(losses):  # noqa: E741 - the paper's letter for a layer
        for k, conv in enumerate(model.layers):
            weights = list(conv.parameters())
            grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            norms[l, k] = sum(g.square().sum() for g in grads if g is not None) ** 0.5
    return norms


# Signals from above


class TopDownGNN(_ClassNodes):
    r"""SF whose layers train together in time steps and hear the layers above (Equations 7 and 8).

    With ``to="loss"`` the embedding in the loss of layer :math:`j` is the mean of its output :math:`h_j` and the states
    :math:`s_{j+1},\dots,s_L` of the step before. With ``to="input"`` layer :math:`j` sees :math:`s_{j-1}` and
    :math:`s_{j+1}` side by side, and the state above the last layer is the label, uniform where it is not known.
    States are normalised and detached, so no error passes between layers.

    Raises
    ------
    ValueError : `to` is neither, or `layers` is below 1.
    """

    def __init__(
        self, task: NodeTask, recipe: Recipe | None = None, *, layers: int = 2, to: str = "loss",
        generator: Generator | None = None,
    ) -> None:  # fmt: skip
        if to not in ("loss", "input") or layers < 1:
            raise ValueError(f"to must be loss or input and layers >= 1, got {to!r} and {layers}")
        super().__init__(task, recipe, True, generator)
        self.x, self.to, classes = row_normalize(self.x), to, torch.eye(task.num_classes).to(task.x)
        self.input = _compact(self.x)
        known = torch.where(task.train[:, None], classes[task.y], 1 / task.num_classes)
        self.labels = row_normalize(torch.cat((known, classes)))
        below = [self.x.shape[1]] + [self.recipe.hidden] * (layers - 1)
        above = [*below[1:], task.num_classes] if to == "input" else [0] * layers
        widths = map(sum, zip(below, above, strict=True))
        self.layers = nn.ModuleList(self.recipe.layer(n, self.x) for n in widths)
        self.first = fixed_input(self.layers[0], self.x, self.graph) if to == "loss" else None

    def _output(self, j: int, states: list[Tensor]) -> Tensor:
        """Layer `j`, counted from 1, on these states."""
        if self.first and j == 1:
            return self.first()
        below = self.input if j == 1 else states[j - 1]
        x = below if self.to == "loss" else Beside(below, states[j + 1])
        return self.layers[j - 1](x, self.graph).relu()

    @torch.no_grad()
    def bottom_up(self) -> list[Tensor]:
        r"""States :math:`s_0,\dots,s_L` of a pass without signals from above, and the labels as :math:`s_{L+1}`."""
        silent = self.x.new_zeros(len(self.x), self.recipe.hidden)
        states = [self.x, *[silent] * len(self.layers), torch.zeros_like(self.labels)]
        for j in range(1, len(self.layers) + 1):
            states[j] = row_normalize(self._output(j, states))
        return [*states[:-1], self.labels]

    def sweep(self, states: list[Tensor]) -> Iterator[Tensor]:
        """One time step: yields the embedding that enters each layer's loss, and renews `states` in place.

        With ``to="input"`` layers 1, 3, ... go first, and layers 2, 4, ... see what they sent.
        """
        order, old = list(range(1, len(self.layers) + 1)), list(states)
        for j in order if self.to == "loss" else order[::2] + order[1::2]:
            h = self._output(j, old if self.to == "loss" else states)
            states[j] = row_normalize(h.detach())
            yield torch.stack([h, *old[j + 1 : -1]]).mean(0) if self.to == "loss" else h

    def fit(self) -> History:
        """Train all layers; a time step is one update of each. Returns the history of `descend`."""
        states = self.bottom_up()

        def losses() -> Iterator[Tensor]:
            return map(self.loss, self.sweep(states))

        def score() -> float:
            return self.validate(self.scores())

        return descend(self.layers, losses, score, self.recipe, clip=self.to == "loss")

    @torch.no_grad()
    def scores(self) -> Float[Tensor, "n classes"]:
        """Mean probability over the layers; with ``to="input"`` also over the last eight of ten settling steps."""
        states, parts = self.bottom_up(), []
        for t in range(1 if self.to == "loss" else 10):
            found = [self.probability(h) for h in self.sweep(states)]
            parts += found if t >= 2 or self.to == "loss" else []
        return sum(parts) / len(parts)


# Forward-forward


def ff_loss(goodness: Float[Tensor, "*shape"], theta: float, positive: bool) -> Float[Tensor, ""]:
    r"""Mean softplus of :math:`\theta-g` for positive inputs, of :math:`g-\theta` for negative ones (Equation 4)."""
    return F.softplus(theta - goodness if positive else goodness - theta).mean()


class ForwardForwardGNN(_LayerByLayer):
    r"""The forward-forward algorithm on graphs: goodness :math:`\|h_i\|^2` up with the true label, down with wrong ones.

    A layer sees C copies of the graph, as one disjoint union. In training the first copy has the true labels and each
    other one a wrong label for every training node. To predict, copy `k` gives label `k` to all nodes asked about; `scores`
    are for the nodes in ``task.test``, with the labels of training and validation nodes known.

    Parameters
    ----------
    label : ``features``, one-hot labels beside the features (FF-LA, Equation 4), or ``nodes``, links to class nodes
        (FF-VN, Equation 5).

    Raises
    ------
    ValueError : `label` is neither.
    """

    def __init__(
        self, task: NodeTask, recipe: Recipe | None = None, *, label: str = "features",
        theta: float = 2.0, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        if label not in ("features", "nodes"):
            raise ValueError(f"label must be features or nodes, got {label!r}")
        self.task, self.recipe, self.label, self.theta = task, recipe or Recipe(), label, theta
        n, classes = len(task.y), torch.arange(task.num_classes).to(task.y)
        self.drawn = torch.randn(len(classes), task.x.shape[1], generator=generator).to(task.x)
        order = torch.rand(n, len(classes), generator=generator).to(task.x)
        order[torch.arange(n), task.y] = -1.0  # the true class first, the wrong ones at random
        asked, known = classes[:, None].expand(-1, n), task.train | task.val
        self.states, self.graphs = {}, {}
        for name, labels, mask in (
            ("train", order.argsort(1).T, task.train),
            ("val", torch.where(task.train, task.y, asked), known),
            ("test", torch.where(known, task.y, asked), known | task.test),
        ):
            self.states[name], self.graphs[name] = self._union(labels, mask)
        self.layers, self.parts, self.validation = nn.ModuleList(), [], []

    def _union(self, labels: Int[Tensor, "copies n"], mask: Mask) -> tuple[Tensor, Graph]:
        """Features and graph of the copies, in which the nodes in `mask` have these labels."""
        task, copies = self.task, len(labels)
        if self.label == "features":
            shown = torch.full((*labels.shape, task.num_classes), 1 / task.num_classes).to(task.x)
            shown[:, mask] = F.one_hot(labels[:, mask], task.num_classes).to(task.x)
            x = torch.cat((task.x.expand(copies, -1, -1), shown), 2)
            edges = [task.edge_index] * copies
        else:
            x = torch.cat((task.x, self.drawn)).expand(copies, -1, -1)
            edges = [torch.cat((task.edge_index, link_labels(y, mask)), 1) for y in labels]
        size = x.shape[1]
        union = torch.cat([e + k * size for k, e in enumerate(edges)], 1)
        x = x.reshape(copies * size, -1)
        return x, Graph(union, x, copies)

    def _square(self, h: Float[Tensor, "union k"]) -> Float[Tensor, "n copies k"]:
        """The squared outputs of the real nodes in each copy."""
        copies = h.unflatten(0, (self.task.num_classes, -1))[:, : len(self.task.y)]
        return copies.transpose(0, 1).square()

    def add_layer(self) -> History:
        """Train one more layer on top of the finished ones; returns the history of `descend`."""
        conv = self.recipe.layer(self.states["train"].shape[1], self.task.x)
        run = {
            name: fixed_input(conv, row_normalize(x), self.graphs[name], self.recipe.cache)
            for name, x in self.states.items()
        }

        def losses() -> Iterator[Tensor]:
            g = self._square(run["train"]())[self.task.train].sum(2)
            yield ff_loss(g[:, 0], self.theta, True) + ff_loss(g[:, 1:], self.theta, False)

        def score() -> float:
            goodness = sum(self.validation) + self._square(run["val"]()).mean(2)
            return self.task.accuracy(goodness, self.task.val)

        history = descend(conv, losses, score, self.recipe)
        with torch.no_grad():
            self.states = {name: output() for name, output in run.items()}
        self.validation.append(self._square(self.states["val"]).mean(2))
        self.parts.append(self._square(self.states["test"]).mean(2))
        if (
            self.label == "nodes"
        ):  # here a negative copy differs from the positive one in its links alone
            positive = self.states["train"][: len(self.task.y) + self.task.num_classes]
            self.states["train"] = positive.repeat(self.task.num_classes, 1)
        self.layers.append(conv)
        return history


# Backpropagation


class GNN(nn.Module):
    """The usual network: convolutions with ReLU between them and none after the last.

    Raises
    ------
    ValueError : `layers` is below 1.
    """

    def __init__(
        self, n_in: int, n_out: int, *, layers: int, hidden: int = 128, conv: str = "gcn"
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        widths, last = [n_in] + [hidden] * (layers - 1), {"heads": 1} if conv == "gat" else {}
        self.layers = nn.ModuleList(CONVS[conv](a, b) for a, b in pairwise(widths))
        self.layers.append(CONVS[conv](widths[-1], n_out, **last))

    def forward(self, x: Input, graph: Graph) -> Float[Tensor, "n k"]:
        for conv in self.layers[:-1]:
            x = conv(x, graph).relu()
        return self.layers[-1](x, graph)


def fit_backprop(
    task: NodeTask | LinkTask, recipe: Recipe | None = None, *, layers: int
) -> tuple[GNN, History, Tensor]:
    """Train a `GNN` end to end; returns it, the history of `descend`, and its scores.

    The scores are logits (n, classes) for a `NodeTask`, inner products of the test pairs for a `LinkTask`.
    """
    recipe, links = recipe or Recipe(), isinstance(task, LinkTask)
    graph, x = Graph(task.edge_index, task.x), _compact(task.x)
    n_out = recipe.hidden if links else task.num_classes
    net = GNN(task.x.shape[1], n_out, layers=layers, hidden=recipe.hidden, conv=recipe.conv)
    net.to(task.x)

    out = task.x

    def losses() -> Iterator[Tensor]:
        nonlocal out
        out = net(x, graph)
        train = task.train
        yield train.loss(out) if links else F.cross_entropy(out[train], task.y[train])

    def score() -> float:
        return task.val.auc(task.val.logits(out)) if links else task.accuracy(out, task.val)

    history = descend(net, losses, score, recipe)
    with torch.no_grad():
        out = net(x, graph)
    return net, history, task.test.logits(out) if links else out
