r"""Deep conjugate directions: a network proposes search directions, a line search keeps the guarantees.

`dcdm` solves :math:`Ax=b` for a symmetric positive definite :math:`A`, given as a matrix (torch or
SciPy), as an operator, or as any function that multiplies by it; `conjugate_gradient`,
`deflated_pcg` and `incomplete_cholesky` are its rivals with the same interface. `PoissonOperator`,
`lanczos_ritz`, `RitzDataset`, `DirectionNet` and `direction_loss` make and train the direction.

Source: Kaneda, Akar, Chen, Trevino Kala, Hyde, Teran (2023), "A Deep Conjugate Direction Method for
Iteratively Solving Linear Systems", arXiv:2205.10763.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import fft, ndimage, sparse
from scipy.sparse.linalg import LinearOperator, splu
from torch import Generator, Tensor, nn

Grid = Float[Tensor, "*grid"]
Map = Callable[[Grid], Grid]


# The matrix


def open_region(mask: Bool[Tensor, "*grid"]) -> Bool[Tensor, "*grid"]:
    """The fluid cells of `mask` from which a path through fluid leads out of the box."""
    labels, _ = ndimage.label(np.pad(mask.cpu().numpy(), 1, constant_values=True))
    inner = labels[(slice(1, -1),) * mask.ndim]
    return mask & torch.from_numpy(inner == labels.flat[0]).to(mask.device)


class PoissonOperator:
    r"""Minus the discrete Laplacian plus `shift` on the fluid cells of a box, unit spacing.

    Outside of the box the unknown is 0 (Dirichlet); a solid neighbour drops out (Neumann).

    Parameters
    ----------
    mask : true where a cell is fluid; two or three axes.
    shift : added to the diagonal, not negative.

    Raises
    ------
    ValueError : `mask` has no fluid cell, fluid that is enclosed by solid (the matrix would be
        singular; see `open_region`), or not two or three axes; `shift` is negative.
    """

    def __init__(self, mask: Bool[Tensor, "*grid"], shift: float = 0.0):
        if mask.ndim not in (2, 3) or not mask.any():
            raise ValueError(
                f"mask needs 2 or 3 axes and a fluid cell, got shape {tuple(mask.shape)}"
            )
        if shift < 0:
            raise ValueError(f"shift must not be negative, got {shift}")
        if shift == 0 and (enclosed := int((mask & ~open_region(mask)).sum())):
            raise ValueError(f"{enclosed} fluid cells are enclosed by solid ones; see open_region")
        self.mask, self.shift = mask, shift
        count = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        padded = nn.functional.pad(mask.double(), (1, 1) * mask.ndim, value=1.0)
        for axis in range(mask.ndim):
            inner = [slice(1, -1)] * mask.ndim
            for side in (slice(0, -2), slice(2, None)):
                inner[axis] = side
                count += padded[tuple(inner)]
        self._diagonal = (count + shift) * mask

    def diagonal(self) -> Grid:
        """Neighbours of each cell that are not solid, plus the shift; 0 on solid cells."""
        return self._diagonal

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``A x`` for the last axes of `x`, zero on solid cells; values of `x` there are ignored."""
        mask = self.mask.to(x.dtype)
        x = x * mask
        out = self._diagonal.to(x.dtype) * x
        for axis in range(-self.mask.ndim, 0):
            n = x.shape[axis] - 1
            out.narrow(axis, 1, n).sub_(x.narrow(axis, 0, n))
            out.narrow(axis, 0, n).sub_(x.narrow(axis, 1, n))
        return out * mask

    def to_scipy(self) -> sparse.csr_array:
        """The matrix on the fluid cells, in the order of ``x[op.mask]``."""
        mask = self.mask.cpu().numpy()
        number = np.full(mask.shape, -1)
        number[mask] = np.arange(mask.sum())
        first, second = [], []
        for axis in range(mask.ndim):
            a = np.take(number, range(mask.shape[axis] - 1), axis).ravel()
            b = np.take(number, range(1, mask.shape[axis]), axis).ravel()
            both = (a >= 0) & (b >= 0)
            first.append(a[both])
            second.append(b[both])
        pairs = np.concatenate(first), np.concatenate(second)
        links = sparse.coo_array((np.ones(len(pairs[0])), pairs), shape=(mask.sum(),) * 2)
        diagonal = sparse.diags_array(self._diagonal.cpu().numpy()[mask])
        return sparse.csr_array(diagonal - links - links.T)


def conduction(k: Float[Tensor, "*grid"]) -> Map:
    r"""Multiplication by :math:`-\nabla\cdot(k\nabla\,\cdot)`, 0 outside of the box.

    A face conducts the mean of its two cells, at the border the cell's own value; ``k = 1``
    gives the empty box of `PoissonOperator`.

    Raises
    ------
    ValueError : a conductivity is not positive.
    """
    if not (k > 0).all():
        raise ValueError(
            f"the conductivity must be positive, its smallest value is {float(k.min())}"
        )

    def multiply(x: Grid) -> Grid:
        out = torch.zeros_like(x)
        for axis in range(x.ndim):
            first, last, n = k.narrow(axis, 0, 1), k.narrow(axis, -1, 1), k.shape[axis] - 1
            inner = (k.narrow(axis, 0, n) + k.narrow(axis, 1, n)) / 2
            end = torch.zeros_like(x.narrow(axis, 0, 1))
            slope = torch.diff(x, dim=axis, prepend=end, append=end)
            out -= torch.diff(torch.cat([first, inner, last], axis) * slope, dim=axis)
        return out

    return multiply


def box_solve(rhs: Float[Tensor, "*grid"], shift: float = 0.0) -> Float[Tensor, "*grid"]:
    r"""Exact solution on the empty box by the sine transform.

    The eigenvalues are :math:`\sum_a4\sin^2\frac{\pi i_a}{2(N_a+1)}` plus the shift.
    """
    values = np.full(rhs.shape, float(shift))
    for axis, n in enumerate(rhs.shape):
        shape = [-1 if a == axis else 1 for a in range(rhs.ndim)]
        values += (4 * np.sin(np.pi * np.arange(1, n + 1) / (2 * (n + 1))) ** 2).reshape(shape)
    return torch.from_numpy(fft.idstn(fft.dstn(rhs.cpu().numpy(), type=1) / values, type=1)).to(rhs)


# Solvers


class SolveResult(NamedTuple):
    """Solution, norms of the residual relative to the right-hand side's (from 1 on), success."""

    x: Tensor
    residuals: Float[Tensor, " steps"]
    converged: bool

    @property
    def iterations(self) -> int:
        """Number of updates of `x`."""
        return len(self.residuals) - 1


def as_operator(a: Any, rhs: Grid) -> Map:
    """Multiplication by `a` on tensors like `rhs`: a square matrix (torch, NumPy, SciPy), a SciPy
    ``LinearOperator``, or a function, which is returned as it is.

    Raises
    ------
    ValueError : no such thing, a shape that does not fit `rhs`, or a `rhs` that is not finite
        or not zero on the solid cells of a `PoissonOperator`.
    """
    if not rhs.isfinite().all():
        raise ValueError("the right-hand side must be finite; found nan or inf")
    if isinstance(a, PoissonOperator):
        if a.mask.shape != rhs.shape:
            raise ValueError(f"rhs has shape {tuple(rhs.shape)}, the box {tuple(a.mask.shape)}")
        if rhs[~a.mask].any():
            raise ValueError("the right-hand side must be zero on solid cells")
        return a
    if isinstance(a, Tensor | np.ndarray | LinearOperator) or sparse.issparse(a):
        if tuple(a.shape) != (rhs.numel(), rhs.numel()):
            raise ValueError(f"a {tuple(a.shape)} matrix does not fit {rhs.numel()} unknowns")
        if isinstance(a, Tensor):
            return lambda x: (a @ x.flatten()).view_as(x)
        return lambda x: torch.as_tensor(a @ x.cpu().numpy().ravel()).to(x).view_as(x)
    if not callable(a):
        raise ValueError(f"expected a matrix, an operator or a function, got {a!r}")
    return a


def dot(a: Grid, b: Grid) -> Tensor:
    """Inner product of two arrays of one shape."""
    return torch.dot(a.flatten(), b.flatten())


def dcdm(
    op: Any,
    rhs: Grid,
    direction: Map,
    tol: float = 1e-4,
    max_iter: int = 100,
    memory: int = 2,
    callback: Callable[[Grid], Any] | None = None,
) -> SolveResult:
    r"""Solve :math:`Ax=b` along directions that `direction` proposes.

    Parameters
    ----------
    op : symmetric positive definite; whatever `as_operator` takes.
    rhs : :math:`b`, of any shape; its dtype is the solver's.
    direction : called with the residual divided by its norm; ideally points along
        :math:`A^{-1}r`. Length and sign do not matter. `network_direction` makes one.
    tol : stop at :math:`\|b-Ax\|\le` `tol` :math:`\|b\|`.
    memory : previous directions that a new one is made A-orthogonal to.
    callback : called with each new `x`.

    Raises
    ------
    ValueError : as `as_operator`; `tol` or `max_iter` is not positive, or `memory` is negative.
    RuntimeError : :math:`d^TAd` is not positive or not finite, or :math:`p^TAd\ne d^TAp` for a
        kept direction: the matrix is not SPD, or the direction is zero or not finite.
    """
    if memory < 0:
        raise ValueError(f"memory counts directions and must not be negative, got {memory}")
    multiply, size = _start(op, rhs, tol, max_iter)
    x, r, kept = torch.zeros_like(rhs), rhs, deque(maxlen=memory)
    residuals = [1.0 if size else 0.0]
    while residuals[-1] > tol and len(residuals) <= max_iter:
        d = direction(r / r.norm())
        for p, a_p, p_a_p in kept:
            d = d - dot(d, a_p) / p_a_p * p  # A-orthogonal to the last directions
        a_d = multiply(d)
        d_a_d = _curvature(d, a_d, kept, len(residuals))
        x = x + dot(d, r) / d_a_d * d  # exact line search
        r = rhs - multiply(x)  # recomputed: an updated residual drifts
        kept.append((d, a_d, d_a_d))
        residuals.append(float(r.norm()) / size)
        if callback:
            callback(x)
    return SolveResult(x, torch.tensor(residuals, dtype=torch.float64), residuals[-1] <= tol)


def fixed_step(
    op: Any,
    rhs: Grid,
    direction: Map,
    step: float | Tensor,
    num: int,
    callback: Callable[[Grid], Any] | None = None,
) -> SolveResult:
    r"""The learned iteration without a line search, :math:`x\leftarrow x+s\|r\|f(r/\|r\|)`.

    A baseline: it takes `num` steps, nothing keeps it from diverging, and `converged` is
    whether the residual fell.
    """
    multiply, size = _start(op, rhs, 1.0, num)
    x, r, residuals = torch.zeros_like(rhs), rhs, [1.0 if size else 0.0]
    for _ in range(num if size else 0):
        x = x + step * r.norm() * direction(r / r.norm())
        r = rhs - multiply(x)
        residuals.append(float(r.norm()) / size)
        if callback:
            callback(x)
    return SolveResult(x, torch.tensor(residuals, dtype=torch.float64), residuals[-1] < 1)


def _curvature(d: Tensor, a_d: Tensor, kept: deque, step: int) -> Tensor:
    """``d^T A d``, or an error if A cannot be symmetric positive definite."""
    d_a_d = dot(d, a_d)
    if not (d_a_d > 0 and d_a_d.isfinite()):
        raise RuntimeError(
            f"iteration {step}: d^T A d = {float(d_a_d):.3g} must be positive and finite; the matrix is "
            "not positive definite, or the direction is zero or not finite"
        )
    for p, a_p, p_a_p in kept:
        gap = (dot(p, a_d) - dot(d, a_p)).abs() / (p_a_p * d_a_d).sqrt()
        if gap > torch.finfo(d.dtype).eps ** 0.5:
            raise RuntimeError(
                f"iteration {step}: p^T A d and d^T A p differ by {float(gap):.2g} (relative); "
                "the matrix is not symmetric"
            )
    return d_a_d


def conjugate_gradient(
    op: Any,
    rhs: Grid,
    tol: float = 1e-4,
    max_iter: int = 1000,
    preconditioner: Map | None = None,
    deflation: Float[Tensor, "num ..."] | None = None,
) -> SolveResult:
    """Conjugate gradients, preconditioned and deflated if asked for; parameters as for `dcdm`.

    Parameters
    ----------
    preconditioner : the action of a symmetric positive definite approximation of the inverse.
    deflation : independent vectors whose span is solved exactly at the start, and kept out of
        every direction.

    Raises
    ------
    ValueError : as `dcdm`.
    RuntimeError : the matrix or the preconditioner shows itself as not positive definite.
    """
    multiply, size = _start(op, rhs, tol, max_iter)
    apply = preconditioner or (lambda v: v)
    if deflation is None or len(deflation) == 0:
        coarse = project = lambda v: torch.zeros_like(v)
    else:
        z = deflation.flatten(1)
        a_z = torch.stack([multiply(v) for v in deflation]).flatten(1)
        small = z @ a_z.T

        def coarse(v: Tensor) -> Tensor:
            return (z.T @ torch.linalg.solve(small, z @ v.flatten())).view_as(v)

        def project(v: Tensor) -> Tensor:
            return (z.T @ torch.linalg.solve(small, a_z @ v.flatten())).view_as(v)

    x = coarse(rhs)
    r = rhs - multiply(x)
    z_r = apply(r)
    d, rho = z_r - project(z_r), dot(r, z_r)
    residuals = [float(r.norm()) / size if size else 0.0]
    while residuals[-1] > tol and len(residuals) <= max_iter:
        a_d = multiply(d)
        alpha = rho / _curvature(d, a_d, deque(), len(residuals))
        x, r = x + alpha * d, r - alpha * a_d
        z_r = apply(r)
        rho, before = dot(r, z_r), rho
        if not rho >= 0:
            raise RuntimeError(f"r^T M r = {float(rho):.3g}: the preconditioner is not positive")
        d = z_r - project(z_r) + rho / before * d
        residuals.append(float(r.norm()) / size)
    return SolveResult(x, torch.tensor(residuals, dtype=torch.float64), residuals[-1] <= tol)


def deflated_pcg(
    op: PoissonOperator, rhs: Grid, tol: float = 1e-4, max_iter: int = 1000, num_vectors: int = 16
) -> SolveResult:
    """Conjugate gradients with Jacobi preconditioner, deflated by Ritz vectors (the paper's baseline).

    The vectors come from a Lanczos run of `num_vectors` steps that starts at `rhs`; its
    products with the matrix are not counted as iterations.
    """
    _start(op, rhs, tol, max_iter)
    inverse = op.mask / op.diagonal().clamp_min(torch.finfo(rhs.dtype).tiny).to(rhs.dtype)
    vectors = lanczos_ritz(op, num_vectors, start=rhs)[1] if num_vectors and rhs.any() else None
    return conjugate_gradient(op, rhs, tol, max_iter, lambda v: inverse * v, vectors)


def incomplete_cholesky(op: PoissonOperator | sparse.sparray) -> Map:
    r"""Preconditioner :math:`(LL^T)^{-1}`, where L has the pattern of the matrix's lower half: IC(0).

    Raises
    ------
    ValueError : the matrix is not symmetric, or a pivot is not positive.
    """
    matrix = op.to_scipy() if isinstance(op, PoissonOperator) else sparse.csr_array(op)
    if abs(matrix - matrix.T).max() > 1e-10 * abs(matrix).max():
        raise ValueError("incomplete Cholesky needs a symmetric matrix")
    lower = sparse.tril(matrix, format="csr")
    lower.sort_indices()
    rows: list[dict[int, float]] = []
    for i in range(lower.shape[0]):
        part = slice(lower.indptr[i], lower.indptr[i + 1])
        row: dict[int, float] = {}
        for k, value in zip(lower.indices[part].tolist(), lower.data[part].tolist(), strict=True):
            other = row if k == i else rows[k]
            value -= sum(v * other[j] for j, v in row.items() if j in other)
            if k == i and value <= 0:
                raise ValueError(
                    f"pivot {i} is {value:.3g}: the matrix is not positive enough for IC(0)"
                )
            row[k] = value**0.5 if k == i else value / rows[k][k]
        rows.append(row)
    lower.data = np.array([v for row in rows for v in row.values()])
    factor = splu(lower.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=0.0)

    def apply(v: Grid) -> Grid:
        inside = (
            op.mask if isinstance(op, PoissonOperator) else torch.ones_like(v, dtype=torch.bool)
        )
        out = torch.zeros_like(v)
        values = v[inside].cpu().numpy().astype(float)
        out[inside] = torch.from_numpy(factor.solve(factor.solve(values), trans="T")).to(v)
        return out

    return apply


def _start(op: Any, rhs: Tensor, tol: float, max_iter: int) -> tuple[Map, float]:
    if not tol > 0 or max_iter < 1:
        raise ValueError(f"tol and max_iter must be positive, got {tol} and {max_iter}")
    return as_operator(op, rhs), float(rhs.norm())


# Training


def lanczos_ritz(
    op: PoissonOperator, num: int, generator: Generator | None = None, start: Grid | None = None
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m ..."]]:
    """Approximate eigenvalues, ascending, and eigenvectors from `num` Lanczos steps in float64.

    Each vector is made orthogonal to all before it, twice; without that, copies of the extreme
    vectors appear. The run ends early (m < num) if the Krylov space is exhausted; values below
    1e-8 are dropped.

    Parameters
    ----------
    start : first vector; without it ``A x`` for a normal random `x`, as in the paper.

    Raises
    ------
    ValueError : `num` is below 1 or above the number of fluid cells, or `start` is zero.
    """
    if not 1 <= num <= int(op.mask.sum()):
        raise ValueError(f"num must be from 1 to {int(op.mask.sum())}, got {num}")
    if start is None:
        x = torch.randn(op.mask.shape, dtype=torch.float64, generator=generator)
        start = op(x.to(op.mask.device))
    v = start.double().flatten()
    if not v.norm() > 0:
        raise ValueError("the first vector must not be zero")
    basis = v.new_zeros(num, len(v))
    alpha, beta = [], []
    for k in range(num):
        basis[k] = v / v.norm()
        v = op(basis[k].view(op.mask.shape)).flatten()
        alpha.append(basis[k] @ v)
        for _ in range(2):
            v = v - basis[: k + 1].T @ (basis[: k + 1] @ v)
        beta.append(v.norm())
        if beta[-1] < 1e-10:
            break
    off = torch.stack(beta[:-1]).diag(1) if len(alpha) > 1 else 0.0
    diag = torch.stack(alpha).diag()
    values, small = torch.linalg.eigh(diag + off + (off.T if len(alpha) > 1 else 0.0))
    vectors = small.T @ basis[: len(alpha)]
    good = values > 1e-8
    return values[good], vectors[good].view(-1, *op.mask.shape)


class RitzDataset:
    """Random right-hand sides of unit norm, heavy in the low half of the spectrum (Section 4).

    A coefficient is normal, and times `boost` for the lowest ``m / 2 + theta`` vectors.

    Parameters
    ----------
    ritz_vectors : of ascending Ritz values.

    Raises
    ------
    ValueError : no vector, or ``m / 2 + theta`` is not between 0 and m.
    """

    def __init__(self, ritz_vectors: Float[Tensor, "m ..."], theta: int, boost: float = 9.0):
        m = len(ritz_vectors)
        if m == 0 or not 0 <= m // 2 + theta <= m:
            raise ValueError(f"need 0 <= m / 2 + theta <= m and m > 0, got m={m}, theta={theta}")
        self.vectors = ritz_vectors
        self.weight = torch.ones(m, dtype=ritz_vectors.dtype, device=ritz_vectors.device)
        self.weight[: m // 2 + theta] = boost

    def sample(
        self, batch: int, generator: Generator | None = None
    ) -> Float[Tensor, "batch 1 *grid"]:
        """`batch` right-hand sides with a channel axis."""
        c = torch.randn(batch, len(self.weight), generator=generator).to(self.vectors) * self.weight
        return torch.tensordot(c / c.norm(dim=1, keepdim=True), self.vectors, 1)[:, None]


class DirectionNet(nn.Module):
    """The paper's network for 64 cells a side, in two or three dimensions.

    All convolutions have kernel 3 and `filters` channels; one level of half the resolution
    holds `coarse_blocks` residual pairs, `fine_blocks` follow on the grid itself. The sides of
    the grid must be even.
    """

    def __init__(
        self, dim: int = 2, filters: int = 16, coarse_blocks: int = 3, fine_blocks: int = 2
    ):
        super().__init__()
        if dim not in (2, 3) or min(filters, coarse_blocks + 1, fine_blocks + 1) < 1:
            raise ValueError(
                f"need dim 2 or 3, a filter and no negative number of blocks; got {dim}, {filters}, "
                f"{coarse_blocks}, {fine_blocks}"
            )
        conv = nn.Conv2d if dim == 2 else nn.Conv3d
        self.pool = nn.AvgPool2d(2) if dim == 2 else nn.AvgPool3d(2)
        self.first = conv(1, filters, 3, padding=1)
        self.entry, self.coarse, self.fine = (
            nn.ModuleList(conv(filters, filters, 3, padding=1) for _ in range(n))
            for n in (4, 2 * coarse_blocks, 2 * fine_blocks)
        )
        self.last = conv(filters, 1, 1)

    def forward(self, r: Float[Tensor, "batch 1 *grid"]) -> Float[Tensor, "batch 1 *grid"]:
        if any(n % 2 for n in r.shape[2:]):
            raise ValueError(f"the sides of the grid must be even, got {tuple(r.shape[2:])}")
        a = self.entry[0](self.first(r)).relu()
        b = self.entry[1](a).relu()
        a = self.entry[2](b).relu() + a
        b = self.entry[3](a).relu()
        c = _residual(self.pool(b), self.coarse)
        up = nn.functional.interpolate(c, scale_factor=2, mode="nearest")
        return self.last(_residual(up + b, self.fine))


def _residual(x: Tensor, convs: nn.ModuleList) -> Tensor:
    for i in range(0, len(convs), 2):
        x = convs[i + 1](convs[i](x).relu()).relu() + x
    return x


def line_search_residual(
    direction: Float[Tensor, "batch ..."], rhs: Float[Tensor, "batch ..."], op: Map
) -> Float[Tensor, " batch"]:
    r"""Squared norm of :math:`b-\alpha Af` with :math:`\alpha=b^Tf/f^TAf`."""
    a_f = op(direction).flatten(1)
    f, b = direction.flatten(1), rhs.flatten(1)
    alpha = (b * f).sum(1) / (f * a_f).sum(1)
    return (b - alpha[:, None] * a_f).square().sum(1)


def direction_loss(net: nn.Module | Map, rhs: Float[Tensor, "batch 1 *grid"], op: Map) -> Tensor:
    """The training loss: mean squared residual after one exact line search, `rhs` of unit norm.

    No solution enters, and the length and sign of ``net(rhs)`` do not matter (Section 4).
    """
    return line_search_residual(net(rhs), rhs, op).mean()


def network_direction(net: nn.Module, mask: Bool[Tensor, "*grid"]) -> Map:
    """The network as the `direction` of `dcdm`: in its own dtype, zero on solid cells."""
    dtype = next(net.parameters()).dtype

    @torch.no_grad()
    def direction(r: Grid) -> Grid:
        return net(r.to(dtype)[None, None])[0, 0].to(r.dtype) * mask

    return direction


def energy_cosine(
    direction: Float[Tensor, "batch ..."],
    rhs: Float[Tensor, "batch ..."],
    op: Map,
    solution: Float[Tensor, "batch ..."],
) -> Float[Tensor, " batch"]:
    r"""Cosine between a direction and the solution :math:`A^{-1}b` in the A inner product.

    One exact line search leaves :math:`\sqrt{1-\cos_A^2}` of the error's A-norm.
    """
    f, b, x = direction.flatten(1), rhs.flatten(1), solution.flatten(1)
    f_a_f = (f * op(direction).flatten(1)).sum(1)
    return (f * b).sum(1) / (f_a_f * (b * x).sum(1)).sqrt()
