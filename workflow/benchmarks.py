"""Turn pytest-benchmark's report into the committed records of `book/results/benchmarks`.

A benchmark is parametrised by `who` ("nnlib", the peer, "limit"), and its group names the work.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from inputs import ROOT


def records(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each chapter, ``part/slug``: median seconds of `nnlib`, peer and limit for each work."""
    groups: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for entry in report["benchmarks"]:
        path = Path(entry["fullname"].split("::")[0])
        chapter = f"{path.parent.name}/{path.stem.removeprefix('bench_')}"
        groups[chapter, entry["group"]][entry["params"]["who"]] = entry["stats"]["median"]
    machine = report["machine_info"]["cpu"].get("brand_raw", report["machine_info"]["machine"])
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (chapter, work), seconds in groups.items():
        ours, limit = seconds.pop("nnlib"), seconds.pop("limit", None)
        for peer, theirs in seconds.items():
            rows[chapter].append(
                {
                    "work": work,
                    "ours_seconds": ours,
                    "peer": peer,
                    "peer_seconds": theirs,
                    "limit_seconds": limit,
                    "machine": f"{machine}, 1 thread",
                    "date": report["datetime"][:10],
                }
            )
    return rows


def main(report: str) -> None:
    """Write one record for each chapter of the report, whole or not at all."""
    for chapter, rows in records(json.loads(Path(report).read_text(encoding="utf-8"))).items():
        target = ROOT / f"book/results/benchmarks/{chapter}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".part")
        unfinished.write_text(
            json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        unfinished.replace(target)
        print(f"record  {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
