"""A chapter in an environment like Colab's: papermill is there, `nnlib` is not, and the notebook installs it itself."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from nnlib import claims

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "book/infinite_width/neural_tangent_kernel.ipynb"


def call(*command, **options):
    """Run a command; if it fails, so does the test, with everything that the command said."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The library's wheel, made from a copy of its sources so that nothing old is left over in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nnlib", copy / "nnlib", ignore=shutil.ignore_patterns("__pycache__"))
    call(sys.executable, "-m", "build", "--wheel", "--outdir", copy / "dist", copy)
    (made,) = (copy / "dist").glob("*.whl")
    return made


def test_the_wheel_holds_the_catalogue_and_every_module_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nnlib").rglob("*.py")}
    assert packed == sources | {"nnlib/papers.toml"}


@pytest.mark.skipif(not CHAPTER.exists(), reason="the chapter is not written yet")
def test_a_chapter_installs_the_library_where_it_is_missing_and_runs(wheel, tmp_path):
    venv.create(tmp_path / "colab", with_pip=True)
    python = tmp_path / "colab/bin/python"
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "JUPYTER", "IPYTHON"))
    }
    env |= {
        "NNLIB_SOURCE": str(wheel),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "OMP_NUM_THREADS": "1",
    }
    call(python, "-m", "pip", "install", "-q", "ipykernel", "papermill", env=env)
    missing = "import importlib.util; assert importlib.util.find_spec('nnlib') is None"
    call(python, "-c", missing, env=env, cwd=tmp_path)
    executed = tmp_path / "executed.ipynb"
    call(python, "-m", "papermill", "-k", "python3", CHAPTER, executed, env=env, cwd=tmp_path)
    where = call(python, "-c", "import nnlib; print(nnlib.__file__)", env=env, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "colab")
    found, stored = claims.read(executed), claims.read(CHAPTER)
    assert [claim.id for claim in found.claims] == [claim.id for claim in stored.claims]
    assert [claim.verdict for claim in found.claims] == [claim.verdict for claim in stored.claims]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert found.run["versions"]["torch"].split("+")[0] == pinned["torch"]
