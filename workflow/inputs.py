"""What a chapter depends on: its cells, the library it imports directly or not, the pinned versions.

`python workflow/inputs.py [part/slug]` lists the chapters, or the library's files that a chapter imports.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def chapters() -> list[str]:
    """Every chapter that has a notebook, as ``part/slug``."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in (ROOT / "book").glob("*/*.ipynb"))


def chosen(chapter: str = "") -> list[str]:
    """The chapter of that name, or all of them; exits with a sentence if there is none."""
    if chapter and chapter not in chapters():
        near = get_close_matches(chapter, chapters(), n=1, cutoff=0.3)
        sys.exit(
            f"There is no chapter {chapter!r}" + (f"; did you mean {near[0]}?" if near else ".")
        )
    return [chapter] if chapter else chapters()


@cache
def cells(chapter: str) -> list[dict]:
    """The cells of the notebook in `book/`; one that is no valid JSON counts as a single cell of text."""
    text = (ROOT / f"book/{chapter}.ipynb").read_text(encoding="utf-8")
    try:
        return json.loads(text)["cells"]
    except (ValueError, LookupError, TypeError):
        return [{"cell_type": "raw", "source": text}]


def lasting(metadata: dict) -> dict:
    """The metadata of a cell without the times that JupyterLab or papermill wrote into it."""
    return {
        name: value
        for name, value in metadata.items()
        if name not in ("execution", "papermill", "ExecuteTime")
    }


def code(chapter: str) -> list[str]:
    """The text of each code cell."""
    return ["".join(cell["source"]) for cell in cells(chapter) if cell["cell_type"] == "code"]


def modules(chapter: str) -> list[Path]:
    """The files of `nnlib` that the chapter imports, directly or not, in order of their paths."""
    without_magics = re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(code(chapter)), flags=re.M)
    todo, found = set(_imported(without_magics, "")), set()
    while todo:
        if (path := todo.pop()) not in found:
            found.add(path)
            todo |= _imported(
                path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts)
            )
    return sorted(found)


@cache
def _imported(text: str, package: str) -> frozenset[Path]:
    """The files of `nnlib` that this text of Python names; all of them if it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return frozenset((ROOT / "nnlib").rglob("*.py"))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return frozenset(
        path for name in names if name.split(".")[0] == "nnlib" for path in _files(name)
    )


def _files(name: str) -> Iterable[Path]:
    """The modules that importing `name` runs: the packages above it and itself, as far as they exist."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:end])
        yield from (p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file())


def digest(texts: Iterable[str | bytes]) -> str:
    """SHA-256 of a sequence of texts."""
    sums = (hashlib.sha256(t.encode() if isinstance(t, str) else t).hexdigest() for t in texts)
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


@cache
def key(chapter: str) -> str:
    """Changes with whatever an executed chapter depends on, and with nothing else.

    That is the notebook's cells without their outputs, the library's files, the chapter's entry in the
    catalogue (`chapter.start` prints it; the other entries do not matter) and the pinned versions. Checksums
    of data stand in `nnlib/data.py`, which is one of the files of a chapter that loads any.
    """
    text = [
        (
            cell["cell_type"],
            cell.get("id"),
            "".join(cell["source"]),
            lasting(cell.get("metadata", {})),
        )
        for cell in cells(chapter)
    ]
    catalogue = tomllib.loads((ROOT / "nnlib/papers.toml").read_text(encoding="utf-8"))
    entry = [
        p
        for part in catalogue["parts"]
        for p in part["papers"]
        if f"{part['name']}/{p['slug']}" == chapter
    ]
    files = [*modules(chapter), ROOT / "constraints.txt"]
    return digest([json.dumps([text, entry], sort_keys=True), *_named(files)])


def fingerprint(chapter: str) -> str:
    """Changes with the science of a chapter: its code cells and the modules of parts that it imports.

    Kept in the records under `book/results/`, which are too dear to be made again for every change elsewhere.
    """
    parts = [
        path
        for path in modules(chapter)
        if path.parent != ROOT / "nnlib" and path.name != "__init__.py"
    ]
    return digest([*code(chapter), *_named(parts)])


def _named(files: Iterable[Path]) -> list[str | bytes]:
    return [
        text for path in files for text in (path.relative_to(ROOT).as_posix(), path.read_bytes())
    ]


def rendered(*options: str) -> str:
    """Changes with whatever the pages are made from."""
    patterns = [
        "*.yml",
        "pyproject.toml",
        "constraints.txt",
        "book/**/*",
        "nnlib/**/*.*",
        "workflow/*.py",
        "tests/*/test_*.py",
        "benchmarks/*/bench_*.py",
    ]
    patterns += [] if "--committed" in options else ["_build/executed/quick/seed0/*/*.ipynb"]
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    hidden = ("__pycache__", ".ipynb_checkpoints")
    return digest([*options, *_named(path for path in paths if not set(path.parts) & set(hidden))])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rendered"]:
        print(rendered(*sys.argv[2:]))
    else:
        found = chosen(*sys.argv[1:2])
        print(
            "\n".join(
                [str(p.relative_to(ROOT)) for p in modules(found[0])]
                if sys.argv[1:2] > [""]
                else found
            )
        )
