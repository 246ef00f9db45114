"""nbval, with the options of `make test`, sees a changed verdict, exact number or bound, and lets chance values be."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import v4

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--nbval-lax", "--nbval-sanitize-with", str(ROOT / "tests/book/sanitize.cfg")]
RUN = """from nnlib.chapter import Run
import torch
run = Run("part/slug", "quick", 0, torch.device("cpu"))"""
CLAIMS = """_ = run.claim("slope", "It falls.", paper="-1/2", measured=-0.512, bound=(-0.6, -0.4), baseline=0.0)
_ = run.claim("identity", "Both agree.", paper="Theorem 1", measured=3e-17, bound=(0, 1e-10), exact=True)"""
REPORT = "run.report()"
NUMBERS = """print("slope ~ -0.512, at 1e-3: ~ 1.5e-07, nothing: ~ nan, without end: ~-inf.")
print("parameters = 1234, share ~ 12.5 %, of ~ 1,000.")"""
CHANGES = {  # name: (cell, what its stored output says, what it is changed to, whether nbval is to complain)
    "nothing": (NUMBERS, r"slope", "slope", False),
    "chance": (NUMBERS, r"~ -0\.512", "~ 0.4711", False),
    "chance with exponent": (NUMBERS, r"~ 1\.5e-07", "~ 23", False),
    "chance that is nan": (NUMBERS, r"~ nan", "~ -3.1E+12", False),
    "chance that is infinite": (NUMBERS, r"~-inf", "~ 1", False),
    "chance with thousands": (NUMBERS, r"~ 1,000", "~ 2,345,678.9", False),
    "baseline": (REPORT, r"without the effect ~ 0\b", "without the effect ~ 0.01", False),
    "verdict": (REPORT, r"slope: reproduced", "slope: not reproduced", True),
    "verdict in the table": (REPORT, r">reproduced<", ">not reproduced<", True),
    "bound": (REPORT, r"\[-0\.6, -0\.4\]", "[-0.7, -0.4]", True),
    "exact number": (NUMBERS, r"parameters = 1234", "parameters = 1235", True),
    "exact measured value": (REPORT, r"= 0 \(to 1e-10\)", "= 1e-10 (to 1e-10)", True),
    "unit after a chance value": (NUMBERS, r"12\.5 %", "12.5 dB", True),
    "tilde": (NUMBERS, r"~ 12\.5", "12.5", True),
    "one claim less": (REPORT, r"identity: reproduced\n(.*\n?)*", "", True),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For each change, whether nbval complained: one notebook, whose cells have a changed output each."""
    folder = tmp_path_factory.mktemp("nbval")
    checked = [
        v4.new_code_cell(source, metadata={"tags": ["nbval-check-output"]})
        for source, *_ in CHANGES.values()
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [v4.new_code_cell(RUN), v4.new_code_cell(CLAIMS), *checked]
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    for cell, (_, old, new, _) in zip(checked, CHANGES.values(), strict=True):
        change(cell, old, new)
    nbformat.write(notebook, folder / "changed.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        folder,
        *OPTIONS,
    ]
    command += ["-p", "no:cacheprovider", f"--junitxml={folder}/outcomes.xml", folder]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    failed = [
        case.find("failure") is not None
        for case in ET.parse(folder / "outcomes.xml").iter("testcase")
    ]
    assert len(failed) == len(cells) and not any(failed[:2]), done.stdout
    return dict(zip(CHANGES, failed[2:], strict=True))


def change(cell, old, new):
    """Let the stored texts of a cell say `new` for `old`, which has to be there."""
    count = 0
    for output in cell.outputs:
        holder, keys = (output, ["text"]) if "text" in output else (output.data, list(output.data))
        for key in keys:
            holder[key], found = re.subn(old, new, holder[key])
            count += found
    assert count, f"{old} is not in the outputs"


@pytest.mark.parametrize("name", CHANGES)
def test_nbval_complains_of_exactly_what_is_not_chance(name, outcomes):
    assert outcomes[name] == CHANGES[name][3]
