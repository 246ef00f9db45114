"""Worker: the two kernels with neural_tangents. First line out: a checksum; then one `done` for each `run`."""

import json
import os
import sys

# A script's own folder stands first on the path, and this script has the name of the library that it imports.
sys.path.pop(0)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
from jax._src import source_info_util

# 0.6.5 looks for these two where JAX 0.4.30 no longer has them.
jax.interpreters.ad.source_info_util, jax.interpreters.ad.config = source_info_util, jax.config
import neural_tangents as nt
from neural_tangents import stax


def network(width: int):
    """Four affine maps, ReLU, as in the paper."""
    layers = []
    for _ in range(3):
        layers += [stax.Dense(width, W_std=1.0, b_std=0.1, parameterization="ntk"), stax.Relu()]
    return stax.serial(*layers, stax.Dense(1, W_std=1.0, b_std=0.1, parameterization="ntk"))


def analytic(x):
    """Closed-form kernels of the inputs."""
    kernel = jax.jit(network(1)[2], static_argnames="get")
    return lambda: kernel(x, None, get=("nngp", "ntk")).ntk


def empirical(x, width=1024):
    """Kernel of one finite network in float32."""
    init, apply, _ = network(width)
    x = x.astype(np.float32)
    _, params = init(jax.random.PRNGKey(0), x.shape)
    params = jax.tree_util.tree_map(lambda p: p.astype(np.float32), params)
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            apply, vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES
        )
    )
    return lambda: kernel(x, None, params)


work, path = sys.argv[1:]
run = {"analytic": analytic, "empirical": empirical}[work](np.load(path))
print(json.dumps({"checksum": float(np.asarray(run()).sum())}), flush=True)
for _ in sys.stdin:
    jax.block_until_ready(run())
    print("done", flush=True)
