"""Deep conjugate directions: the solver's guarantees, its rivals against SciPy, the loss against the solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg, spsolve

from nnlib.scientific import conjugate_directions as cd

EXACT = dict(rtol=1e-10, atol=1e-12)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(rng, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def box(*sides):
    return cd.PoissonOperator(torch.ones(*sides, dtype=torch.bool))


@pytest.fixture
def disc():
    """A 12 x 10 box with a solid disc."""
    i, j = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
    return cd.PoissonOperator((i - 6) ** 2 + (j - 5) ** 2 > 5)


def identity(r):
    return r


# The matrix


@pytest.mark.parametrize("shape", [(6, 8), (4, 5, 6)])
def test_eigenvalues_of_the_empty_box(shape):
    sides = [4 * np.sin(np.pi * np.arange(1, n + 1) / (2 * n + 2)) ** 2 for n in shape]
    expected = sides[0]
    for side in sides[1:]:
        expected = np.add.outer(expected, side)
    found = np.linalg.eigvalsh(box(*shape).to_scipy().toarray())
    np.testing.assert_allclose(found, np.sort(expected.ravel()), atol=1e-12)


def test_the_operator_is_its_matrix_symmetric_and_positive(disc, rng):
    x, y = randn(rng, 2, 12, 10)
    matrix = disc.to_scipy()
    np.testing.assert_allclose(disc(x)[disc.mask], matrix @ x[disc.mask].numpy(), atol=1e-12)
    assert disc(x)[~disc.mask].abs().max() == 0
    torch.testing.assert_close(cd.dot(disc(x), y), cd.dot(x, disc(y)), **EXACT)
    assert np.linalg.eigvalsh(matrix.toarray())[0] > 0
    torch.testing.assert_close(disc(torch.stack([x, y]))[1], disc(y), **EXACT)


def test_a_dead_end_has_diagonal_one():
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[1, 2] = mask[3, 2] = mask[2, 1] = False  # cell (2, 2) is open to the right only
    op = cd.PoissonOperator(mask)
    assert op.diagonal()[2, 2] == 1
    row_sums = op(torch.ones(5, 5, dtype=torch.float64))
    assert row_sums[2, 2] == 0 and row_sums[0, 0] == 2 and row_sums[0, 1] == 1


def test_the_shift_is_added(disc, rng):
    x = randn(rng, 12, 10) * disc.mask
    torch.testing.assert_close(cd.PoissonOperator(disc.mask, 0.3)(x), disc(x) + 0.3 * x, **EXACT)


def test_enclosed_fluid_is_refused_and_can_be_filled():
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[2:5, 2:5] = False
    mask[3, 3] = True
    with pytest.raises(ValueError, match="1 fluid cells are enclosed"):
        cd.PoissonOperator(mask)
    opened = cd.open_region(mask)
    assert opened.sum() == 40 and not opened[3, 3]
    cd.PoissonOperator(mask, shift=0.1)  # with a shift it is regular


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_sine_transform_solves_the_box(rng, shift):
    op = cd.PoissonOperator(torch.ones(6, 9, dtype=torch.bool), shift)
    b = randn(rng, 6, 9)
    torch.testing.assert_close(op(cd.box_solve(b, shift)), b, **EXACT)


def test_conduction_is_symmetric_and_contains_the_empty_box(rng):
    x, y = randn(rng, 2, 5, 6)
    constant = cd.conduction(torch.ones(5, 6, dtype=torch.float64))
    torch.testing.assert_close(constant(x), box(5, 6)(x), **EXACT)
    varied = cd.conduction(randn(rng, 5, 6).exp())
    torch.testing.assert_close(cd.dot(varied(x), y), cd.dot(x, varied(y)), **EXACT)
    assert cd.dot(x, varied(x)) > 0
    step = cd.conduction(torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    matrix = torch.stack([step(e.view(1, 2)).flatten() for e in torch.eye(2, dtype=torch.float64)])
    expected = [[1 + 2 + 1 + 1, -2], [-2, 2 + 3 + 3 + 3]]  # faces: 1, 2, 3 along, twice k across
    torch.testing.assert_close(matrix, torch.tensor(expected, dtype=torch.float64), **EXACT)


# The solver's guarantees


def test_the_identity_network_is_conjugate_gradients(disc, rng):
    b = randn(rng, 12, 10) * disc.mask
    ours = cd.dcdm(disc, b, identity, tol=1e-8)
    plain = cd.conjugate_gradient(disc, b, tol=1e-8)
    torch.testing.assert_close(ours.residuals, plain.residuals, rtol=1e-6, atol=0)


def test_conjugate_gradients_agree_with_scipy(disc, rng):
    b = randn(rng, 12, 10) * disc.mask
    steps = []
    x, info = cg(disc.to_scipy(), b[disc.mask].numpy(), rtol=1e-6, callback=steps.append)
    ours = cd.conjugate_gradient(disc, b, tol=1e-6)
    assert info == 0 and ours.iterations == len(steps)
    np.testing.assert_allclose(ours.x[disc.mask], x, rtol=1e-8, atol=1e-9)


def test_the_exact_inverse_needs_one_step(rng):
    op, b = box(8, 8), randn(rng, 8, 8)
    result = cd.dcdm(op, b, lambda r: -3 * cd.box_solve(r), tol=1e-10)
    assert result.iterations == 1 and result.converged
    torch.testing.assert_close(result.x, cd.box_solve(b), **EXACT)


def test_random_directions_end_after_n_steps_if_all_are_kept(rng):
    op, b = box(5, 5), randn(rng, 5, 5)
    result = cd.dcdm(op, b, lambda r: randn(rng, 5, 5), tol=1e-9, memory=25)
    assert result.converged and result.iterations <= 25
    forgetful = cd.dcdm(op, b, lambda r: randn(rng, 5, 5), tol=1e-9, memory=2, max_iter=25)
    assert not forgetful.converged and forgetful.iterations == 25


@pytest.mark.parametrize("memory", [0, 2])
def test_the_error_never_grows_whatever_the_direction(disc, rng, memory):
    b = randn(rng, 12, 10) * disc.mask
    solution = torch.zeros_like(b)
    solution[disc.mask] = torch.from_numpy(spsolve(disc.to_scipy(), b[disc.mask].numpy()))
    energies = [cd.dot(solution, disc(solution))]

    def note(x):
        energies.append(cd.dot(x - solution, disc(x - solution)))

    cd.dcdm(disc, b, lambda r: randn(rng, 12, 10) * disc.mask, 1e-9, 40, memory, note)
    assert len(energies) == 41
    assert (torch.stack(energies).diff() <= 0).all()


def test_fixed_steps_are_richardsons_iteration(rng):
    op, b, seen = box(4, 4), randn(rng, 4, 4), []
    result = cd.fixed_step(op, b, identity, 0.2, 5, seen.append)
    x = torch.zeros_like(b)
    for k in range(5):
        x = x + 0.2 * (b - op(x))
        torch.testing.assert_close(seen[k], x, **EXACT)
    assert result.converged and not cd.fixed_step(op, b, identity, 1.0, 20).converged


def test_length_and_sign_of_the_direction_do_not_matter(rng):
    op, b = box(8, 6), randn(rng, 8, 6)
    one = cd.dcdm(op, b, torch.tanh)
    other = cd.dcdm(op, b, lambda r: -37 * torch.tanh(r))
    torch.testing.assert_close(one.residuals, other.residuals, rtol=1e-9, atol=0)
    torch.testing.assert_close(one.x, other.x, **EXACT)


def test_directions_are_orthogonal_to_the_last_two(rng):
    op, b, seen = box(8, 6), randn(rng, 8, 6), []
    cd.dcdm(op, b, torch.tanh, callback=seen.append)
    steps = torch.stack(seen).diff(dim=0)  # x_{k+1} - x_k is along d_k
    gram = steps.flatten(1) @ op(steps).flatten(1).T
    gram = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None]
    for apart in (1, 2):
        assert gram.diagonal(apart).abs().max() < 1e-8
    assert gram.diagonal(3).abs().max() > 1e-4


@pytest.mark.parametrize(
    "kind", ["torch", "torch sparse", "numpy", "scipy", "linear operator", "function"]
)
def test_every_kind_of_matrix_gives_the_same_solution(rng, kind):
    half = randn(rng, 12, 12)
    a, b = half @ half.T + torch.eye(12, dtype=torch.float64), randn(rng, 12)
    forms = {
        "torch": a,
        "torch sparse": a.to_sparse_coo(),
        "numpy": a.numpy(),
        "scipy": sparse.csr_array(a.numpy()),
        "linear operator": LinearOperator((12, 12), matvec=lambda v: a.numpy() @ v, dtype=float),
        "function": lambda v: a @ v,
    }
    result = cd.dcdm(forms[kind], b, identity, tol=1e-12, memory=12)
    torch.testing.assert_close(result.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-9)


# Rivals


def test_deflation_by_all_eigenvectors_needs_no_iteration(rng):
    op, b = box(4, 6), randn(rng, 4, 6)
    basis = torch.linalg.qr(randn(rng, 24, 24))[0].view(24, 4, 6)
    assert cd.conjugate_gradient(op, b, 1e-9, deflation=basis).iterations == 0


def test_deflated_pcg_without_vectors_is_jacobi_pcg(disc, rng):
    b = randn(rng, 12, 10) * disc.mask
    inverse = torch.where(disc.mask, 1 / disc.diagonal().clamp_min(1), 0.0)
    jacobi = cd.conjugate_gradient(disc, b, preconditioner=lambda v: inverse * v)
    none, some = cd.deflated_pcg(disc, b, num_vectors=0), cd.deflated_pcg(disc, b, num_vectors=16)
    torch.testing.assert_close(none.residuals, jacobi.residuals, **EXACT)
    assert some.converged and some.iterations < none.iterations


def test_incomplete_cholesky_keeps_the_pattern_and_matches_the_matrix_on_it(disc):
    apply, n = cd.incomplete_cholesky(disc), int(disc.mask.sum())
    unit = torch.zeros(n, 12, 10, dtype=torch.float64)
    unit[:, disc.mask] = torch.eye(n, dtype=torch.float64)
    inverse = np.stack([apply(u)[disc.mask].numpy() for u in unit])
    matrix = disc.to_scipy().toarray()
    approximation = np.linalg.inv(inverse)
    np.testing.assert_allclose(approximation[matrix != 0], matrix[matrix != 0], atol=1e-10)
    factor = np.linalg.cholesky(approximation)
    assert abs(factor[(matrix == 0) & np.tri(n, dtype=bool)]).max() < 1e-10


def test_incomplete_cholesky_of_a_tridiagonal_matrix_is_exact(rng):
    a = sparse.diags_array([-np.ones(9), np.full(10, 2.5), -np.ones(9)], offsets=[-1, 0, 1])
    b = randn(rng, 10)
    result = cd.conjugate_gradient(a, b, 1e-12, preconditioner=cd.incomplete_cholesky(a))
    assert result.iterations == 1


# Training


def test_lanczos_finds_the_spectrum(rng):
    op = box(5, 7)
    values, vectors = cd.lanczos_ritz(op, 35, rng)
    basis = vectors.flatten(1)
    gram = basis @ basis.T
    torch.testing.assert_close(
        gram, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        values, torch.from_numpy(np.linalg.eigvalsh(op.to_scipy().toarray()))
    )
    torch.testing.assert_close(op(vectors), values[:, None, None] * vectors, rtol=0, atol=1e-8)
    few, _ = cd.lanczos_ritz(op, 10, rng)
    assert len(few) == 10 and (few.diff() > 0).all()
    assert values[0] <= few[0] < few[-1] <= values[-1] + 1e-12


def test_lanczos_stops_where_the_krylov_space_ends():
    start = torch.zeros(6, 6, dtype=torch.float64)
    start[0] = 1.0
    assert len(cd.lanczos_ritz(box(6, 6), 36, start=start)[0]) < 36


def test_training_data_is_heavy_in_the_low_half(rng):
    vectors = torch.eye(20, dtype=torch.float64).view(20, 4, 5)
    batch = cd.RitzDataset(vectors, theta=2).sample(4000, rng)
    assert batch.shape == (4000, 1, 4, 5)
    torch.testing.assert_close(batch.flatten(1).norm(dim=1), torch.ones(4000, dtype=torch.float64))
    power = batch.flatten(1).square().mean(0)
    ratio = power[:12].mean() / power[12:].mean()
    assert 50 < ratio < 110 and power[:12].std() / power[:12].mean() < 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_network_has_the_papers_size_and_keeps_the_shape(rng, dim):
    net = cd.DirectionNet(dim)  # a convolution from 1 channel, 14 with 16, one linear map
    expected = 16 * (3**dim + 1) + 14 * 16 * (16 * 3**dim + 1) + 17
    assert sum(p.numel() for p in net.parameters()) == expected
    x = torch.randn(2, 1, *[4] * dim, generator=rng)
    assert net(x).shape == x.shape


def test_loss_is_the_solvers_first_residual_and_blind_to_scale(disc, rng):
    torch.manual_seed(0)
    net = cd.DirectionNet(filters=4).double()
    b = randn(rng, 3, 1, 12, 10) * disc.mask
    b = b / b.flatten(1).norm(dim=1)[:, None, None, None]
    first = [
        cd.dcdm(disc, v[0], cd.network_direction(net, disc.mask), max_iter=1).residuals[1]
        for v in b
    ]
    loss = cd.direction_loss(net, b, disc)
    torch.testing.assert_close(loss, torch.stack(first).square().mean(), **EXACT)
    torch.testing.assert_close(cd.direction_loss(lambda v: -37 * net(v), b, disc), loss, **EXACT)


def test_gradient_of_the_loss(disc, rng):
    b, f, step = (randn(rng, 2, 12, 10) * disc.mask for _ in range(3))
    g = f.clone().requires_grad_()
    loss = lambda d: cd.line_search_residual(d, b, disc).sum()  # noqa: E731
    slope = (torch.autograd.grad(loss(g), g)[0] * step).sum()
    numeric = (loss(f + 1e-5 * step) - loss(f - 1e-5 * step)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=0)


def test_energy_cosine_is_the_share_of_the_error_removed(rng):
    op, b, f = box(6, 6), randn(rng, 4, 6, 6), randn(rng, 4, 6, 6)
    x = torch.stack([cd.box_solve(v) for v in b])
    cos = cd.energy_cosine(f, b, op, x)
    torch.testing.assert_close(cd.energy_cosine(2 * x, b, op, x), torch.ones_like(cos), **EXACT)
    torch.testing.assert_close(cd.energy_cosine(-5 * f, b, op, x), -cos, **EXACT)
    for k in range(4):
        error = cd.dcdm(op, b[k], lambda r, k=k: f[k], max_iter=1).x - x[k]
        left = cd.dot(error, op(error)) / cd.dot(x[k], op(x[k]))
        torch.testing.assert_close(left, 1 - cos[k] ** 2, **EXACT)


# Bad input


def test_a_zero_right_hand_side_is_solved():
    for solve in (
        cd.conjugate_gradient,
        cd.deflated_pcg,
        lambda op, b: cd.dcdm(op, b, identity),
        lambda op, b: cd.fixed_step(op, b, identity, 1.0, 3),
    ):
        result = solve(box(4, 4), torch.zeros(4, 4, dtype=torch.float64))
        assert result.converged and result.iterations == 0 and not result.x.any()


def test_matrices_that_are_not_spd_are_refused(rng):
    op, b = box(6, 6), randn(rng, 6, 6)
    with pytest.raises(RuntimeError, match=r"iteration \d+: d\^T A d .* not positive definite"):
        cd.dcdm(lambda x: op(x) - x, b, identity)
    with pytest.raises(RuntimeError, match="not positive definite"):
        cd.conjugate_gradient(lambda x: op(x) - x, b)
    with pytest.raises(RuntimeError, match=r"iteration 2.*not symmetric"):
        cd.dcdm(lambda x: op(x) + 0.5 * (x.roll(1, 0) - x.roll(-1, 0)), b, identity)
    for bad in (torch.zeros_like, lambda r: r * np.nan):
        with pytest.raises(RuntimeError, match=r"iteration 1.*zero or not finite"):
            cd.dcdm(op, b, bad)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rhs=torch.zeros(5, 4, dtype=torch.float64)), "rhs has shape"),
        (dict(rhs=torch.full((4, 4), torch.nan, dtype=torch.float64)), "finite"),
        (dict(tol=0.0), "tol and max_iter"),
        (dict(max_iter=0), "tol and max_iter"),
        (dict(memory=-1), "memory"),
        (dict(op=3), "expected a matrix"),
        (dict(op=torch.eye(7)), "does not fit 16 unknowns"),
    ],
)
def test_bad_calls(change, message):
    call = dict(op=box(4, 4), rhs=torch.ones(4, 4, dtype=torch.float64), direction=identity)
    with pytest.raises(ValueError, match=message):
        cd.dcdm(**(call | change))


def test_bad_pieces(disc):
    for call, message in (
        (lambda: cd.dcdm(disc, torch.ones(12, 10), identity), "zero on solid"),
        (lambda: box(0, 3), "fluid cell"),
        (lambda: cd.conduction(torch.zeros(2, 2)), "conductivity"),
        (lambda: cd.PoissonOperator(disc.mask, -1.0), "shift"),
        (lambda: cd.lanczos_ritz(disc, 0), "num"),
        (lambda: cd.lanczos_ritz(disc, 5, start=torch.zeros(12, 10)), "must not be zero"),
        (lambda: cd.RitzDataset(torch.ones(4, 2, 2), theta=3), "theta"),
        (lambda: cd.DirectionNet(4), "dim 2 or 3"),
        (lambda: cd.DirectionNet()(torch.ones(1, 1, 5, 4)), "even"),
        (lambda: cd.incomplete_cholesky(sparse.csr_array(np.diag([1.0, -1.0]))), "pivot 1"),
        (lambda: cd.incomplete_cholesky(sparse.csr_array(np.tri(3))), "symmetric"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
