"""Claims: falsifiable statements of a paper, each with a bound that the method meets and its baseline fails."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsFloat

REPRODUCED, NOT_REPRODUCED, NEEDS_FULL = "reproduced", "not reproduced", "needs full"


class ClaimError(ValueError):
    """A claim that cannot be checked as it stands; the message says what its author has to change."""


@dataclass(frozen=True)
class Claim:
    """One checked statement.

    Parameters
    ----------
    id : short name in kebab case, unique in its chapter.
    statement : what the paper says, in a sentence that could turn out false.
    paper : where the paper says it, and its number if it gives one.
    measured : our number; None if this profile does not test the claim.
    bound : (lowest, highest) value that counts as reproduced; None leaves a side open.
    baseline : the value of the same quantity without the paper's effect: measured, or the null value.
    exact : the value follows from mathematics and not from chance; such a claim needs no baseline.
    """

    id: str
    statement: str
    paper: str
    measured: SupportsFloat | None
    bound: tuple[SupportsFloat | None, SupportsFloat | None]
    baseline: SupportsFloat | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        low, high = self._checked_bound()
        if low is not None and high is not None and low > high:
            raise ClaimError(
                f"claim {self.id!r}: its bound {self.bound} is empty, write (lowest, highest)"
            )
        if self.baseline is None and not self.exact:
            raise ClaimError(
                f"claim {self.id!r} has no baseline: give the value without the paper's effect"
            )
        object.__setattr__(self, "bound", (low, high))
        for name in ("measured", "baseline"):
            object.__setattr__(
                self, name, _number(getattr(self, name), f"claim {self.id!r}: {name}")
            )

    def _checked_bound(self) -> tuple[float | None, float | None]:
        if (
            not isinstance(self.bound, Sequence)
            or len(self.bound) != 2
            or all(b is None for b in self.bound)
        ):
            raise ClaimError(
                f"claim {self.id!r} needs a bound (lowest, highest), got {self.bound!r}"
            )
        low, high = (_number(b, f"claim {self.id!r}: bound") for b in self.bound)
        if any(b is not None and not math.isfinite(b) for b in (low, high)):
            raise ClaimError(
                f"claim {self.id!r}: a bound is finite, or None for an open side; got {self.bound!r}"
            )
        return low, high

    def admits(self, value: float) -> bool:
        """Whether `value` lies in the bound; nan never does."""
        low, high = self.bound
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and not math.isnan(value)
        )

    @property
    def baseline_passes(self) -> bool:
        """Whether the bound fails to tell the method from its baseline; a baseline of nan tells nothing."""
        if self.baseline is None:
            return False
        return math.isnan(self.baseline) or self.admits(self.baseline)

    @property
    def verdict(self) -> str:
        """`reproduced`, `not reproduced` or `needs full`."""
        if self.measured is None:
            return NEEDS_FULL
        return (
            REPRODUCED
            if self.admits(self.measured) and not self.baseline_passes
            else NOT_REPRODUCED
        )

    def as_record(self) -> dict[str, Any]:
        """The claim and its verdict, as it is kept in a notebook's output metadata (valid JSON)."""
        record = asdict(self) | {"bound": list(self.bound), "verdict": self.verdict}
        for name in ("measured", "baseline"):
            if record[name] is not None and not math.isfinite(record[name]):
                record[name] = str(record[name])
        return record

    @staticmethod
    def from_record(record: dict[str, Any]) -> Claim:
        """The claim that `as_record` wrote."""
        fields = {k: v for k, v in record.items() if k != "verdict"}
        for name in ("measured", "baseline"):
            fields[name] = float(fields[name]) if isinstance(fields[name], str) else fields[name]
        return Claim(**fields | {"bound": tuple(fields["bound"])})

    def shown(self) -> dict[str, str]:
        """The numbers as readers see them: exact ones behind `=`, chance ones behind `~`."""
        if self.measured is None:
            measured = "not tested in this profile"
        elif self.exact:
            measured = f"= {self._rounded_to_tolerance()}"
        else:
            measured = f"~ {self.measured:.3g}"
        low, high = (("" if b is None else f"{b:.6g}") for b in self.bound)
        bound = f"≤ {high}" if not low else f"≥ {low}" if not high else f"[{low}, {high}]"
        if low and low == high:
            bound = low
        baseline = "—" if self.baseline is None else f"~ {self.baseline:.3g}"
        return {"measured": measured, "bound": bound, "baseline": baseline}

    def _rounded_to_tolerance(self) -> str:
        """An exact value up to the bound's width, so that round-off does not differ between machines."""
        low, high = self.bound
        if low is None or high is None or low == high or not math.isfinite(self.measured):
            return f"{self.measured:.6g}"
        width = high - low
        return f"{round(self.measured / width) * width:.6g} (to {width:.2g})"


def _number(value: Any, what: str) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last one: a tensor of several elements
        raise ClaimError(f"{what} must be a number, got {value!r}") from None


def as_text(claims: Iterable[Claim]) -> str:
    """The table of claims in plain text, without padding that would move with a number's length."""
    blocks = []
    for claim in claims:
        shown = claim.shown()
        blocks.append(
            f"{claim.id}: {claim.verdict}\n    {claim.statement}\n    measured {shown['measured']}"
            f"   bound {shown['bound']}   without the effect {shown['baseline']}   paper: {claim.paper}"
        )
    return "\n".join(blocks)


def as_html(claims: Iterable[Claim]) -> str:
    """The table of claims in HTML."""
    head = ["claim", "statement", "paper", "measured", "bound", "without the effect", "verdict"]
    rows = []
    for claim in claims:
        shown = claim.shown()
        cells = [
            claim.id,
            claim.statement,
            claim.paper,
            shown["measured"],
            shown["bound"],
            shown["baseline"],
        ]
        kind = claim.verdict.replace(" ", "-")
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr>{row}<td class="verdict {kind}">{claim.verdict}</td></tr>')
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<table class="claims"><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


@dataclass(frozen=True)
class Record:
    """What one run of one chapter found: `run` as `nnlib.chapter` wrote it, and the claims."""

    run: dict[str, Any]
    claims: list[Claim]

    def as_json(self) -> dict[str, Any]:
        """The record as plain containers."""
        return {"run": self.run, "claims": [claim.as_record() for claim in self.claims]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        """The record that `as_json` wrote."""
        return Record(data["run"], [Claim.from_record(claim) for claim in data["claims"]])


def read(notebook: str | Path) -> Record:
    """The claims of an executed notebook, from the metadata of its outputs.

    Raises
    ------
    ClaimError : the notebook holds no report, or more than one.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    found = [m["nnlib"] for m in (output.get("metadata", {}) for output in outputs) if "nnlib" in m]
    if len(found) != 1:
        raise ClaimError(f"{notebook}: expected the output of one run.report(), found {len(found)}")
    return Record.from_json(found[0])


def held(records: Iterable[Record]) -> dict[str, tuple[int, int]]:
    """For each claim id: in how many of the runs it was reproduced, and in how many it was tested."""
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        for claim in record.claims:
            good, tested = counts.get(claim.id, (0, 0))
            counts[claim.id] = (
                good + (claim.verdict == REPRODUCED),
                tested + (claim.measured is not None),
            )
    return counts
