r"""Relative representations: describe a sample by its cosines to fixed anchor samples.

Two networks trained from different seeds differ, to a good approximation, by an angle-preserving
map of their latent spaces. Cosines to the same anchors do not see that map, so an encoder of one
network can feed the head of another without training. Source: Moschella et al., "Relative
representations enable zero-shot latent space communication" (ICLR 2023, arXiv:2209.15430) and the
authors' code (github.com/lucmos/relreps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn

Similarity = str | Callable[[Tensor, Tensor], Tensor]


def relative_projection(
    x: Float[Tensor, "*batch d"],
    anchors: Float[Tensor, "k e"],
    similarity: Similarity = "cosine",
    eps: float = 1e-12,
) -> Float[Tensor, "*batch k"]:
    r"""The relative representation :math:`(\mathrm{sim}(e_x, e_{a^{(j)}}))_j` of encoded samples.

    Parameters
    ----------
    x : encoded samples :math:`e_x`.
    anchors : encoded anchors :math:`e_{a^{(j)}}`, as wide as `x`, finite, at least one.
    similarity : `cosine`, or a function of (x, anchors) that returns one column an anchor.
    eps : smallest norm to divide by; a zero vector has similarity 0 to everything.

    Raises
    ------
    ValueError : widths differ, there is no anchor, an anchor is not finite, or the similarity
        is unknown.

    Source: Section 3, and `relative_projection` in the authors' code.
    """
    if len(anchors) == 0:
        raise ValueError("anchors are empty (k = 0); at least one is needed")
    if x.shape[-1] != anchors.shape[-1]:
        raise ValueError(
            f"samples have {x.shape[-1]} dimensions and anchors {anchors.shape[-1]}; must agree"
        )
    if not anchors.isfinite().all():
        row = (~anchors.isfinite()).any(1).nonzero()[0].item()
        raise ValueError(f"anchors must be finite; row {row} is not")
    if callable(similarity):
        return similarity(x, anchors)
    if similarity != "cosine":
        raise ValueError(
            f"similarity must be 'cosine' or a function of (x, anchors), got {similarity!r}"
        )
    unit_anchors = F.normalize(anchors, dim=-1, eps=eps)  # (k, d)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)  # (*batch, 1)
    return (x @ unit_anchors.T).div_(norms)  # (*batch, k); no normalised copy of x is made


def sample_anchors(
    n_total: int,
    k: int,
    strategy: str = "uniform",
    *,
    targets: Int[Tensor, " n"] | None = None,
    latents: Float[Tensor, "n d"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " k"]:
    """Choose the indices of `k` different anchors among `n_total` samples.

    Parameters
    ----------
    strategy : `uniform`; `stratified` (needs `targets`: counts per class differ by at most 1 while
        a class lasts); `fps` (needs `latents`: farthest point sampling) or `kmeans` (needs
        `latents`: the sample nearest to each centre). The last two measure distances between
        normalised latents, since only directions matter later.

    Raises
    ------
    ValueError : `k` is not in 1..n_total, the strategy is unknown, or what it needs is missing or
        not n_total long.

    Source: anchor selection in the paper's appendix.
    """
    if not 1 <= k <= n_total:
        raise ValueError(f"k must lie in 1..{n_total} (the number of samples), got {k}")
    needs = {"uniform": None, "stratified": targets, "fps": latents, "kmeans": latents}
    if strategy not in needs:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(needs)}")
    if strategy != "uniform" and (needs[strategy] is None or len(needs[strategy]) != n_total):
        name, found = ("targets" if strategy == "stratified" else "latents"), needs[strategy]
        raise ValueError(
            f"{strategy!r} needs {n_total} {name}, got {'none' if found is None else len(found)}"
        )
    order = torch.randperm(n_total, generator=generator)
    if strategy == "uniform":
        return order[:k]
    if strategy == "stratified":
        mixed = targets.cpu()[order]
        by_class = mixed.argsort(stable=True)
        sizes = mixed.unique(return_counts=True)[1]
        rank = torch.cat([torch.arange(s) for s in sizes])  # a sample's place within its class
        return order[
            by_class[(rank * n_total + by_class).argsort()[:k]]
        ]  # first of each class, then second ...
    z = F.normalize(latents.detach().cpu(), dim=1)
    if strategy == "kmeans":
        seed = torch.randint(2**31 - 1, (), generator=generator).item()
        means = KMeans(k, n_init=1, random_state=seed).fit(z.numpy())
        gap = torch.from_numpy(means.transform(z.numpy()))
        own = torch.from_numpy(means.labels_).long()[:, None] == torch.arange(k)
        return gap.where(own, math.inf).argmin(
            0
        )  # nearest member of each cluster, so no index repeats
    chosen = [order[0].item()]
    gap = (z - z[chosen[0]]).norm(dim=1)
    for _ in range(k - 1):
        gap[chosen[-1]] = -1.0  # never again
        chosen.append(gap.argmax().item())
        gap = torch.minimum(gap, (z - z[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


class RelativeProjection(nn.Module):
    """An encoder followed by the projection on its own encodings of fixed anchor samples.

    Parameters
    ----------
    encoder : maps a batch of inputs to (batch, d).
    anchors : the anchor *inputs*, (k, ...), kept as a buffer and encoded anew with the current
        weights in every call, in the mode (train or eval) of the module; or, for an encoder of
        whole graphs, k row numbers of its output (a vector of integers).
    normalize : `layernorm` after the projection, or None. When models are stitched it belongs to
        the head.
    anchor_grad : whether gradients flow through the anchors too. The authors' image models do
        without, their graph models with.
    similarity : as in `relative_projection`.

    Raises
    ------
    ValueError : no anchors, or an unknown `normalize`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        anchors: Tensor,
        normalize: str | None = "layernorm",
        anchor_grad: bool = False,
        similarity: Similarity = "cosine",
    ) -> None:
        super().__init__()
        if anchors.ndim == 0 or len(anchors) == 0:
            raise ValueError(
                f"anchors must hold at least one sample, got shape {tuple(anchors.shape)}"
            )
        if normalize not in ("layernorm", None):
            raise ValueError(f"normalize must be 'layernorm' or None, got {normalize!r}")
        self.encoder, self.anchor_grad, self.similarity = encoder, anchor_grad, similarity
        self.rows = anchors.ndim == 1 and not anchors.is_floating_point()
        self.norm = nn.LayerNorm(len(anchors)) if normalize else nn.Identity()
        self.register_buffer("anchors", anchors.detach().clone())
        self.register_buffer("frozen", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "frozen", None))

    def project(self, x: Tensor) -> Float[Tensor, "n k"]:
        """The relative representation, before the normalisation."""
        z = self.encoder(x)  # (n, d)
        if self.frozen is not None:
            return relative_projection(z, self.frozen, self.similarity)
        with torch.set_grad_enabled(self.anchor_grad and torch.is_grad_enabled()):
            z_a = z[self.anchors] if self.rows else self.encoder(self.anchors)  # (k, d)
        return relative_projection(z, z_a, self.similarity)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        """The normalised relative representation."""
        return self.norm(self.project(x))

    @torch.no_grad()
    def freeze_anchors(self) -> None:
        """Keep the anchors' encodings for inference; `train()` and `load_state_dict` drop them.

        Raises
        ------
        ValueError : the module is in training mode, or its anchors are rows of the input's own
            encoding.
        """
        if self.training or self.rows:
            why = (
                "call eval() first"
                if self.training
                else "anchors given as rows change with the input"
            )
            raise ValueError(f"anchors cannot be frozen: {why}")
        self.frozen = self.encoder(self.anchors)

    def train(self, mode: bool = True) -> RelativeProjection:
        """Change the mode; training drops frozen anchors."""
        if mode:
            self.frozen = None
        return super().train(mode)


class AbsoluteModel(nn.Module):
    """The usual network: an encoder and a head (decoder or classifier) that meet at a code."""

    def __init__(self, encoder: nn.Module, head: nn.Module, code_dim: int) -> None:
        super().__init__()
        self.encoder, self.head, self.code_dim = encoder, head, code_dim

    def absolute(self, x: Tensor) -> Tensor:
        """The encoder's own coordinates."""
        return self.encoder(x)

    def encode(self, x: Tensor) -> Tensor:
        """The code that the head reads."""
        return self.encoder(x)

    def decode(self, code: Float[Tensor, "n c"]) -> Tensor:
        """The head's output for a code, also another model's. ValueError if its width is wrong."""
        if code.shape[-1] != self.code_dim:
            raise ValueError(
                f"this head reads codes of {self.code_dim} numbers, got {code.shape[-1]}"
            )
        return self.head(code)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(x))


class RelativeModel(AbsoluteModel):
    """A model whose head reads relative representations; `options` go to `RelativeProjection`."""

    def __init__(
        self, encoder: nn.Module, head: nn.Module, anchors: Tensor, **options: object
    ) -> None:
        super().__init__(RelativeProjection(encoder, anchors, **options), head, len(anchors))

    def absolute(self, x: Tensor) -> Tensor:
        """The inner encoder's own coordinates."""
        return self.encoder.encoder(x)

    def encode(self, x: Tensor) -> Tensor:
        """The relative representation, not yet normalised."""
        return self.encoder.project(x)

    def decode(self, code: Float[Tensor, "n c"]) -> Tensor:
        """This model's normalisation, then its head."""
        fits = code.shape[-1] == self.code_dim
        return super().decode(self.encoder.norm(code) if fits else code)


def stitch(
    a: AbsoluteModel, b: AbsoluteModel, *, parallel: bool = False
) -> Callable[[Tensor], Tensor]:
    """The zero-shot model: the encoder of `a`, then the normalisation and the head of `b`.

    Parameters
    ----------
    a, b : two models in eval mode, both absolute or both relative.
    parallel : the two lists of anchors are known pairs from different domains; only their number
        is compared.

    Raises
    ------
    ValueError : a model is in training mode (batch statistics would leak into the code), an
        absolute meets a relative model, codes have different widths, or the anchors are not the
        same samples in the same order.

    Source: Section 4.2.
    """
    if a.training or b.training:
        raise ValueError("stitching needs both models in eval mode; call eval() first")
    if isinstance(a, RelativeModel) != isinstance(b, RelativeModel):
        raise ValueError("one model is relative and the other absolute; their codes differ")
    if a.code_dim != b.code_dim:
        raise ValueError(
            f"the encoder writes codes of {a.code_dim} numbers, the head reads {b.code_dim}"
        )
    check = isinstance(a, RelativeModel) and not parallel
    if check and not torch.equal(a.encoder.anchors, b.encoder.anchors):
        raise ValueError("the anchors differ; they must be the same samples in the same order")
    return lambda x: b.decode(a.encode(x))


def conv_encoder(channels: Sequence[int], last_activation: bool = True) -> nn.Sequential:
    """Blocks of 3x3 convolution with stride 2, batch norm and GELU, then flatten.

    `channels` starts with the input's. Without `last_activation` codes may point anywhere.
    Source: the authors' image auto-encoder.
    """
    layers: list[nn.Module] = []
    for i, o in pairwise(channels):
        layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.GELU()]
    return nn.Sequential(*(layers if last_activation else layers[:-1]), nn.Flatten())


def conv_decoder(channels: Sequence[int], side: int, code_dim: int) -> nn.Sequential:
    """From a code to `side` x `side` pixels in [0, 1]: the mirror image of `conv_encoder`."""
    sides = [side]
    for _ in channels[1:]:
        sides.append((sides[-1] + 1) // 2)
    last = (channels[-1], sides[-1], sides[-1])
    layers: list[nn.Module] = [
        nn.Linear(code_dim, math.prod(last)),
        nn.GELU(),
        nn.Unflatten(1, last),
    ]
    for level in range(len(channels) - 1, 0, -1):
        pad = sides[level - 1] - (2 * sides[level] - 1)  # 1 where the encoder halved an even side
        layers += [
            nn.ConvTranspose2d(channels[level], channels[level - 1], 3, 2, 1, output_padding=pad)
        ]
        layers += [nn.BatchNorm2d(channels[level - 1]), nn.GELU()]
    return nn.Sequential(*layers[:-2], nn.Sigmoid())


class Autoencoder(AbsoluteModel):
    """The paper's convolutional auto-encoder; its code has `code_dim` coordinates behind a GELU."""

    def __init__(
        self, channels: Sequence[int] = (1, 16, 32), side: int = 8, code_dim: int = 100
    ) -> None:
        width = channels[-1] * math.ceil(side / 2 ** (len(channels) - 1)) ** 2
        encoder = nn.Sequential(conv_encoder(channels), nn.Linear(width, code_dim), nn.GELU())
        super().__init__(encoder, conv_decoder(channels, side, code_dim), code_dim)


class RelativeAutoencoder(RelativeModel):
    """The same auto-encoder; its code is the relative representation of the flat feature map."""

    def __init__(
        self, anchors: Tensor, channels: Sequence[int] = (1, 16, 32), **options: object
    ) -> None:
        head = conv_decoder(channels, anchors.shape[-1], len(anchors))
        super().__init__(conv_encoder(channels, last_activation=False), head, anchors, **options)


class PatchTransformer(nn.Module):
    """An image encoder of one attention layer over patches, averaged: a small transformer.

    Parameters
    ----------
    image : (channels, height, width) of the images.
    patch : (height, width) of a patch.
    dim : width of the tokens and of the code, a multiple of 4.
    generator : draws the positions; the layers use the global seed.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        patch: tuple[int, int],
        dim: int = 48,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if image[1] % patch[0] or image[2] % patch[1]:
            raise ValueError(f"patches of {patch} do not tile an image of {image[1:]}")
        tokens = (image[1] // patch[0]) * (image[2] // patch[1])
        self.cut = nn.Unfold(patch, stride=patch)
        self.embed, self.out = nn.Linear(image[0] * math.prod(patch), dim), nn.Linear(dim, dim)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, dim, generator=generator))
        self.attend = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n dim"]:
        tokens = self.embed(self.cut(images).mT) + self.position  # (n, tokens, dim)
        return self.out(self.attend(tokens).mean(1))


class GraphNetwork(nn.Module):
    r"""Node features to node codes: two convolutions, :math:`\hat A\,\mathrm{relu}(\hat AXW_1)W_2`.

    Parameters
    ----------
    links : (2, edges), each link in both directions, without self-links; :math:`\hat A` is their
        adjacency with self-links, divided by the square roots of both degrees.
    n_nodes, n_features : rows and columns of the feature matrix.
    dropout : share of the features and hidden values that training leaves out.

    Source: Kipf and Welling (2017); the authors use GCNII.
    """

    def __init__(
        self,
        links: Int[Tensor, "2 edges"],
        n_nodes: int,
        n_features: int,
        width: int = 32,
        code: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        links = torch.cat([links, torch.arange(n_nodes, device=links.device).repeat(2, 1)], 1)
        degree = torch.bincount(links[0], minlength=n_nodes).float()
        values = degree[links].prod(0).rsqrt()
        adjacency = torch.sparse_coo_tensor(
            links, values, (n_nodes, n_nodes), check_invariants=True
        )
        self.register_buffer("adjacency", adjacency.coalesce(), persistent=False)
        self.first, self.second = nn.Linear(n_features, width), nn.Linear(width, code)
        self.drop = nn.Dropout(dropout)

    def forward(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n code"]:
        hidden = torch.sparse.mm(self.adjacency, self.first(self.drop(features))).relu()
        return torch.sparse.mm(self.adjacency, self.second(self.drop(hidden)))


def _check_same_samples(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"rows must be the same sample in both; got shapes {tuple(a.shape)}, {tuple(b.shape)}"
        )


def _cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m e"]) -> Float[Tensor, "n m"]:
    _check_same_samples(a, b)
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def neighbour_jaccard(a: Float[Tensor, "n d"], b: Float[Tensor, "m e"], k: int) -> float:
    """Agreement of a sample's `k` nearest rows of `b`, asked for with its row of `a` and of `b`.

    Row i of both is the same sample. Mean over samples of the Jaccard index of the two sets (cosine
    neighbours, the sample itself included): 1 if the spaces coincide, about k / (2 n) by chance.
    ValueError unless 1 <= k <= n.

    Source: Table 1.
    """
    if not 1 <= k <= len(b):
        raise ValueError(f"k must lie in 1..{len(b)} (the number of samples), got {k}")
    sets = [
        torch.zeros(len(b), len(b), device=b.device).scatter_(1, s.topk(k).indices, 1)
        for s in (_cosines(a, b), _cosines(b, b))
    ]
    shared = (sets[0] * sets[1]).sum(1)
    return (shared / (2 * k - shared)).mean().item()


def mean_reciprocal_rank(a: Float[Tensor, "n d"], b: Float[Tensor, "m e"]) -> float:
    """Mean over i of 1 / rank of row i among the rows of `b`, sorted by cosine to row i of `a`.

    Ties count against the sample, so that a collapsed space scores 1 / n and not 1. By chance:
    H_n / n, with the harmonic number H_n. Source: Table 1.
    """
    cosines = _cosines(a, b)
    return (1 / (cosines >= cosines.diagonal()[:, None]).sum(1)).mean().item()


def mean_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "m e"]) -> float:
    """Mean cosine of corresponding rows. High also where all rows are alike: see retrieval too."""
    _check_same_samples(a, b)
    return F.cosine_similarity(a, b, dim=1).mean().item()


def latent_similarity_proxy(r: Float[Tensor, "n k"], r_ref: Float[Tensor, "m l"]) -> float:
    """Estimate of quality without labels: likeness to a good model's relative space (Figure 4)."""
    return mean_cosine(r, r_ref)


def pairwise_cosine_correlation(a: Float[Tensor, "n d"], b: Float[Tensor, "m e"]) -> float:
    """Correlation over pairs of samples of their cosines in `a` and in `b`; widths may differ."""
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(
            f"need the same samples in both spaces, at least 3, got {len(a)} and {len(b)}"
        )
    i, j = torch.triu_indices(len(a), len(a), 1, device=a.device)
    return torch.corrcoef(torch.stack([_cosines(s, s)[i, j] for s in (a, b)]))[0, 1].item()


def markov_corpus(
    positions: Float[Tensor, "v p"],
    n_tokens: int,
    generator: torch.Generator | None = None,
    lines: int = 200,
) -> Int[Tensor, "lines length"]:
    r"""Sample a toy corpus: lines of words, each drawn given the word before it.

    :math:`p(w'|w) \propto f_{w'} \exp(x_w \cdot x_{w'} / \sqrt p)` with hidden word `positions` x
    and frequencies :math:`f_w \propto 1/(w + 10)`. The book's stand-in for real text. ValueError if
    `n_tokens < 2 * lines`.
    """
    if n_tokens < 2 * lines:
        raise ValueError(
            f"{lines} lines of at least two words need {2 * lines} tokens, got {n_tokens}"
        )
    v, p = positions.shape
    logits = positions @ positions.T / math.sqrt(p) - torch.log(torch.arange(v) + 10.0).to(
        positions
    )
    cdf = logits.softmax(1).cumsum(1)  # (v, v)
    uniform = torch.rand(n_tokens // lines, lines, 1, generator=generator).to(cdf)
    words = [torch.randint(v, (lines,), generator=generator)]
    for u in uniform[1:]:
        words.append(torch.searchsorted(cdf[words[-1]], u)[:, 0].clamp_max(v - 1))
    return torch.stack(words, 1)


def cooccurrence(tokens: Int[Tensor, "lines length"], n_words: int) -> Float[Tensor, "v v"]:
    """How often two words stand next to each other (window 1, symmetric)."""
    pairs = (tokens[:, :-1] * n_words + tokens[:, 1:]).flatten()
    counts = torch.bincount(pairs, minlength=n_words**2).reshape(n_words, n_words).double()
    return counts + counts.T


def ppmi_svd(counts: Float[Tensor, "v w"], dim: int) -> Float[Tensor, "v dim"]:
    """Singular vectors of the positive pointwise mutual information, times roots of the values."""
    _check_counts(counts, dim)
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    u, s, _ = torch.linalg.svd((counts / expected.clamp_min(1e-12)).clamp_min(1).log())
    return u[:, :dim] * s[:dim].sqrt()


def hellinger_pca(counts: Float[Tensor, "v w"], dim: int) -> Float[Tensor, "v dim"]:
    """Principal components of the square roots of each word's neighbour frequencies."""
    _check_counts(counts, dim)
    roots = (counts / counts.sum(1, keepdim=True).clamp_min(1e-12)).sqrt()
    u, s, _ = torch.linalg.svd(roots - roots.mean(0), full_matrices=False)
    return u[:, :dim] * s[:dim]


def _check_counts(counts: Tensor, dim: int) -> None:
    if counts.shape[0] != counts.shape[1] or (counts < 0).any():
        raise ValueError(
            f"counts must be square and not negative; got shape {tuple(counts.shape)}, "
            f"smallest {counts.min():g}"
        )
    if not 1 <= dim <= len(counts):
        raise ValueError(f"dim must lie in 1..{len(counts)}, got {dim}")
