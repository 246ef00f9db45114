"""A Poisson system to a residual of 1e-4: deep conjugate directions against algebraic multigrid and CG.

Training, factors and multigrid hierarchy are made before the clock starts; the iterations of each are in the report's
`extra_info`. Limit: on an empty box the sine transform solves exactly with O(n log n) FLOP, two transforms and a division.
One network call costs about 9 * 16 * 16 * 2 FLOP a cell for each of 9 convolutions on the grid and a quarter of it for
6 at the coarse level, 48 kFLOP a cell; one CG step about 20. So fewer steps pay only where these FLOP are nearly free.
"""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import cg

from nnlib import training
from nnlib.scientific import conjugate_directions as cd

PEER = "pyamg"
WHO = ("nnlib", PEER, "scipy CG", "nnlib CG", "nnlib incomplete Cholesky", "limit")


@cache
def trained():
    """The chapter's network, trained on the empty box of 32 cells a side."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    op = cd.PoissonOperator(torch.ones(32, 32, dtype=torch.bool))
    data = cd.RitzDataset(cd.lanczos_ritz(op, 300, rng)[1].float(), theta=15)
    net = cd.DirectionNet().to(memory_format=torch.channels_last)
    training.fit(
        net,
        lambda _: cd.direction_loss(net, data.sample(16, rng), op),
        steps=250,
        optimizer=lambda p: torch.optim.Adam(p, lr=4e-3),
        schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 4e-3, total_steps=250),
    )
    return net


@pytest.mark.parametrize("side", (32, 64, 128))
@pytest.mark.parametrize("who", WHO)
def test_solve(benchmark, who, side):
    benchmark.group = f"Poisson, box of {side} x {side}, to 1e-4, float64"
    op = cd.PoissonOperator(torch.ones(side, side, dtype=torch.bool))
    b = torch.randn(side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, rhs = sparse.csr_matrix(op.to_scipy()), b.numpy().ravel()
    counted = []
    if who == PEER:
        hierarchy = pytest.importorskip("pyamg").ruge_stuben_solver(matrix)

        def call():
            counted.clear()
            return hierarchy.solve(rhs, tol=1e-4, accel="cg", residuals=counted)
    elif who == "scipy CG":

        def call():
            counted.clear()
            return cg(matrix, rhs, rtol=1e-4, callback=counted.append)[0]
    elif who == "limit":
        call = lambda: cd.box_solve(b)  # noqa: E731
    else:
        f = cd.network_direction(trained(), op.mask)
        factors = cd.incomplete_cholesky(op)
        call = {
            "nnlib": lambda: cd.dcdm(op, b, f, max_iter=1000),
            "nnlib CG": lambda: cd.conjugate_gradient(op, b),
            "nnlib incomplete Cholesky": lambda: cd.conjugate_gradient(
                op, b, preconditioner=factors
            ),
        }[who]
    solution = benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    if isinstance(solution, cd.SolveResult):
        assert solution.converged
        benchmark.extra_info["iterations"], solution = solution.iterations, solution.x
    elif counted:
        benchmark.extra_info["iterations"] = len(counted) - (who == PEER)
    residual = matrix @ np.asarray(solution).ravel() - rhs
    assert np.linalg.norm(residual) <= 2e-4 * np.linalg.norm(rhs)
