"""Make student versions: chapters without their solutions, in `_build/student`; `student.py [part/slug]` for one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from inputs import ROOT, chosen


def student(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook without solutions and outputs; stubs and checks stay, so a student sees what is asked."""
    kept, inside = [], False
    for cell in notebook["cells"]:
        text, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        directive = cell["cell_type"] == "markdown" and re.search(
            r"^[`:]{3,}\{solution(-start)?\}", text, re.M
        )
        inside = inside or bool(directive and directive[1])
        asked = "stub" in tags or "check" in tags
        if asked or not (inside or directive or "solution" in tags):
            kept.append(
                cell
                | ({"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {})
            )
        inside = inside and "{solution-end}" not in text
    return notebook | {"cells": kept}


def main(chapter: str = "") -> None:
    """Write the student version of one chapter, or of all."""
    for name in chosen(chapter):
        notebook = json.loads((ROOT / f"book/{name}.ipynb").read_text(encoding="utf-8"))
        target = Path(f"_build/student/{name}.ipynb")
        (ROOT / target).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(student(notebook), indent=1, ensure_ascii=False) + "\n"
        (ROOT / target).write_text(text, encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
