"""Relative representations against identities, limits and independent implementations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from nnlib.representations import relative_representations as rr

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def orthogonal(d, determinant, seed=0):
    q = torch.linalg.qr(normal(d, d, seed=seed))[0]
    q[:, 0] *= determinant * torch.linalg.det(q).sign()
    return q


def linear_model(anchors, width=3, outputs=2, seed=0, **options):
    torch.manual_seed(seed)
    encoder = nn.Linear(anchors.shape[1], width).to(F64)
    head = nn.Linear(len(anchors), outputs).to(F64)
    return rr.RelativeModel(encoder, head, anchors, **options).to(F64)


# --- the projection and its invariances -------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), determinant=st.sampled_from([1, -1]), scale=st.floats(1e-3, 1e3), d=st.integers(1, 12)
)  # fmt: skip
def test_orthogonal_maps_and_a_positive_scale_for_each_sample_change_nothing(
    seed, determinant, scale, d
):
    z, a, q = (
        normal(20, d, seed=seed),
        normal(7, d, seed=seed + 1),
        orthogonal(d, determinant, seed),
    )
    own_scale = scale * (0.1 + torch.rand(20, 1, generator=generator(seed), dtype=F64))
    torch.testing.assert_close(torch.linalg.det(q).item(), float(determinant))
    moved = rr.relative_projection(own_scale * z @ q.T, scale * a @ q.T)
    torch.testing.assert_close(moved, rr.relative_projection(z, a), atol=1e-12, rtol=0)


def test_translations_and_shears_do_change_it():
    z, a = normal(20, 6), normal(7, 6, seed=1)
    r = rr.relative_projection(z, a)
    stretch = torch.diag(torch.tensor([3.0, 1, 1, 1, 1, 1], dtype=F64))
    assert (rr.relative_projection(z + 1, a + 1) - r).abs().max() > 0.05
    assert (rr.relative_projection(z @ stretch, a @ stretch) - r).abs().max() > 0.05


def test_a_negative_scale_flips_the_sign():
    z, a = normal(20, 6), normal(7, 6, seed=1)
    torch.testing.assert_close(rr.relative_projection(-2 * z, a), -rr.relative_projection(z, a))


def test_spanning_anchors_determine_the_direction_of_a_code():
    # The converse theorem, constructively: the pseudo-inverse of the unit anchors takes r back to the unit code.
    z, a = normal(20, 6), normal(9, 6, seed=1)
    recovered = rr.relative_projection(z, a) @ torch.linalg.pinv(F.normalize(a, dim=1)).T
    torch.testing.assert_close(recovered, F.normalize(z, dim=1))
    lost = rr.relative_projection(z, a[:5]) @ torch.linalg.pinv(F.normalize(a[:5], dim=1)).T
    assert (lost - F.normalize(z, dim=1)).norm(
        dim=1
    ).max() > 0.1  # five anchors do not span six dimensions


def test_projection_equals_scikit_learn():
    z, a = normal(30, 8), normal(11, 8, seed=1)
    expected = torch.from_numpy(cosine_similarity(z.numpy(), a.numpy()))
    torch.testing.assert_close(rr.relative_projection(z, a), expected)


def test_leading_axes_are_kept():
    z, a = normal(4, 5, 8), normal(11, 8, seed=1)
    r = rr.relative_projection(z, a)
    assert r.shape == (4, 5, 11)
    torch.testing.assert_close(r[2, 3], rr.relative_projection(z[2, 3], a))


def test_anchors_are_their_own_best_match_and_cosines_are_bounded():
    a = normal(15, 4)
    r = rr.relative_projection(a, a)
    torch.testing.assert_close(r.diagonal(), torch.ones(15, dtype=F64))
    assert r.abs().max() <= 1 + 1e-12 and torch.equal(r.argmax(1), torch.arange(15))


def test_a_zero_vector_has_similarity_zero():
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    r = rr.relative_projection(z, torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    assert r.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    r.sum().backward()
    assert z.grad.isfinite().all()


def test_gradient_equals_finite_differences():
    z, a = normal(5, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(rr.relative_projection, (z, a))


def test_another_similarity_takes_the_place_of_the_cosine():
    z, a = normal(6, 4), normal(3, 4, seed=1)
    found = rr.relative_projection(z, a, similarity=torch.cdist)
    torch.testing.assert_close(found, torch.from_numpy(cdist(z.numpy(), a.numpy())))


@pytest.mark.parametrize(
    ("anchors", "similarity", "message"),
    [
        (torch.ones(3, 5), "cosine", "samples have 4 dimensions and anchors 5"),
        (torch.ones(0, 4), "cosine", "k = 0"),
        (torch.tensor([[1.0] * 4, [math.nan] * 4]), "cosine", "row 1 is not"),
        (torch.ones(3, 4), "cosin", "got 'cosin'"),
    ],
)
def test_projection_refuses(anchors, similarity, message):
    with pytest.raises(ValueError, match=message):
        rr.relative_projection(torch.ones(2, 4), anchors, similarity)


# --- anchors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["uniform", "stratified", "fps", "kmeans"])
def test_anchors_are_different_samples_and_repeatable(strategy):
    inputs = dict(targets=torch.arange(60) % 3, latents=normal(60, 5, dtype=torch.float32))
    first = rr.sample_anchors(60, 20, strategy, generator=generator(3), **inputs)
    assert len(first.unique()) == 20 and 0 <= first.min() and first.max() < 60
    assert torch.equal(first, rr.sample_anchors(60, 20, strategy, generator=generator(3), **inputs))


def test_uniform_anchors_can_be_all_samples():
    assert sorted(rr.sample_anchors(9, 9, generator=generator()).tolist()) == list(range(9))


@pytest.mark.parametrize("k", [4, 10, 23])
def test_stratified_counts_differ_by_at_most_one(k):
    targets = torch.tensor([0] * 100 + [1] * 10 + [2] * 30)
    counts = targets[
        rr.sample_anchors(140, k, "stratified", targets=targets, generator=generator())
    ].bincount(minlength=3)
    assert counts.sum() == k and counts.max() - counts.min() <= 1


def test_stratified_fills_up_when_a_class_is_exhausted():
    targets = torch.tensor([0] * 50 + [1] * 2)
    assert targets[
        rr.sample_anchors(52, 20, "stratified", targets=targets)
    ].bincount().tolist() == [18, 2]


@pytest.mark.parametrize("strategy", ["fps", "kmeans"])
@pytest.mark.parametrize("seed", range(5))
def test_spread_strategies_visit_every_cluster(strategy, seed):
    centres = 10 * torch.eye(3).repeat_interleave(20, 0)
    latents = centres + 0.1 * normal(60, 3, seed=seed, dtype=torch.float32)
    chosen = rr.sample_anchors(60, 3, strategy, latents=latents, generator=generator(seed))
    assert sorted((chosen // 20).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 6), "1..5 .*, got 6"),
        ((5, 0), "got 0"),
        ((5, 2, "best"), "unknown strategy 'best'"),
        ((5, 2, "stratified"), "needs 5 targets, got none"),
        ((5, 2, "fps"), "needs 5 latents, got none"),
        ((5, 2, "kmeans"), "needs 5 latents, got none"),
    ],
)
def test_sampling_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        rr.sample_anchors(*arguments)


def test_sampling_refuses_latents_of_another_number():
    with pytest.raises(ValueError, match="needs 5 latents, got 4"):
        rr.sample_anchors(5, 2, "fps", latents=torch.ones(4, 2))


# --- the module -------------------------------------------------------------------------------------------


def anchor_only_gradient(anchor_grad, rows):
    """Gradient that reaches the encoder through the anchors alone: the samples' codes are made constant."""
    inputs = normal(6, 4)
    torch.manual_seed(0)
    encoder = nn.Linear(4, 3).to(F64)
    projection = rr.RelativeProjection(
        encoder, torch.arange(2) if rows else inputs[:2], None, anchor_grad
    )
    projection.project(inputs).square().sum().backward()
    r_all, a = encoder(inputs).detach(), encoder(inputs[:2])
    through_anchors = torch.autograd.grad(
        rr.relative_projection(r_all, a).square().sum(), encoder.weight
    )[0]
    z, fixed = encoder(inputs), encoder(inputs[:2]).detach()
    through_samples = torch.autograd.grad(
        rr.relative_projection(z, fixed).square().sum(), encoder.weight
    )[0]
    return encoder.weight.grad, through_samples, through_anchors


@pytest.mark.parametrize("rows", [False, True])
def test_gradients_reach_the_anchors_only_if_asked(rows):
    found, through_samples, through_anchors = anchor_only_gradient(False, rows)
    assert through_anchors.norm() > 0.01
    torch.testing.assert_close(found, through_samples)
    found, through_samples, through_anchors = anchor_only_gradient(True, rows)
    torch.testing.assert_close(found, through_samples + through_anchors)


def test_the_full_gradient_is_orthogonal_to_common_rotations_and_the_stopped_one_is_not():
    z, a = normal(8, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    skew = normal(5, 5, seed=2)
    skew = skew - skew.T  # a rotation moves a code by code @ skew
    (normal(8, 4, seed=3) * rr.relative_projection(z, a)).sum().backward()
    stopped = (z.grad * (z @ skew)).sum()
    assert stopped.abs() > 0.1
    assert (stopped + (a.grad * (a @ skew)).sum()).abs() < 1e-12


def test_the_anchors_are_encoded_with_the_current_weights():
    inputs = normal(6, 4)
    model = linear_model(inputs[:3])
    before = model.encode(inputs)
    with torch.no_grad():
        model.encoder.encoder.bias.add_(1.0)
    expected = rr.relative_projection(model.absolute(inputs), model.absolute(inputs[:3]))
    torch.testing.assert_close(model.encode(inputs), expected)
    assert not torch.allclose(before, expected)


def test_anchors_given_as_rows_equal_anchors_given_as_inputs():
    inputs = normal(6, 4)
    by_rows, by_inputs = linear_model(inputs[:3]), linear_model(inputs[:3])
    torch.manual_seed(0)
    by_rows = rr.RelativeModel(
        by_inputs.encoder.encoder, by_inputs.head, torch.tensor([0, 1, 2])
    ).to(F64)
    torch.testing.assert_close(by_rows.encode(inputs), by_inputs.encode(inputs))


def test_the_forward_pass_is_layer_norm_of_the_projection():
    inputs = normal(6, 4)
    projection = linear_model(inputs[:3]).encoder
    expected = F.layer_norm(projection.project(inputs), (3,))
    torch.testing.assert_close(projection(inputs), expected)
    bare = rr.RelativeProjection(projection.encoder, inputs[:3], normalize=None)
    torch.testing.assert_close(bare(inputs), projection.project(inputs))


def test_frozen_anchors_give_the_same_codes_and_skip_the_encoder():
    inputs, calls = normal(6, 4), []
    model = linear_model(inputs[:3]).eval()
    expected = model.encode(inputs)
    model.encoder.freeze_anchors()
    model.encoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model.encode(inputs), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "drop", [lambda m: m.train().eval(), lambda m: m.load_state_dict(m.state_dict())]
)
def test_training_and_loading_drop_frozen_anchors(drop):
    model = linear_model(normal(3, 4)).eval()
    model.encoder.freeze_anchors()
    assert model.encoder.frozen is not None
    drop(model)
    assert model.encoder.frozen is None


def test_anchors_travel_with_the_weights():
    stored = linear_model(normal(3, 4), seed=1)
    loaded = linear_model(normal(3, 4, seed=5))
    loaded.load_state_dict(stored.state_dict())
    inputs = normal(6, 4, seed=2)
    torch.testing.assert_close(loaded(inputs), stored(inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rr.RelativeProjection(nn.Identity(), torch.ones(0, 3)), "at least one sample"),
        (
            lambda: rr.RelativeProjection(nn.Identity(), torch.ones(2, 3), "batchnorm"),
            "got 'batchnorm'",
        ),
        (
            lambda: rr.RelativeProjection(nn.Identity(), torch.ones(2, 3)).freeze_anchors(),
            "call eval",
        ),
        (
            lambda: rr.RelativeProjection(nn.Identity(), torch.arange(2)).eval().freeze_anchors(),
            "rows",
        ),
    ],
)
def test_the_module_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- stitching --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoders():
    torch.manual_seed(0)
    anchors = torch.rand(10, 1, 8, 8)
    return (
        anchors,
        [rr.RelativeAutoencoder(anchors).eval() for _ in range(2)],
        rr.Autoencoder().eval(),
    )


def test_stitching_a_model_with_itself_is_the_model(autoencoders):
    _, (model, _), absolute = autoencoders
    x = torch.rand(5, 1, 8, 8, generator=generator())
    torch.testing.assert_close(rr.stitch(model, model)(x), model(x))
    torch.testing.assert_close(rr.stitch(absolute, absolute)(x), absolute(x))


def test_the_normalisation_of_the_head_is_used(autoencoders):
    _, (a, b), _ = autoencoders
    x = torch.rand(5, 1, 8, 8, generator=generator())
    before = rr.stitch(a, b)(x)
    with torch.no_grad():
        a.encoder.norm.bias.add_(1.0)
        torch.testing.assert_close(rr.stitch(a, b)(x), before)
        b.encoder.norm.bias.add_(1.0)
        torch.testing.assert_close(rr.stitch(a, b)(x), b.head(F.layer_norm(a.encode(x), (10,)) + 1))


def test_a_rotated_encoder_can_be_stitched_exactly_if_relative_and_not_if_absolute():
    inputs, q = normal(30, 4), orthogonal(3, -1)
    a = linear_model(inputs[:5]).eval()
    b = linear_model(inputs[:5]).eval()  # the same network, its latent space turned and stretched
    with torch.no_grad():
        for parameter in (b.encoder.encoder.weight, b.encoder.encoder.bias):
            parameter.copy_(5 * q @ parameter)
    torch.testing.assert_close(rr.stitch(b, a)(inputs), a(inputs))
    head = nn.Linear(3, 2).to(F64)
    absolute = [rr.AbsoluteModel(m.encoder.encoder, head, 3).eval() for m in (a, b)]
    assert (rr.stitch(absolute[1], absolute[0])(inputs) - absolute[0](inputs)).abs().max() > 0.1


def test_parallel_anchors_may_differ():
    a, b = linear_model(normal(3, 4)).eval(), linear_model(normal(3, 4, seed=1)).eval()
    assert rr.stitch(a, b, parallel=True)(normal(6, 4)).shape == (6, 2)
    with pytest.raises(ValueError, match="the same samples in the same order"):
        rr.stitch(a, b)


def absolute_model(width, code_dim=None):
    return rr.AbsoluteModel(nn.Linear(4, width), nn.Linear(width, 2), code_dim or width).eval()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (lambda: absolute_model(3).train(), lambda: absolute_model(3), "eval mode"),
        (lambda: absolute_model(3), lambda: absolute_model(3).train(), "eval mode"),
        (lambda: absolute_model(3), lambda: absolute_model(5), "codes of 3 numbers, the head reads 5"),
        (lambda: linear_model(normal(3, 4)).eval(), lambda: linear_model(normal(2, 4)).eval(), "the head reads 2"),
        (lambda: linear_model(normal(3, 4)).eval(), lambda: linear_model(normal(3, 4).flip(0)).eval(), "order"),
        (lambda: linear_model(normal(3, 4)).eval(), lambda: absolute_model(3), "one model is relative"),
    ],
)  # fmt: skip
def test_stitching_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        rr.stitch(a(), b())


@pytest.mark.parametrize("model", [lambda: absolute_model(3), lambda: linear_model(normal(3, 4))])
def test_a_head_refuses_a_code_of_another_width(model):
    with pytest.raises(ValueError, match="codes of 3 numbers, got 7"):
        model().decode(torch.ones(2, 7))


# --- networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "channels"), [(8, (1, 16, 32)), (28, (1, 4, 8, 8, 8)), (32, (3, 4, 4))]
)
def test_the_decoder_mirrors_the_encoder(side, channels):
    x = torch.rand(3, channels[0], side, side, generator=generator())
    for model in (rr.Autoencoder(channels, side, 7), rr.RelativeAutoencoder(x, channels)):
        assert model(x).shape == x.shape
        assert 0 <= model(x).min() and model(x).max() <= 1


def test_without_its_last_activation_the_encoder_leaves_the_orthant():
    x = torch.rand(20, 1, 8, 8, generator=generator())
    torch.manual_seed(0)
    squeezed, free = (
        rr.conv_encoder((1, 16, 32)),
        rr.conv_encoder((1, 16, 32), last_activation=False),
    )
    spread = [rr.relative_projection(e(x), e(x)).std() for e in (squeezed, free)]
    assert squeezed(x).min() > -0.2 and free(x).min() < -0.5
    assert spread[1] > spread[0]


def test_graph_convolution_equals_the_dense_formula():
    links = torch.tensor(
        [[0, 1, 1, 2], [1, 0, 2, 1]]
    )  # a path of three nodes, and a fourth one alone
    torch.manual_seed(0)
    network = rr.GraphNetwork(links, 4, 5)
    x = normal(4, 5, dtype=torch.float32)
    a = torch.eye(4)
    a[links[0], links[1]] = 1
    a = a / (a.sum(1)[:, None] * a.sum(0)).sqrt()
    expected = a @ network.second((a @ network.first(x)).relu())
    torch.testing.assert_close(network(x), expected)
    network.drop.p = 0.5
    torch.testing.assert_close(network.eval()(x), expected)
    assert not torch.allclose(network.train()(x), expected)


def test_patches_are_read_with_their_positions():
    torch.manual_seed(0)
    network = rr.PatchTransformer((1, 4, 4), (1, 4), dim=8).eval()
    x = torch.rand(2, 1, 4, 4, generator=generator())
    assert network(x).shape == (2, 8)
    assert not torch.allclose(network(x), network(x.flip(2)))
    with torch.no_grad():
        network.position.zero_()  # a mean over tokens without positions does not see the order of the rows
    torch.testing.assert_close(network(x), network(x.flip(2)))
    with pytest.raises(ValueError, match="do not tile"):
        rr.PatchTransformer((1, 4, 4), (1, 3))


# --- metrics ----------------------------------------------------------------------------------------------


def test_identical_spaces_score_one():
    z = normal(40, 6)
    assert rr.mean_reciprocal_rank(z, z) == 1
    assert rr.neighbour_jaccard(z, z, 5) == 1
    assert rr.mean_cosine(z, 3 * z) == pytest.approx(1)
    assert rr.pairwise_cosine_correlation(z, z @ orthogonal(6, 1)) == pytest.approx(1)


def test_unrelated_spaces_score_chance():
    n, a, b = 400, normal(400, 8), normal(400, 8, seed=1)
    harmonic = sum(1 / i for i in range(1, n + 1))
    assert rr.mean_reciprocal_rank(a, b) == pytest.approx(harmonic / n, rel=0.5)
    assert rr.neighbour_jaccard(a, b, 10) == pytest.approx(10 / (2 * n), rel=0.5)
    assert abs(rr.pairwise_cosine_correlation(a, b)) < 0.1


def test_a_collapsed_space_has_mean_cosine_one_and_no_retrieval():
    a = torch.ones(50, 4, dtype=F64)
    assert rr.mean_cosine(a, a) == pytest.approx(1)
    assert rr.mean_reciprocal_rank(a, a) == pytest.approx(1 / 50)


def test_metrics_equal_a_loop():
    a, b, k = normal(30, 5), normal(30, 5) + 0.8 * normal(30, 5, seed=1), 4
    cosines = {"ab": 1 - cdist(a, b, "cosine"), "bb": 1 - cdist(b, b, "cosine")}
    reciprocal, jaccard = [], []
    for i in range(30):
        order = sorted(range(30), key=lambda j: -cosines["ab"][i, j])
        reciprocal.append(1 / (1 + order.index(i)))
        found, true = set(order[:k]), set(sorted(range(30), key=lambda j: -cosines["bb"][i, j])[:k])
        jaccard.append(len(found & true) / len(found | true))
    assert rr.mean_reciprocal_rank(a, b) == pytest.approx(sum(reciprocal) / 30)
    assert rr.neighbour_jaccard(a, b, k) == pytest.approx(sum(jaccard) / 30)
    assert 0.1 < sum(jaccard) / 30 < 0.9  # neither trivial end


def test_the_proxy_is_the_mean_cosine_of_relative_spaces():
    r, reference = normal(30, 5), normal(30, 5, seed=1)
    expected = (
        sum((u @ v / (u.norm() * v.norm())).item() for u, v in zip(r, reference, strict=True)) / 30
    )
    assert rr.latent_similarity_proxy(r, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rr.mean_reciprocal_rank(torch.ones(3, 2), torch.ones(3, 4)), "same sample"),
        (lambda: rr.mean_cosine(torch.ones(3, 2), torch.ones(4, 2)), "same sample"),
        (lambda: rr.neighbour_jaccard(torch.ones(3, 2), torch.ones(4, 2), 1), "same sample"),
        (lambda: rr.neighbour_jaccard(torch.ones(3, 2), torch.ones(3, 2), 4), "1..3 .*, got 4"),
        (lambda: rr.pairwise_cosine_correlation(torch.ones(3, 2), torch.ones(4, 2)), "got 3 and 4"),
        (lambda: rr.pairwise_cosine_correlation(torch.ones(2, 2), torch.ones(2, 2)), "at least 3"),
    ],
)
def test_metrics_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- words ------------------------------------------------------------------------------------------------


def test_cooccurrence_counts_neighbours_both_ways_and_not_across_lines():
    counts = rr.cooccurrence(torch.tensor([[0, 1, 1], [2, 0, 1]]), 3)
    assert counts.tolist() == [[0, 2, 1], [2, 2, 0], [1, 0, 0]]


def test_a_corpus_follows_its_transition_probabilities():
    positions = normal(4, 3)
    corpus = rr.markov_corpus(positions, 200_000, generator(1))
    found = torch.zeros(4, 4, dtype=F64)
    found.index_put_(
        (corpus[:, :-1].flatten(), corpus[:, 1:].flatten()),
        torch.ones(1, dtype=F64),
        accumulate=True,
    )
    weights = (positions @ positions.T / math.sqrt(3)).exp() / (torch.arange(4) + 10)
    torch.testing.assert_close(
        found / found.sum(1, keepdim=True),
        weights / weights.sum(1, keepdim=True),
        atol=0.01,
        rtol=0,
    )


def test_independent_words_have_no_mutual_information():
    frequency = torch.tensor([5.0, 3.0, 2.0], dtype=F64)
    assert rr.ppmi_svd(frequency[:, None] * frequency, 2).abs().max() < 1e-6


def test_ppmi_vectors_reproduce_the_matrix_they_factor():
    counts = normal(6, 6).square() + 0.1
    counts = counts + counts.T
    ppmi = (
        (counts * counts.sum() / (counts.sum(1, keepdim=True) * counts.sum(0))).log().clamp_min(0)
    )
    vectors = rr.ppmi_svd(counts, 6)  # U S U^T, the matrix with its eigenvalues made positive
    torch.testing.assert_close(vectors @ vectors.T, _absolute_value(ppmi))


def _absolute_value(symmetric):
    values, basis = torch.linalg.eigh(symmetric)
    return basis @ torch.diag(values.abs()) @ basis.T


def test_hellinger_pca_equals_scikit_learn_up_to_signs():
    counts = normal(20, 20).square()
    roots = (counts / counts.sum(1, keepdim=True)).sqrt().numpy()
    expected = torch.from_numpy(PCA(4, svd_solver="full").fit_transform(roots))
    torch.testing.assert_close(rr.hellinger_pca(counts, 4).abs(), expected.abs())


def test_a_word_without_neighbours_gives_no_nan():
    counts = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
    assert rr.ppmi_svd(counts, 2).isfinite().all() and rr.hellinger_pca(counts, 2).isfinite().all()


@pytest.mark.parametrize("embed", [rr.ppmi_svd, rr.hellinger_pca])
@pytest.mark.parametrize(
    ("counts", "dim", "message"),
    [
        (torch.ones(3, 4), 2, "square"),
        (torch.tensor([[1.0, -1.0], [1.0, 1.0]]), 1, "smallest -1"),
        (torch.ones(3, 3), 0, "got 0"),
        (torch.ones(3, 3), 4, "1..3, got 4"),
    ],
)
def test_embeddings_refuse(embed, counts, dim, message):
    with pytest.raises(ValueError, match=message):
        embed(counts, dim)


def test_a_corpus_refuses_too_few_tokens():
    with pytest.raises(ValueError, match="need 400 tokens, got 100"):
        rr.markov_corpus(normal(4, 3), 100)
