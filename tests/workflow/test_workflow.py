"""The workflow on three tiny chapters: what runs again, what a failure looks like, what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import Project, ran


def leftovers(project: Project) -> list[Path]:
    return [
        path for folder in ("_build", "book") for path in (project.root / folder).rglob("*.part")
    ]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited for two minutes"
        time.sleep(0.1)


def test_only_changed_content_runs_a_chapter_again(project):
    status, text = project.make("outputs")
    assert status == 0, text
    assert ran(text) == ["one", "three", "two"]
    assert "3 of 4 steps" in text
    books = sorted(project.root.glob("book/alpha/*.ipynb"))
    cleaned = [path.read_bytes() for path in books]

    for path in project.root.rglob("*.*"):
        if path.is_file() and "_build" not in path.parts:
            os.utime(path)
    status, text = project.make("outputs")
    assert (status, ran(text)) == (0, [])
    assert [path.read_bytes() for path in books] == cleaned, (
        "writing the outputs twice must change nothing"
    )

    project.write("nnlib/shared.py", "VALUE = 1.0\n")
    project.executed("two").write_text(
        project.executed("two").read_text(encoding="utf-8")[:100], encoding="utf-8"
    )
    status, text = project.make("outputs")
    assert status == 0, text
    assert ran(text) == ["one", "two"], (
        "one imports shared through alpha._common; the result of two is damaged"
    )
    assert not leftovers(project)


def test_outputs_are_clean(project):
    status, text = project.make("outputs", "CHAPTER=alpha/three")
    assert status == 0, text
    assert ran(text) == ["three"]
    text = (project.root / "book/alpha/three.ipynb").read_text(encoding="utf-8")
    assert not [
        word
        for word in ("papermill", "injected", '"seconds"', 'execution"', str(project.root))
        if word in text
    ]
    assert text.endswith("}\n")
    book = json.loads(text)
    assert book["metadata"]["language_info"] == {"name": "python"}
    assert [cell["id"] for cell in book["cells"]] == [f"cell-{n}" for n in range(5)]
    parameters, experiment, report = (cell for cell in book["cells"] if cell["cell_type"] == "code")
    assert [cell["execution_count"] for cell in (parameters, experiment, report)] == [1, 2, 3]
    assert parameters["metadata"] == {"tags": ["parameters"]}
    stream, result = experiment["outputs"]
    assert stream["text"] == ["a\n", "b\n"], "pieces of one stream are joined"
    assert result["execution_count"] == 2
    record = report["outputs"][0]["metadata"]["nnlib"]
    assert record["run"] == {"chapter": "alpha/three", "profile": "quick", "seed": 0}
    assert record["claims"][0]["verdict"] == "reproduced"


def test_failures_are_named_while_the_others_finish(project):
    project.chapter("one", "raise ArithmeticError('one and one is three')")
    project.chapter("two", "import os\n\nos._exit(1)")
    project.write("book/alpha/broken.ipynb", "{ no notebook")
    status, text = project.make("outputs")
    assert status != 0
    assert project.executed("three").exists()
    summary = text[text.index("Failed chapters: 3") :]
    block = summary[summary.index("FAILED  alpha/one (quick, seed 0)") :].splitlines()[:4]
    assert block[1:] == [
        "    cell 4 of 5, section: Experiments, tags: hero",
        "    ArithmeticError: one and one is three",
        "    log: _build/executed/quick/seed0/alpha/one.log",
    ]
    assert "ArithmeticError" in (project.root / block[3].split(": ")[1]).read_text(encoding="utf-8")
    assert "DeadKernelError: the kernel died" in summary
    assert "FAILED  alpha/broken" in summary
    assert "JSON" in summary
    assert "new outputs" not in text
    assert not project.executed("one").exists()
    assert not leftovers(project)


def test_an_interrupted_run_goes_on_where_it_stopped(project):
    waiting = project.root / "waiting"
    code = f"import os, pathlib, time\n\npathlib.Path('{waiting}').write_text(str(os.getpid()))\n"
    project.chapter(
        "two", f"{code}while pathlib.Path('{waiting}').exists():\n    time.sleep(0.1)\nvalue = 1"
    )
    make = project.start("make", "outputs", "CHAPTER=alpha/two")
    wait_for(lambda: waiting.exists() and waiting.read_text())
    kernel = int(waiting.read_text())

    status, text = project.make("outputs", "CHAPTER=alpha/three")
    assert status != 0
    assert "Another make is at work" in text

    os.killpg(make.pid, signal.SIGINT)  # what Ctrl-C does
    make.communicate(timeout=120)
    assert make.returncode != 0
    wait_for(
        lambda: (
            not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE
        )
    )
    assert not project.executed("two").exists()
    assert not leftovers(project)

    waiting.unlink()
    project.chapter("two", "value = 1")
    status, text = project.make("outputs", "CHAPTER=alpha/two")
    assert status == 0, text
    assert ran(text) == ["two"]


def test_records(project):
    status, text = project.make("seeds", "CHAPTER=alpha/one")
    assert status == 0, text
    seeds = json.loads(
        (project.root / "book/results/seeds/alpha/one.json").read_text(encoding="utf-8")
    )
    assert seeds["seeds"] == [0, 1, 2, 3, 4]
    assert seeds["claims"] == {"near-one": [4, 5]}, "with seed 4 the value lies outside the bound"
    assert seeds["seconds"] > 0
    assert seeds["megabytes"] > 10
    assert len(seeds["source"]) == 64
    status, text = project.make("seeds", "CHAPTER=alpha/one")
    assert (status, ran(text)) == (0, [])

    old = project.root / "book/results/full/alpha/one.json"  # committed, as in a fresh clone
    old.parent.mkdir(parents=True)
    old.write_text('{"source": "older code"}', encoding="utf-8")
    status, text = project.make("full", "CHAPTER=alpha/one")
    assert status == 0, text
    full = json.loads(
        (project.root / "book/results/full/alpha/one.json").read_text(encoding="utf-8")
    )
    assert full["scale"] == "net n layers: 2, steps 3"
    assert full["run"]["profile"] == "full"
    assert full["source"] == seeds["source"]
    assert not leftovers(project)


def test_wrong_requests_get_a_sentence(project):
    status, text = project.make("outputs", "CHAPTER=alpha/on")
    assert status != 0
    assert "There is no chapter 'alpha/on'; did you mean alpha/one?" in text
    old = project.write("old", '#!/bin/sh\necho "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    status, text = project.make("book", f"PYTHON={old}")
    assert status != 0
    assert "Python 3.11 or newer is missing" in text
    assert "3.9.1" in text


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--profile", "huge", "unknown profile 'huge'"), ("--seed", "-1", "seed must be")],
)
def test_the_chapter_refuses_a_wrong_profile_or_seed(project, option, value, words):
    source = (Path(__file__).parents[2] / "nnlib/chapter.py").read_text(encoding="utf-8")
    project.write("nnlib/chapter.py", source)
    project.write("nnlib/figures.py", "")
    project.chapter(
        "one", 'from nnlib import chapter\n\nchapter.start("alpha/one", profile=profile, seed=seed)'
    )
    target = project.executed("one")
    project.environment["PYTHONPATH"] = str(project.root)
    status, text = project.run(
        sys.executable, "workflow/execute.py", "alpha/one", str(target), f"{option}={value}"
    )
    assert status == 1
    assert "cell 4 of 5" in text
    assert words in text
    assert not target.exists()
    assert not leftovers(project)
