"""What every chapter does the same way: start a run, state its sizes, check claims, show library source.

Only this module of the library knows about notebooks, and only to display; without IPython it prints.
"""

from __future__ import annotations

import inspect
import os
import platform
import random
import textwrap
import time
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, resources
from types import SimpleNamespace
from typing import Any, SupportsFloat

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from nnlib import claims, figures
from nnlib.claims import Claim, ClaimError

PROFILES = ("quick", "full")


@dataclass
class Run:
    """One run of one chapter; made by `start`."""

    chapter: str
    profile: str
    seed: int
    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    size: dict[str, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def sizes(self, *, quick: dict[str, Any], full: dict[str, Any]) -> SimpleNamespace:
        """The sizes of this run's profile, as attributes; both profiles must name the same ones.

        Raises
        ------
        ValueError : a size is missing in one of the profiles.
        """
        if quick.keys() != full.keys():
            raise ValueError(
                f"both profiles need the same sizes; differing: {sorted(quick.keys() ^ full.keys())}"
            )
        chosen = quick if self.profile == "quick" else full
        self.size = {name: str(value) for name, value in chosen.items()}
        return SimpleNamespace(**chosen)

    def claim(
        self,
        id: str,
        statement: str,
        *,
        paper: str,
        measured: SupportsFloat | None,
        bound: tuple[SupportsFloat | None, SupportsFloat | None],
        baseline: SupportsFloat | None = None,
        exact: bool = False,
    ) -> Claim:
        """Check a statement of the paper; the parameters are those of `nnlib.claims.Claim`.

        `measured=None` at quick means that only a full run tests the claim.

        Raises
        ------
        ClaimError : no usable bound, no baseline, an id used before, nothing measured at full, or (at quick)
            a bound that the baseline passes too. At full such a claim counts as not reproduced, so that a
            long run is not lost.
        """
        claim = Claim(id, statement, paper, measured, bound, baseline, exact)
        if any(other.id == id for other in self.claims):
            raise ClaimError(f"claim {id!r} was made before; give each claim an id of its own")
        if measured is None and self.profile == "full":
            raise ClaimError(f"claim {id!r} has no measured value in a full run")
        if claim.baseline_passes and self.profile == "quick":
            raise ClaimError(
                f"claim {id!r}: the baseline ({claim.baseline:.3g}) passes the bound {claim.bound} too, or is nan, "
                "so the bound shows nothing; tighten it or measure something else"
            )
        self.claims.append(claim)
        return claim

    def report(self) -> None:
        """Show the table of claims, and keep the record of this run in the output's metadata.

        Raises
        ------
        ClaimError : no claim was made.
        """
        if not self.claims:
            raise ClaimError(f"{self.chapter} made no claim before run.report()")
        record = claims.Record(self._as_json(), self.claims).as_json()
        text, table = claims.as_text(self.claims), claims.as_html(self.claims)
        _display({"text/plain": text, "text/html": table}, metadata={"nnlib": record})

    def _as_json(self) -> dict[str, Any]:
        versions = {name: metadata.version(name) for name in ("nnlib", "torch", "numpy")}
        on_gpu = self.device.type == "cuda"
        return {
            "chapter": self.chapter,
            "profile": self.profile,
            "seed": self.seed,
            "device": torch.cuda.get_device_name(self.device)
            if on_gpu
            else f"CPU, {torch.get_num_threads()} thread(s)",
            "size": self.size,
            "seconds": round(time.perf_counter() - self.started, 1),
            "versions": versions | {"python": platform.python_version()},
        }


def start(chapter: str, *, profile: str = "quick", seed: int = 0) -> Run:
    """Begin a chapter: seed every generator, choose device and threads, set the figure style.

    A quick run uses one CPU thread, since the last digits depend on the number of threads. A full run uses a
    GPU if there is one, and otherwise the number of threads in `NNLIB_THREADS` (default: all cores).

    Parameters
    ----------
    chapter : ``"<part>/<slug>"``.
    profile : `quick` (a laptop's CPU, seconds) or `full` (the paper's scale).
    seed : non-negative; seeds Python's, NumPy's and torch's global generators.

    Raises
    ------
    ValueError : unknown chapter or profile, or a seed that is not a non-negative integer.
    """
    if chapter not in written():
        raise ValueError(f"unknown chapter {chapter!r}; there are: {', '.join(written())}")
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"the seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that readers combine with a chapter use the global state
    torch.manual_seed(seed)
    threads = 1 if profile == "quick" else int(os.environ.get("NNLIB_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    figures.use_style()
    device = torch.device("cuda" if profile == "full" and torch.cuda.is_available() else "cpu")
    print(textwrap.fill(f"{papers()[chapter]['title']}: {citation(chapter)}", 90))
    print(f"profile {profile}, seed {seed}, device {device.type}")
    return Run(chapter, profile, seed, device)


@cache
def papers() -> dict[str, dict[str, Any]]:
    """The catalogue of the book's 45 papers in reading order: ``"<part>/<slug>"`` to its entry."""
    catalogue = tomllib.loads(
        resources.files("nnlib").joinpath("papers.toml").read_text(encoding="utf-8")
    )
    return {f"{part['name']}/{p['slug']}": p for part in catalogue["parts"] for p in part["papers"]}


def written() -> list[str]:
    """The chapters whose module exists, in reading order."""
    root = resources.files("nnlib")
    return [chapter for chapter in papers() if root.joinpath(f"{chapter}.py").is_file()]


def citation(chapter: str) -> str:
    """The chapter's paper in a line: authors, title, venue, arXiv number."""
    paper = papers()[chapter]
    arxiv = f", arXiv:{paper['arxiv']}" if paper.get("arxiv") else ""
    return f"{paper['authors']}, “{paper['paper']}”, {paper['venue']}{arxiv}"


def cost_line(
    quick: dict[str, Any] | None, full: dict[str, Any] | None, download: str = "nothing"
) -> str:
    """The cost of a chapter for its header.

    Parameters
    ----------
    quick, full : measured `seconds`, `megabytes` (peak memory) and `device`; None if that profile was not run.
    download : what a full run fetches, with its size.
    """

    def cost(name: str, measured: dict[str, Any] | None) -> str:
        if measured is None:
            return f"{name}: not run"
        memory = f", {measured['megabytes'] / 1024:.1f} GB" if measured.get("megabytes") else ""
        return f"{name}: {measured['seconds']:.0f} s{memory} ({measured['device']})"

    return f"{cost('quick', quick)} · {cost('full', full)}; downloads {download}"


def address(label: str) -> str:
    """The book's `Repository` or `Documentation` address, from the package's metadata."""
    urls = metadata.metadata("nnlib").get_all("Project-URL") or []
    found = dict(entry.split(", ", 1) for entry in urls)
    if label not in found:
        raise ValueError(f"the installed nnlib names no {label!r} address; it has {sorted(found)}")
    return found[label].rstrip("/")


def show_source(thing: Any) -> None:
    """Show the source of a library function or class, highlighted, with links to its API page and its file.

    Raises
    ------
    ValueError : `thing` is not part of nnlib.
    """
    module = getattr(thing, "__module__", "") or ""
    if not module.startswith("nnlib."):
        raise ValueError(
            f"show_source shows the library's own code; {thing!r} is from {module or 'nowhere'}"
        )
    source = inspect.getsource(thing).rstrip()
    path = module.replace(".", "/")
    api = f"{address('Documentation')}/api/{path.removeprefix('nnlib/')}.html#{module}.{thing.__qualname__}"
    file = f"{address('Repository')}/blob/main/{path}.py"
    links = f"[`{module}.{thing.__qualname__}`]({api}) · [file in the repository]({file})"
    _display({"text/plain": source, "text/markdown": f"```python\n{source}\n```\n\n{links}"})


def _display(data: dict[str, str], **keywords: Any) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(data["text/plain"])
        return
    if get_ipython() is None:
        print(data["text/plain"])
    else:
        display(data, raw=True, **keywords)
