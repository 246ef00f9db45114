"""Benchmarks compare three things on the same work in one run: `nnlib`, the peer, and the limit.

A benchmark is a test parametrised by `who` ("nnlib", the peer's name, "limit") whose `benchmark.group` names the work.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Peer:
    """A peer that needs an environment of its own: a process that prepares its work, then runs it on demand."""

    def __init__(self, name: str, *arguments: str) -> None:
        python = ROOT / ".venv-peers" / name / "bin" / "python"
        if not python.exists():
            pytest.skip(f"{name} is not installed; `make bench` makes its environment")
        worker = ROOT / "benchmarks" / "peers" / f"{name}.py"
        threads = {
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        }
        self.process = subprocess.Popen(
            [python, worker, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | threads,
        )  # fmt: skip
        first = self.process.stdout.readline()
        if not first:
            self.close()
            raise RuntimeError(
                f"{name} does not start; run it by hand: {python} {worker} {' '.join(arguments)}"
            )
        self.checksum = json.loads(first)["checksum"]

    def __call__(self) -> None:
        """Run the work once and wait for it."""
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        if self.process.stdout.readline().strip() != "done":
            raise RuntimeError("the peer stopped")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


@pytest.fixture
def peer_process():
    """Start peers by name; they are ended after the test."""
    started = []

    def start(name: str, *arguments: str) -> Peer:
        started.append(Peer(name, *arguments))
        return started[-1]

    yield start
    for peer in started:
        peer.close()
