"""Boosted networks against scikit-learn's network trained by Adam, and against the authors' program.

The classifiers learn the same digits with the same number of units; Adam runs for 60 epochs, which its accuracy needs.
The regressors do the same work: as many blocks, of the same size, with the same number of L-BFGS iterations. The
authors' classifier does not run with recent versions of scikit-learn.

Limit: the four matrix products of each evaluation of a block's loss and gradient, 4 n J (d + K) FLOP forward and back,
one evaluation per L-BFGS iteration.
"""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_friedman1
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import scale
from threadpoolctl import threadpool_limits

from nnlib.architectures.boosted_networks import BoostedNetworkClassifier, BoostedNetworkRegressor

PEER = "sklearn"
OFFICIAL = "gbnn"


def products(n: int, d: int, j: int, k: int, evaluations: int):
    """The matrix products of so many evaluations, and nothing else."""
    rng = np.random.default_rng(0)
    x, w, v = (rng.standard_normal(shape) for shape in ((d, n), (j, d), (k, j)))
    h, error = w @ x, v @ (w @ x)

    def run() -> None:
        for _ in range(evaluations):
            w @ x
            v @ h
            error @ h.T
            v.T @ error
            h @ x.T

    return run


@pytest.mark.parametrize("who", ("nnlib", PEER, "limit"))
def test_classifier(benchmark, who):
    benchmark.group = "classifier, digits, 1347 rows, 192 hidden units"
    x, y = load_digits(return_X_y=True)
    a, b, ya, yb = train_test_split(scale(x), y, random_state=0, stratify=y)
    ours = BoostedNetworkClassifier(192, 4, 0.5, max_iter=60, random_state=0)
    if who == "nnlib":
        call = lambda: ours.fit(a, ya)  # noqa: E731
    elif who == PEER:
        network = pytest.importorskip("sklearn.neural_network").MLPClassifier
        peer = network(
            (192,), activation="logistic", learning_rate_init=3e-3, max_iter=60, random_state=0
        )
        call = lambda: peer.fit(a, ya)  # noqa: E731
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert abs(call().score(b, yb) - ours.fit(a, ya).score(b, yb)) < 0.03
    else:
        call = products(len(a) // 2, 65, 4, 10, 48 * 60)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer warns that its epochs are over
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("who", ("nnlib", OFFICIAL, "limit"))
@pytest.mark.parametrize("block_size", (1, 4))
def test_same_blocks(benchmark, peer_process, tmp_path, who, block_size):
    benchmark.group = f"regressor, 2000 rows, 10 inputs, 48 blocks of {block_size}"
    x, y = make_friedman1(3000, noise=1.0, random_state=0)
    x = scale(x)
    a, b, ya, yb = x[:2000], x[2000:], y[:2000], y[2000:]
    ours = BoostedNetworkRegressor(48 * block_size, block_size, 0.1, max_iter=60, random_state=0)
    if who == "nnlib":
        call = lambda: ours.fit(a, ya)  # noqa: E731
    elif who == OFFICIAL:
        np.savez(tmp_path / "data.npz", a=a, ya=ya, b=b, yb=yb)
        call = peer_process(OFFICIAL, str(tmp_path / "data.npz"), str(block_size))
        with threadpool_limits(1):
            error = np.sqrt(np.mean((ours.fit(a, ya).predict(b) - yb) ** 2))
        assert 0.9 < call.checksum / error < 1.1
    else:
        with threadpool_limits(1):
            call = products(1000, 11, block_size, 1, ours.fit(a, ya).n_iter_)
    with threadpool_limits(1):
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
