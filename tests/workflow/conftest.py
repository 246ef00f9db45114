"""A project of three tiny chapters with the real Makefile and workflow, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CATALOGUE = """
[[parts]]
name = "alpha"
title = "Alpha"
  [[parts.papers]]
  slug = "one"
  title = "One"
  [[parts.papers]]
  slug = "two"
  title = "Two"
  [[parts.papers]]
  slug = "three"
  title = "Three"
"""
REPORT = """from IPython.display import display
from nnlib import claims

claim = claims.Claim("near-one", "It is one.", "Section 1", float(value + seed // 4), (0.5, 1.5), 0.0)
where = {"chapter": "alpha/CHAPTER", "profile": profile, "seed": seed, "device": "CPU", "seconds": 1.25, "size": {"steps": "3", "a_bound": "0.5", "net": "{'n_layers': 2}"}}
display({"text/plain": claims.as_text([claim])}, raw=True, metadata={"nnlib": claims.Record(where, [claim]).as_json()})"""


def notebook(chapter: str, code: str) -> dict:
    """A notebook whose value is computed by `code`."""
    cells = [
        ("markdown", "# Title", []),
        ("code", 'profile = "quick"\nseed = 0', ["parameters"]),
        ("markdown", "## Experiments", []),
        ("code", code, ["hero"]),
        ("code", REPORT.replace("CHAPTER", chapter), []),
    ]
    return {
        "cells": [
            {
                "cell_type": kind,
                "id": f"cell-{n}",
                "metadata": {"tags": tags} if tags else {},
                "source": text,
            }
            | ({"outputs": [], "execution_count": None} if kind == "code" else {})
            for n, (kind, text, tags) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


class Project:
    """The temporary project, and how to run make in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "workflow"):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, root / name)
        for name in ("__init__.py", "claims.py"):
            self.write(f"nnlib/{name}", (REPOSITORY / "nnlib" / name).read_text(encoding="utf-8"))
        self.write("nnlib/papers.toml", CATALOGUE)
        self.write("nnlib/shared.py", "VALUE = 1\n")
        self.write("nnlib/alpha/__init__.py", "")
        self.write("nnlib/alpha/_common.py", "from ..shared import VALUE\n")
        self.write("nnlib/alpha/one.py", "from nnlib.alpha._common import VALUE\n")
        self.chapter("one", "from nnlib.alpha import one\n\nvalue = one.VALUE\nprint(value)")
        self.chapter("two", "%time value = 1")
        self.chapter(
            "three",
            "import sys\n\nvalue = 1\nprint('a', flush=True)\nprint('b', flush=True)\nvalue",
        )
        self.environment = {
            name: text
            for name, text in os.environ.items()
            if name not in ("NNLIB_LOCKED", "MAKEFLAGS")
        }
        self.environment |= {
            "VENV": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def write(self, path: str, text: str) -> Path:
        """Write a file, and the folders above it."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def chapter(self, slug: str, code: str) -> Path:
        """Write the notebook of a chapter."""
        return self.write(
            f"book/alpha/{slug}.ipynb", json.dumps(notebook(slug, code), indent=1) + "\n"
        )

    def executed(self, slug: str, seed: int = 0) -> Path:
        """Where the executed notebook of a chapter is."""
        return self.root / f"_build/executed/quick/seed{seed}/alpha/{slug}.ipynb"

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command in the project, in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """Exit status and output of a command."""
        process = self.start(*command)
        try:
            text, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, text

    def make(self, *words: str) -> tuple[int, str]:
        """Exit status and output of make."""
        return self.run("make", "--no-print-directory", *words)


def ran(text: str) -> list[str]:
    """The chapters that a command started, sorted."""
    return sorted(re.findall(r"^start +alpha/(\w+)", text, re.M))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The temporary project, nothing executed yet."""
    return Project(tmp_path)
