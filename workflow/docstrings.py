"""A Sphinx extension: the sections of the library's docstrings, whose entries read `name : text`, as lists."""

import re
from typing import Any

SECTION = re.compile(r"^(Parameters|Returns|Yields|Raises|Attributes)\n-{3,}\n((?:.+\n?)+)", re.M)

STAR = re.compile(
    r"(`[^`]*`)|(?<=[(\[])\*(?=\w+[,)\]])"
)  # the shape (*copies, n) begins no emphasis


def as_list(section: re.Match[str]) -> str:
    """A section as a field list with one item for each entry; an entry goes on in indented lines."""
    items = []
    for entry in re.split(r"\n(?=\S)", section[2].strip()):
        name, colon, text = entry.partition(" : ")
        text = " ".join((text if colon else entry).split())
        items.append(f"    * **{name.replace('*', '')}** – {text}" if colon else f"    * {text}")
    return f":{section[1]}:\n" + "\n".join(items) + "\n"


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place."""
    text = STAR.sub(lambda star: star[1] or r"\*", "\n".join(lines) + "\n")
    lines[:] = SECTION.sub(as_list, text).splitlines()


def skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the methods for metadata routing that scikit-learn adds to every estimator."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def setup(app: Any) -> dict[str, bool]:
    """Connect to autodoc, before napoleon."""
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
