"""The relative projection against scikit-learn's cosine similarity.

Limit: one matrix product, 2 n k d FLOP (50 GFLOP for 100 000 samples of width 500 and 500 anchors). The norms read
the samples once more, 4 n d bytes, which is little beside it.
"""

import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from nnlib.representations import relative_representations as rr

PEER = "sklearn"
WHO = ("nnlib", PEER, "limit")


@pytest.mark.parametrize("who", WHO)
def test_projection(benchmark, who):
    benchmark.group = "relative projection, 100000 samples, width 500, 500 anchors, float32"
    generator = torch.Generator().manual_seed(0)
    x, anchors = (torch.randn(n, 500, generator=generator) for n in (100_000, 500))
    if who == "nnlib":
        call = lambda: rr.relative_projection(x, anchors)  # noqa: E731
    elif who == PEER:
        cosine_similarity = pytest.importorskip("sklearn.metrics.pairwise").cosine_similarity
        samples, marks = x.numpy(), anchors.numpy()
        call = lambda: cosine_similarity(samples, marks)  # noqa: E731
        few = torch.from_numpy(cosine_similarity(samples[:1000], marks))
        torch.testing.assert_close(
            rr.relative_projection(x[:1000], anchors), few, atol=1e-5, rtol=0
        )
    else:
        call = lambda: x @ anchors.T  # noqa: E731
    with threadpool_limits(1):
        benchmark.pedantic(call, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("who", ("nnlib", "limit"))
def test_training_step(benchmark, who):
    """A forward and backward pass with the anchors encoded anew; the limit is the encoder on samples alone."""
    benchmark.group = "training step, batch 128, 500 anchors, encoder of 28 x 28 images"
    torch.manual_seed(0)
    images, anchors = torch.rand(128, 1, 28, 28), torch.rand(500, 1, 28, 28)
    encoder = rr.conv_encoder((1, 16, 32, 64), last_activation=False)
    model: nn.Module = rr.RelativeProjection(encoder, anchors) if who == "nnlib" else encoder
    benchmark.pedantic(lambda: model(images).sum().backward(), rounds=10, warmup_rounds=2)
