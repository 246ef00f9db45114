"""Every chapter and module has the form that form.py describes, and each of its rules bites on a copy that breaks it."""

import ast
import copy
import json
import subprocess
import sys

import form
import pytest

from nnlib.claims import Claim, Record

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
PYPROJECT = '[project]\n[project.urls]\nRepository = "https://example.org/someone/book"\n'
CATALOGUE = '[[parts]]\nname = "part"\n[[parts.papers]]\nslug = "a_slug"\ntitle = "A title"\nkey = "author2000word"\n'
GLANCE = """:::{admonition} At a glance
- **Paper**: {cite:t}`author2000word`, [arXiv](https://arxiv.org/abs/2001.00001)
- **Question**: Does it fall?
- **Answer**: It does.
- **You will be able to** say so, use it, doubt it.
- **Read before**: {doc}`the first </index>`
- **Cost** <!-- cost -->
:::"""
SETUP = """from nnlib import chapter
run = chapter.start("part/a_slug", profile=profile, seed=seed)
size = run.sizes(quick=dict(n=1), full=dict(n=2))"""
FIGURE = {
    "tags": ["hero"],
    "mystnb": {
        "figure": {"caption": "The slope", "name": "fig-a-slug-slope"},
        "image": {"alt": "A straight line that falls from left to right."},
    },
}


def claim(number, **changes):
    fields = {
        "statement": "It falls.",
        "paper": "Theorem 1",
        "measured": -0.5,
        "bound": (-1.0, -0.1),
        "baseline": 0.0,
    }
    return Claim(f"slope-{number}", **fields | changes)


def text(source, **metadata):
    return {"cell_type": "markdown", "metadata": metadata, "source": source}


def cell(source, *tags, outputs=(), **metadata):
    metadata |= {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": list(outputs)}


def stream(printed, name="stdout"):
    return {"output_type": "stream", "name": name, "text": printed}


def shown(data, **metadata):
    return {"output_type": "display_data", "data": data, "metadata": metadata}


def report(claims=None, **run):
    run = {"chapter": "part/a_slug", "profile": "quick", "seed": 0} | run
    claims = [claim(n) for n in range(4)] if claims is None else claims
    return shown({"text/plain": "slope-0: reproduced"}, nnlib=Record(run, claims).as_json())


def exercise(number):
    return [
        text(
            f"```{{exercise-start}} How steep?\n:label: a-slug-ex-{number}\n```\nWrite it.\n```{{exercise-end}}\n```"
        ),
        cell("def slope():\n    raise NotImplementedError", "stub"),
        text(f"```{{solution-start}} a-slug-ex-{number}\n:class: dropdown\n```", tags=["solution"]),
        cell("def slope():\n    return -0.5", "solution"),
        text("```{solution-end}\n```", tags=["solution"]),
        cell("assert slope() < 0", "check"),
    ]


def good_cells():
    """The cells of a chapter without a fault."""
    install = form.COLAB.format(repository="https://example.org/someone/book")
    figure = [
        stream("slope ~ -0.50\n"),
        shown({"image/png": PNG, "text/plain": "<Figure size 640x480>"}),
    ]
    return [
        text("# A title"),
        text(GLANCE),
        cell(install, "colab", "hide-cell"),
        cell(form.PARAMETERS, "parameters"),
        cell(SETUP, "setup", outputs=[stream("A title: profile quick, seed 0\n")]),
        text("## The question\n\nWhy? See {cite}`author2000word` and [the part](index.md)."),
        text("## The idea"),
        text("## The method in code"),
        cell(
            "chapter.show_source(module.method)",
            "nbval-check-output",
            outputs=[shown({"text/plain": "def method():\n    # within 5 s, since 1.2.3"})],
        ),
        text("## Experiments"),
        cell("draw()", outputs=figure, **copy.deepcopy(FIGURE)),
        text("## Claims"),
        cell("run.report()", "nbval-check-output", outputs=[report()]),
        text("## Limits\n\nOnly small ones."),
        text("## Exercises"),
        *exercise(1),
        *exercise(2),
        text("```{exercise} A text\n:label: a-slug-ex-3\nSay why.\n```"),
        text("```{solution} a-slug-ex-3\n:class: dropdown\nBecause.\n```", tags=["solution"]),
        text("## Further reading"),
    ]


def write(root, cells, **metadata):
    """A checkout of one chapter with these cells."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    count = 0
    for number, item in enumerate(cells):
        item.setdefault("id", f"cell-{number}")
        if item["cell_type"] == "code":
            count += 1
            item.setdefault("execution_count", count)
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}} | metadata
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    files = {
        "pyproject.toml": PYPROJECT,
        "_toc.yml": "- file: part/a_slug\n",
        "nnlib/papers.toml": CATALOGUE,
        "nnlib/part/a_slug.py": "",
        "tests/part/test_a_slug.py": "",
        "benchmarks/part/bench_a_slug.py": "",
        "book/references.bib": "@article{author2000word,\n}",
        "book/index.md": "",
        "book/part/index.md": "",
        "book/part/a_slug.ipynb": json.dumps(notebook),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root / "book/part/a_slug.ipynb"


@pytest.mark.parametrize(
    "path", form.chapters(), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_chapter_has_the_form_of_a_chapter(path):
    found = form.problems(path)
    assert not found, "\n".join(found)


def test_a_chapter_without_a_fault_has_no_problems(tmp_path):
    assert form.problems(write(tmp_path, good_cells())) == []


def find(cells, tag):
    return next(c for c in cells if tag in c["metadata"].get("tags", []))


def replace(cells, tag, old, new):
    found = find(cells, tag)
    assert old in found["source"]
    found["source"] = found["source"].replace(old, new)


def heading(cells, name):
    return next(n for n, c in enumerate(cells) if c["source"].startswith(f"## {name}"))


def prints(printed, **where):
    """A mutation: the setup cell prints this too."""
    return lambda cells: find(cells, "setup")["outputs"].append(stream(printed, **where))


def says(words):
    """A mutation: Limits says this too."""
    return lambda cells: cells[heading(cells, "Limits")].update(source=f"## Limits\n\n{words}")


def claimed(*claims, **run):
    """A mutation: the report holds these claims."""
    return lambda cells: (
        find(cells, "nbval-check-output")
        and cells[heading(cells, "Claims") + 1].update(
            outputs=[report(list(claims) or None, **run)]
        )
    )


def glance(old, new=""):
    """A mutation of At a glance."""

    def mutate(cells):
        assert old in cells[1]["source"]
        cells[1]["source"] = cells[1]["source"].replace(old, new)

    return mutate


def figure(path, value):
    """A mutation of the figure's metadata."""

    def mutate(cells):
        inner = cells[heading(cells, "Experiments") + 1]["metadata"]["mystnb"]
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value

    return mutate


def stored_verdict(cells):
    cells[heading(cells, "Claims") + 1]["outputs"][0]["metadata"]["nnlib"]["claims"][0][
        "verdict"
    ] = "not reproduced"


def swap(cells, one, other):
    cells[one], cells[other] = cells[other], cells[one]


def drop(tag):
    return lambda cells: cells.remove(find(cells, tag))


FOUR = [claim(n) for n in range(4)]
BROKEN = {
    # the file
    "two cells of one id": (lambda c: [x.update(id="same") for x in c[:2]], "id of its own"),
    "cell metadata": (
        lambda c: c[0]["metadata"].update(execution={}),
        r"remove the metadata execution from the cells \(cell 1",
    ),
    "too large": (
        lambda c: c[5].update(source="## The question" + "x" * 800_000),
        "the limit is 800",
    ),
    "not a notebook": (lambda c: c[2].pop("outputs"), "no valid notebook"),
    # the first cells
    "order": (lambda c: swap(c, 1, 2), "the first five cells must be"),
    "title and text": (lambda c: c[0].update(source="# A title\n\nA text."), "the title alone"),
    "other title": (lambda c: c[0].update(source="# Another"), "the catalogue's, `# A title`"),
    "other block": (glance("At a glance", "In short"), "the second cell must be the block"),
    **{
        f"no {label}": (glance(f"**{label}"), f"At a glance lacks its line \\*\\*{label}")
        for label in form.GLANCE
    },
    "no cost": (glance("<!-- cost -->"), "needs the marker <!-- cost -->"),
    "no citation": (glance("{cite:t}`author2000word`", "Author"), "must cite the paper"),
    "own installation": (lambda c: replace(c, "colab", "-q", "-U"), "the third cell, tagged colab"),
    "installation shown": (
        lambda c: c[2]["metadata"].update(tags=["colab"]),
        "the third cell, tagged colab",
    ),
    "other seed": (
        lambda c: replace(c, "parameters", "0", "7"),
        "the fourth cell, tagged parameters",
    ),
    "other chapter": (
        lambda c: replace(c, "setup", "a_slug", "other"),
        "the fifth cell, tagged setup",
    ),
    "profile fixed": (
        lambda c: replace(c, "setup", "=profile", '="quick"'),
        "the fifth cell, tagged setup",
    ),
    "no sizes": (
        lambda c: replace(c, "setup", "run.sizes", "dict"),
        "must state both profiles' sizes",
    ),
    # sections and tags
    "section missing": (lambda c: c.pop(heading(c, "Limits")), "the `##` headings must be"),
    "sections swapped": (
        lambda c: swap(c, heading(c, "Limits"), heading(c, "Claims")),
        "the `##` headings must be",
    ),
    "section renamed": (lambda c: c[6].update(source="## Idea"), "the `##` headings must be"),
    "second title": (says("text\n\n# More"), "only the title"),
    "heading inside": (
        lambda c: c[6].update(source="A text.\n\n## The idea"),
        "begin a cell with a `##` heading",
    ),
    "unknown tag": (lambda c: c[6]["metadata"].update(tags=["heros"]), "cell 7: unknown tag heros"),
    "nbval skipped": (
        lambda c: find(c, "setup")["metadata"]["tags"].append("nbval-skip"),
        "unknown tag nbval-skip",
    ),
    "setup elsewhere": (
        lambda c: find(c, "stub")["metadata"]["tags"].append("setup"),
        "the fifth cell, and no other but the sixth",
    ),
    "installation commented out": (
        lambda c: replace(c, "colab", "%pip", "# %pip"),
        "the third cell, tagged colab",
    ),
    "no hero": (
        lambda c: find(c, "hero")["metadata"].pop("tags"),
        "exactly one cell must carry the tag hero, 0 do",
    ),
    "two heroes": (
        lambda c: find(c, "stub")["metadata"]["tags"].append("hero"),
        "the tag hero, 2 do",
    ),
    "hero without figure": (
        lambda c: (
            find(c, "hero")["metadata"].pop("tags"),
            find(c, "stub")["metadata"]["tags"].append("hero"),
        ),
        "carries the tag hero but its output has no figure",
    ),
    # code
    "long cell": (lambda c: find(c, "stub").update(source="x = 1\n" * 26), "has 26 lines of code"),
    "long function": (
        lambda c: (
            find(c, "solution") and find(c, "stub").update(source="def f():\n" + "    x = 1\n" * 10)
        ),
        "f has 11 lines, the limit is 10: move it to nnlib/part/a_slug.py",
    ),
    "no Python": (lambda c: find(c, "stub").update(source="def :"), "is not valid Python"),
    "source unchecked": (
        lambda c: c[heading(c, "The method in code") + 1]["metadata"].pop("tags"),
        "shows the library's source: tag it nbval-check-output",
    ),
    # figures
    "no caption": (figure(["figure", "caption"], " "), "needs a caption"),
    "no label": (figure(["figure", "name"], ""), "begins fig-a-slug-"),
    "label of another": (figure(["figure", "name"], "fig-other-slope"), "begins fig-a-slug-"),
    "no alt text": (figure(["image"], {}), "describe the figure"),
    "short alt text": (figure(["image", "alt"], "A falling line."), "describe the figure"),
    "label twice": (lambda c: c.insert(11, copy.deepcopy(c[10])), "needs a label of its own"),
    "two figures": (lambda c: c[10]["outputs"].append(c[10]["outputs"][1]), "draws 2 figures"),
    # outputs
    "out of order": (
        lambda c: c[3].update(execution_count=9),
        "not run once each, from first to last",
    ),
    "not run": (
        lambda c: c[3].update(execution_count=None),
        "not run once each, from first to last",
    ),
    "an error": (
        lambda c: c[3]["outputs"].append(
            {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
        ),
        "cell 4 stores an error",
    ),
    "stderr": (prints("hm", name="stderr"), "cell 5 stores text on stderr"),
    "warning": (prints("x.py:3: UserWarning: hm"), "prints a warning"),
    "path": (prints("saved to /home/me/x.pt"), "prints a path of this machine"),
    "path in a value": (
        lambda c: c[3]["outputs"].append(shown({"text/html": "<b>/tmp/x</b>"})),
        "prints a path of this machine",
    ),
    "address": (prints("<object at 0x7f3a5c1d2e80>"), "prints a memory address"),
    "progress": (prints(" 45%|####     | 9/20"), "prints a progress bar"),
    "timing": (prints("took 12.3 s"), r"prints a running time \('3 s'\)"),
    "timing in words": (prints("took 12 seconds"), "prints a running time"),
    "version": (prints("torch 2.13.0+cpu"), "prints a version number"),
    "stray object": (prints("Text(0.5, 0, 'x')"), "prints an object of Matplotlib"),
    # claims
    "no report": (lambda c: c[heading(c, "Claims") + 1].update(outputs=[]), "cannot be read"),
    "three claims": (claimed(*FOUR[:3]), "at least four claims, this one 3"),
    "other run": (claimed(seed=1), "the stored run must be"),
    "run with times": (claimed(seconds=3.2), "the stored run must be"),
    "stored verdict": (stored_verdict, "stored as not reproduced but its numbers say reproduced"),
    "baseline passes": (
        claimed(*FOUR[:3], claim(3, baseline=-0.2)),
        "its baseline passes the bound too",
    ),
    "round-off shown": (
        claimed(*FOUR[:3], claim(3, measured=2e-16, bound=(None, 1e-10), baseline=1.0, exact=True)),
        "give its bound both sides",
    ),
    "silent failure": (
        claimed(*FOUR[:3], claim(3, measured=0.5)),
        "'slope-3' is not reproduced: say why in Limits",
    ),
    "name of a claim": (claimed(*FOUR, Claim("C 5", "", "", 1.0, (0.0, 2.0), 3.0)), "kebab case"),
    "report unchecked": (
        lambda c: c[heading(c, "Claims") + 1]["metadata"].pop("tags"),
        "the last code cell of Claims must be `run.report\\(\\)` alone",
    ),
    "report not last": (
        lambda c: c.insert(heading(c, "Limits"), cell("1;")),
        "the last code cell of Claims must be `run.report\\(\\)` alone",
    ),
    # exercises
    "two exercises": (
        lambda c: [c.pop(-2) for _ in range(2)],
        "three or four exercises, this one 2",
    ),
    "label of an exercise": (
        lambda c: c[-3].update(source=c[-3]["source"].replace("a-slug-", "")),
        "begin its label",
    ),
    "no solution": (lambda c: c.pop(-2), "each exercise needs one solution"),
    "solution of another": (
        lambda c: c[-2].update(source=c[-2]["source"].replace("ex-3", "ex-4")),
        "each exercise needs one solution",
    ),
    "solution untagged": (
        lambda c: find(c, "solution")["metadata"].pop("tags"),
        "a solution's cells, and no others",
    ),
    "code of a solution untagged": (
        lambda c: next(
            x for x in c if x["cell_type"] == "code" and "solution" in x["metadata"].get("tags", [])
        )["metadata"].pop("tags"),
        "a solution's cells, and no others",
    ),
    "tagged elsewhere": (
        lambda c: c[5]["metadata"].update(tags=["solution"]),
        "cell 6: a solution's cells",
    ),
    "solution in the exercise's cell": (
        lambda c: c[-3].update(source=c[-3]["source"] + "\n" + c[-2]["source"]),
        "give the solution a cell of its own",
    ),
    "stub without check": (drop("check"), "needs a stub, then its solution, then a check"),
    "check without stub": (drop("stub"), "needs a stub, then its solution, then a check"),
    "check before the solution": (
        lambda c: c.insert(c.index(find(c, "stub")), c.pop(c.index(find(c, "check")))),
        "needs a stub, then its solution, then a check",
    ),
    # links
    "page": (says("See {doc}`it <nowhere>`."), "cell 14: there is no page 'nowhere'"),
    "page of the library": (
        says("See {doc}`/api/part/b_slug`."),
        "there is no page '/api/part/b_slug'",
    ),
    "link": (says("See [it](other.md#there)."), "the link to 'other.md#there' leads nowhere"),
    "key": (
        says("See {cite:p}`author2000word, nobody1999`."),
        "book/references.bib has no entry nobody1999",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_chapter_with_a_fault_is_told_so(fault, tmp_path):
    mutate, message = BROKEN[fault]
    cells = good_cells()
    mutate(cells)
    with pytest.raises(AssertionError, match=message):
        found = form.problems(write(tmp_path, cells))
        assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"kernelspec": {"name": "mine", "display_name": "mine"}}, "the kernelspec must be"),
        ({"language_info": {"name": "python", "version": "3.11.7"}}, "language_info must be"),
        ({"papermill": {}}, r"remove the notebook metadata \['papermill'\]"),
    ],
)
def test_metadata_of_one_machine_is_refused(metadata, message, tmp_path):
    (found,) = form.problems(write(tmp_path, good_cells(), **metadata))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


@pytest.mark.parametrize(
    "file, message",
    [
        ("nnlib/part/a_slug.py", "nnlib/part/a_slug.py is missing"),
        ("tests/part/test_a_slug.py", "tests/part/test_a_slug.py is missing"),
        ("benchmarks/part/bench_a_slug.py", "benchmarks/part/bench_a_slug.py is missing"),
        ("_toc.yml", "_toc.yml does not list part/a_slug"),
        ("nnlib/papers.toml", "nnlib/papers.toml has no entry for part/a_slug"),
        ("book/references.bib", "book/references.bib has no entry author2000word"),
    ],
)
def test_a_file_that_the_chapter_lacks_is_named(file, message, tmp_path):
    path = write(tmp_path, good_cells())
    if file.endswith(".py"):
        (tmp_path / file).unlink()
    else:
        content = "parts = []" if file.endswith(".toml") else ""
        (tmp_path / file).write_text(content, encoding="utf-8")
    assert any(message in problem for problem in form.problems(path))


@pytest.mark.parametrize(
    "words",
    [
        "See {doc}`/infinite`, no: {doc}`/index`, {doc}`it </part/index>`, {doc}`index`, {doc}`../scoreboard`.",
        "See {doc}`/api/part/a_slug` and [it](index.md#there), [up](../index.md), [out](https://example.org).",
        "The ratio is 3 samples to 1, at 0.5/2.13, arXiv:2001.00001.",
    ],
)
def test_what_is_in_order_is_not_complained_about(words, tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/infinite.md").write_text("")
    cells = good_cells()
    says(words)(cells)
    prints(words.replace("3 samples", "3 samples of 12 steps"))(cells)
    assert form.problems(write(tmp_path, cells)) == []


def test_the_command_names_file_and_problem_and_fails(tmp_path):
    cells = good_cells()
    cells[0]["source"] = "# Another"
    path = write(tmp_path, cells)
    done = subprocess.run([sys.executable, form.__file__, path], capture_output=True, text=True)
    assert done.returncode == 1 and "a_slug.ipynb: the title must be the catalogue's" in done.stderr


def test_the_library_has_the_form_of_the_library():
    assert form.library_problems() == []


LIBRARY = {
    "numpy": (
        "import numpy as np\nx = np.random.rand(3)",
        "np.random.rand draws from a generator nobody seeded",
    ),
    "numpy unseeded": ("import numpy as np\nx = np.random.default_rng()", "nobody seeded"),
    "numpy by name": (
        "from numpy.random import normal\nx = normal()",
        "normal draws from a generator nobody seeded",
    ),
    "python": (
        "import random\nx = random.choice([1])",
        "random.choice draws from Python's global generator",
    ),
    "torch": ("import torch\nx = torch.randn(3)", r"torch.randn draws without generator=\.\.\."),
    "torch by name": (
        "from torch import rand\nx = rand(3)",
        r"rand draws without generator=\.\.\.",
    ),
    "torch in place": (
        "import torch\nx = torch.empty(3).normal_()",
        r"normal_ draws without generator",
    ),
    "torch init": (
        "from torch import nn\nnn.init.xavier_normal_(w)",
        r"nn.init.xavier_normal_ draws without",
    ),
    "like": ("import torch\nx = torch.rand_like(y)", "torch.rand_like draws without"),
    "display": ("from IPython.display import display", "imports IPython"),
    "papermill": ("def f():\n    '''D.'''\n    import papermill", "imports papermill"),
    "function": ("def public():\n    pass", "public is public and needs a docstring"),
    "method": (
        "class A:\n    '''D.'''\n    def run(self):\n        pass",
        "A.run is public and needs a docstring",
    ),
}


@pytest.mark.parametrize("fault", LIBRARY)
def test_a_module_with_a_fault_is_told_so(fault, tmp_path):
    code, message = LIBRARY[fault]
    (tmp_path / "nnlib/part").mkdir(parents=True)
    (tmp_path / "nnlib/part/a_slug.py").write_text(f'"""Module."""\n{code}\n', encoding="utf-8")
    (found,) = form.library_problems(tmp_path)
    with pytest.raises(AssertionError, match=rf"nnlib/part/a_slug\.py:\d+: .*{message}"):
        raise AssertionError(found)


@pytest.mark.parametrize(
    "code",
    [
        "from nnlib.part import a_slug",
        "import nnlib.part.a_slug",
        "from . import part",
        "from .part import a_slug",
    ],
)
def test_a_shared_module_that_imports_a_part_is_told_so(code, tmp_path):
    (tmp_path / "nnlib/part").mkdir(parents=True)
    (tmp_path / "nnlib/shared.py").write_text(f'"""Module."""\n{code}\n', encoding="utf-8")
    (found,) = form.library_problems(tmp_path)
    assert "nnlib/shared.py:2: a shared module imports the part part" in found


def test_a_module_in_order_is_not_complained_about(tmp_path):
    (tmp_path / "nnlib/part").mkdir(parents=True)
    code = '''"""Module."""
import numpy as np
import torch
from nnlib.other import thing
from torch import Tensor, nn


class Net(nn.Module):
    """Documented."""

    def forward(self, x):
        return x + torch.randn(3, generator=self.generator)


def draw(generator: np.random.Generator) -> Tensor:
    """Documented."""
    return torch.empty(3).normal_(generator=generator) + generator.normal() + np.random.default_rng(3).random()
'''
    ast.parse(code)
    (tmp_path / "nnlib/part/a_slug.py").write_text(code, encoding="utf-8")
    assert form.library_problems(tmp_path) == []


def test_importing_the_library_is_quick_and_imports_no_torch():
    program = (
        "import sys, time; start = time.process_time(); import nnlib; print(time.process_time() - start);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        for _ in range(5)
    ]
    assert [run.stderr for run in runs] == [""] * 5
    assert min(float(run.stdout) for run in runs) < 0.050  # seconds of processor time
