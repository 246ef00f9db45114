"""Write the outputs of executed chapters back into `book/`, without anything that differs from run to run."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from inputs import ROOT, chosen
from nbformat import NotebookNode

KEPT_OF_CELL = ("tags", "mystnb")
KEPT_OF_RUN = ("chapter", "profile", "seed")


def clean(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The notebook `source` with the outputs of `executed`, matched by the cells' ids."""
    ran = {cell.id: cell for cell in executed.cells}
    count = 0
    for cell in source.cells:
        kept = {name: cell.metadata[name] for name in KEPT_OF_CELL if name in cell.metadata}
        cell.metadata = NotebookNode(kept)
        if cell.cell_type != "code":
            continue
        if cell.id not in ran or ran[cell.id].source != cell.source:
            raise ValueError(f"cell {cell.id} changed after it was executed; run the chapter again")
        count += 1
        cell.execution_count = count
        cell.outputs = _joined(ran[cell.id].outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if run := output.get("metadata", {}).get("nnlib", {}).get("run"):
                output.metadata.nnlib.run = {name: run[name] for name in KEPT_OF_RUN}
    ours = {"nnlib": source.metadata.nnlib} if "nnlib" in source.metadata else {}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"}, **ours)
    return source


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs with neighbouring pieces of one stream in one; how they arrive is a matter of chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and output.name == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main(chapter: str = "") -> None:
    """Rewrite the notebook of one chapter, or of all; files that are as they should be are not touched."""
    for name in chosen(chapter):
        path = ROOT / f"book/{name}.ipynb"
        executed = nbformat.read(ROOT / f"_build/executed/quick/seed0/{name}.ipynb", as_version=4)
        text = nbformat.writes(clean(nbformat.read(path, as_version=4), executed)) + "\n"
        if text != path.read_text(encoding="utf-8"):
            unfinished = path.with_suffix(".part")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
            print(f"new outputs: {Path('book') / name}.ipynb")


if __name__ == "__main__":
    main(*sys.argv[1:])
