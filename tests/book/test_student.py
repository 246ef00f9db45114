"""The student version: no solution is left in it, and every check fails until its exercise is solved."""

import json
import subprocess
import sys
from pathlib import Path

import form
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import v4
from student import student

ROOT = Path(__file__).resolve().parents[2]


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def executed(notebook, folder):
    """The code cells of a notebook that was executed to its end, whatever failed: [(cell, errors)]."""
    notebook = nbformat.reads(json.dumps(notebook), as_version=4)
    client = NotebookClient(
        notebook, allow_errors=True, timeout=600, resources={"metadata": {"path": folder}}
    )
    cells = [cell for cell in client.execute().cells if cell.cell_type == "code"]
    return [(cell, [o.ename for o in cell.outputs if o.output_type == "error"]) for cell in cells]


def errors_of_checks(cells):
    return [errors for cell, errors in cells if tagged(cell, "check")]


@pytest.fixture(scope="module")
def sample():
    """A notebook with one exercise in code and one in words."""

    def code(source, *tags):
        return v4.new_code_cell(source, metadata={"tags": list(tags)})

    def words(source, *tags):
        return v4.new_markdown_cell(source, metadata={"tags": list(tags)} if tags else {})

    cells = [
        words("## Exercises"),
        words("```{exercise-start}\n:label: a-slug-ex-1\n```\nDouble it.\n```{exercise-end}\n```"),
        code("def double(x):\n    raise NotImplementedError", "stub"),
        words("```{solution-start} a-slug-ex-1\n:class: dropdown\n```", "solution"),
        words("SECRET in words that carry no tag"),
        code("def double(x):\n    return 2 * x  # SECRET", "solution"),
        words("```{solution-end}\n```", "solution"),
        code("assert double(3) == 6", "check"),
        words("```{exercise} Why?\n:label: a-slug-ex-2\nSay why.\n```"),
        words("```{solution} a-slug-ex-2\nSECRET\n```", "solution"),
        words("## Further reading"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def test_solutions_are_left_out_and_questions_stay(sample):
    made = student(json.loads(nbformat.writes(sample)))
    texts = [cell["source"] for cell in made["cells"]]
    assert len(texts) == 6
    assert "SECRET" not in json.dumps(made) and "solution" not in json.dumps(made)
    assert "Double it." in "".join(texts[1]) and "## Further reading" in "".join(texts[-1])
    assert [tag for cell in made["cells"] for tag in cell["metadata"].get("tags", [])] == [
        "stub",
        "check",
    ]


def test_the_check_fails_without_the_solution_and_passes_with_it(sample, tmp_path):
    assert errors_of_checks(executed(sample, tmp_path)) == [[]]
    assert errors_of_checks(executed(student(sample), tmp_path)) == [["NotImplementedError"]]


def test_what_was_run_before_leaves_no_trace(sample):
    code = v4.new_code_cell("1", execution_count=3, outputs=[v4.new_output("stream", text="1")])
    (cell,) = student({"cells": [code]})["cells"]
    assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize(
    "path", form.chapters(), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_in_every_chapter_each_check_fails_until_it_is_solved_and_nothing_else_does(path):
    cells = executed(student(json.loads(path.read_text(encoding="utf-8"))), path.parent)
    assert errors_of_checks(cells), (
        "no exercise of this chapter asks for code that a check cell could check"
    )
    for cell, errors in cells:
        assert bool(errors) == tagged(cell, "check"), (
            f"{errors or 'no error'} without the solutions in:\n{cell.source}"
        )


def test_the_command_refuses_a_chapter_that_does_not_exist():
    done = subprocess.run(
        [sys.executable, ROOT / "workflow/student.py", "part/nothing"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "There is no chapter 'part/nothing'" in done.stderr
