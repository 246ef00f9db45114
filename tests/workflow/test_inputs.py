"""Every way to import a module is found, and the key changes with content that matters."""

from __future__ import annotations

import importlib
import sys

import pytest
from conftest import REPOSITORY


@pytest.fixture
def inputs(project, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "workflow"))
    module = importlib.import_module("inputs")
    monkeypatch.setattr(module, "ROOT", project.root)
    for function in (module.cells, module.key, module._imported):
        function.cache_clear()
    yield module
    for function in (module.cells, module.key, module._imported):
        function.cache_clear()
    sys.modules.pop("inputs")


def found(inputs, project, code: str) -> set[str]:
    project.chapter("one", code)
    inputs.cells.cache_clear()
    return {
        path.relative_to(project.root / "nnlib").as_posix() for path in inputs.modules("alpha/one")
    }


@pytest.mark.parametrize(
    "code",
    [
        "import nnlib.alpha.one",
        "import nnlib.alpha.one as first",
        "from nnlib.alpha import one as first",
        "from nnlib.alpha.one import VALUE",
        "%pip list\nif True:\n    !ls\n    from nnlib.alpha.one import *",
        "import nnlib.alpha\n\nprint(nnlib.alpha.one.VALUE)",
        "def late():\n    from nnlib.alpha import one\n    return one",
    ],
)
def test_imports_are_followed_through_packages_and_relative_imports(inputs, project, code):
    expected = {
        "__init__.py",
        "claims.py",
        "alpha/__init__.py",
        "alpha/one.py",
        "alpha/_common.py",
        "shared.py",
    }
    assert found(inputs, project, code) == expected


def test_a_notebook_that_cannot_be_parsed_depends_on_everything(inputs, project):
    assert found(inputs, project, "this is no Python") >= {"shared.py", "alpha/one.py"}


@pytest.mark.parametrize(
    ("path", "old", "new", "changes"),
    [
        ("nnlib/shared.py", "1", "2", True),
        ("nnlib/papers.toml", '"One"', '"Uno"', True),
        ("nnlib/papers.toml", '"Two"', '"Due"', False),
        ("constraints.txt", "numpy==", "numpy==9", True),
        ("book/alpha/one.ipynb", '"# Title"', '"# Name"', True),
        ("book/alpha/one.ipynb", '"execution_count": null', '"execution_count": 7', False),
        ("book/alpha/two.ipynb", '"# Title"', '"# Name"', False),
    ],
)
def test_the_key_changes_with_what_a_chapter_depends_on(inputs, project, path, old, new, changes):
    before = inputs.key("alpha/one")
    text = (project.root / path).read_text(encoding="utf-8")
    assert old in text
    project.write(path, text.replace(old, new))
    for function in (inputs.cells, inputs.key, inputs._imported):
        function.cache_clear()
    assert (inputs.key("alpha/one") != before) == changes


def test_the_fingerprint_ignores_prose_and_shared_modules(inputs, project):
    before = inputs.fingerprint("alpha/one")
    project.write("nnlib/shared.py", "VALUE = 2\n")
    text = (project.root / "book/alpha/one.ipynb").read_text(encoding="utf-8")
    project.write("book/alpha/one.ipynb", text.replace("# Title", "# Name"))
    inputs.cells.cache_clear()
    assert inputs.fingerprint("alpha/one") == before
    project.write("nnlib/alpha/_common.py", "from ..shared import VALUE  # changed\n")
    inputs._imported.cache_clear()
    assert inputs.fingerprint("alpha/one") != before
