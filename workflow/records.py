"""Make a chapter's committed record from its executed notebooks: `records.py seeds|full CHAPTER RECORD NOTEBOOK...`."""

from __future__ import annotations

import csv
import datetime
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from inputs import fingerprint

from nnlib import claims


def cost(notebook: Path) -> dict[str, float]:
    """Seconds and peak megabytes of an executed notebook, from Snakemake's benchmark beside it.

    Snakemake looks at the memory now and then; the executed notebook also holds the kernel's own peak.
    """
    with notebook.with_suffix(".tsv").open(encoding="utf-8") as file:
        row = next(csv.DictReader(file, delimiter="\t"))
    executed = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["nnlib"]["executed"]
    seen = 0.0 if row["max_rss"] in ("NA", "-") else float(row["max_rss"])
    return {
        "seconds": round(float(row["s"]), 1),
        "megabytes": round(max(seen, executed["megabytes"])),
    }


def of_seeds(notebooks: list[Path]) -> dict[str, Any]:
    """How many of the runs with different seeds reproduced each claim, and what one run costs."""
    records, costs = [claims.read(path) for path in notebooks], [cost(path) for path in notebooks]
    return {
        "seeds": [record.run["seed"] for record in records],
        "claims": {id: list(counts) for id, counts in claims.held(records).items()},
        "seconds": statistics.median(cost["seconds"] for cost in costs),
        "megabytes": max(cost["megabytes"] for cost in costs),
        "device": records[0].run["device"],
    }


def of_full(notebooks: list[Path]) -> dict[str, Any]:
    """A full run: its claims, its sizes in words, and what it cost."""
    record = claims.read(notebooks[0])
    scale = in_words(record.run.get("size", {}))
    return record.as_json() | {"scale": scale, "megabytes": cost(notebooks[0])["megabytes"]}


def in_words(sizes: dict[str, str]) -> str:
    """The sizes of a run without the bounds of its claims, for readers."""
    kept = [
        f"{name} {value}" for name, value in sizes.items() if not name.endswith(("bound", "bounds"))
    ]
    return re.sub("[{}']", "", ", ".join(kept)).replace("_", " ")


def main(kind: str, chapter: str, target: str, *notebooks: str) -> None:
    """Write the record, whole or not at all."""
    record = {"seeds": of_seeds, "full": of_full}[kind]([Path(name) for name in notebooks])
    record |= {"date": datetime.date.today().isoformat(), "source": fingerprint(chapter)}
    unfinished = Path(target).with_suffix(".part")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(target)
    print(f"record  {target}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
