"""Chapters through a real SLURM of one node on this machine's loopback; `make cluster-test` runs it, as root.

Missing daemons are installed from Debian's packages. Where that is impossible the test is skipped with the reason,
or fails if CI is set.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/workflow"))
from conftest import CATALOGUE, REPOSITORY, Project

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
REAL = "infinite_width/neural_tangent_kernel"
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.3)


def missing() -> str:
    """Why SLURM cannot be run here, or nothing; installs it if that is all that is needed."""
    if os.geteuid() != 0:
        return "a SLURM of its own needs root"
    if not all(map(shutil.which, DAEMONS)) and shutil.which("apt-get"):
        quiet = {
            "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            "stdout": subprocess.DEVNULL,
        }
        for words in (
            ["update", "-q"],
            ["install", "-qy", "--no-install-recommends", "slurm-wlm", "munge"],
        ):
            subprocess.run(["apt-get", *words], **quiet, check=False)
    return ", ".join(f"{name} is not installed" for name in DAEMONS if not shutil.which(name))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A running cluster of one node; yields the environment that reaches it, and always ends its daemons."""
    if reason := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], two.getsockname()[1]]
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(host=socket.gethostname().split(".")[0], ports=ports, folder=folder)
    )
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    names = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "seed-file": "munge.seed",
    }
    munge = [
        f"--{option}={folder}/{name}"
        for option, name in (names | {"log-file": "munge.log"}).items()
    ]
    (folder / "bin").mkdir()
    for name in (
        "sbatch",
        "scancel",
        "sinfo",
        "squeue",
        "srun",
    ):  # inside a job the variable is not passed on
        wrapper = folder / "bin" / name
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which(name)} "$@"\n')
        wrapper.chmod(0o755)
    environment = os.environ | {
        "SLURM_CONF": str(conf),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    daemons = []

    def start(*command: str) -> None:
        with (folder / f"{Path(command[0]).name}.out").open("w") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def idle() -> bool:
        shown = subprocess.run(
            ["sinfo", "-h", "-o", "%t"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return shown.stdout.strip() == "idle"

    try:
        start("munged", "--foreground", "--force", *munge)
        wait_for((folder / "munge.socket").exists, "munged")
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", socket.gethostname().split(".")[0])
        wait_for(idle, "the node")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, timeout=30)
        for process in reversed(daemons):
            process.terminate()
        for process in reversed(daemons):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_chapters_run_on_slurm_and_survive_a_killed_job(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    project = Project(tmp_path / "book")
    project.environment["SLURM_CONF"] = cluster["SLURM_CONF"]
    project.environment["PATH"] = f"{tmp_path}/slurm/bin:{project.environment['PATH']}"
    profile = project.root / "workflow/profiles/slurm/config.yaml"
    without_accounting = (
        "slurm-status-command: squeue\nslurm-init-seconds-before-status-checks: 3\n"
    )
    profile.write_text(profile.read_text() + without_accounting)
    if (REPOSITORY / f"book/{REAL}.ipynb").exists():
        shutil.copytree(REPOSITORY / "nnlib", project.root / "nnlib", dirs_exist_ok=True)
        project.write(
            "nnlib/papers.toml", (REPOSITORY / "nnlib/papers.toml").read_text() + CATALOGUE
        )
        project.write(f"book/{REAL}.ipynb", (REPOSITORY / f"book/{REAL}.ipynb").read_text())
    starts, waiting = project.root / "starts", project.write("waiting", "")
    code = f"import os, time\n\nwith open('{starts}', 'a') as file:\n    file.write(os.environ['SLURM_JOB_ID'] + '\\n')\n"
    project.chapter(
        "two", f"{code}while os.path.exists('{waiting}'):\n    time.sleep(0.1)\nvalue = 1"
    )

    make = project.start("make", "outputs", "ON=slurm")
    try:
        wait_for(
            lambda: (starts.exists() and starts.read_text()) or make.poll() is not None, "the job"
        )
        assert make.poll() is None, make.communicate()[0]
        subprocess.run(["scancel", starts.read_text().strip()], env=cluster, check=True)
        wait_for(
            lambda: len(starts.read_text().split()) == 2 or make.poll() is not None,
            "the second attempt",
        )
        waiting.unlink()
        text, _ = make.communicate(timeout=180)
    finally:
        if make.poll() is None:
            os.killpg(make.pid, signal.SIGKILL)
    print(text)
    assert make.returncode == 0, text
    assert len(set(starts.read_text().split())) == 2, (
        "the killed job was run again, as a job of its own"
    )
    chapters = [f"{path.parent.name}/{path.stem}" for path in project.root.glob("book/*/*.ipynb")]
    assert len(chapters) >= 3
    for chapter in chapters:
        assert (project.root / f"_build/executed/quick/seed0/{chapter}.ipynb").exists()
        assert (project.root / f"_build/executed/quick/seed0/{chapter}.tsv").exists()
