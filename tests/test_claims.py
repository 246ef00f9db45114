"""Claims: what counts as reproduced, which claims are refused, and what survives being stored."""

import json
import math

import numpy as np
import pytest
import torch

from nnlib import claims
from nnlib.claims import Claim, ClaimError, Record


def claim(id="slope", **changes):
    """A claim that holds, with `changes`."""
    fields = {
        "statement": "It falls.",
        "paper": "Theorem 1",
        "measured": -0.5,
        "bound": (-0.6, -0.4),
        "baseline": 0.0,
    }
    return Claim(id, **fields | changes)


def notebook(path, *outputs):
    """A notebook whose only cell has outputs with this metadata."""
    cell = {
        "cell_type": "code",
        "outputs": [{"output_type": "display_data", "metadata": m} for m in outputs],
    }
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, cell]}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "measured, bound, baseline, verdict",
    [
        (-0.5, (-0.6, -0.4), 0.0, claims.REPRODUCED),
        (-0.4, (-0.6, -0.4), 0.0, claims.REPRODUCED),
        (-0.3, (-0.6, -0.4), 0.0, claims.NOT_REPRODUCED),
        (2.0, (1.5, None), 1.0, claims.REPRODUCED),
        (0.2, (None, 0.3), 1.0, claims.REPRODUCED),
        (0.4, (None, 0.3), 1.0, claims.NOT_REPRODUCED),
        (math.nan, (-0.6, -0.4), 0.0, claims.NOT_REPRODUCED),
        (math.nan, (None, 0.3), 1.0, claims.NOT_REPRODUCED),
        (math.inf, (1.5, None), 1.0, claims.REPRODUCED),
        (None, (-0.6, -0.4), 0.0, claims.NEEDS_FULL),
        (
            2.0,
            (0.5, None),
            1.0,
            claims.NOT_REPRODUCED,
        ),  # a bound that the baseline passes shows nothing
    ],
)
def test_the_verdict_follows_from_measured_bound_and_baseline(measured, bound, baseline, verdict):
    assert claim(measured=measured, bound=bound, baseline=baseline).verdict == verdict


def test_a_baseline_of_nan_shows_nothing_and_one_of_infinity_is_a_number():
    assert claim(baseline=math.nan).baseline_passes
    assert claim(baseline=math.nan).verdict == claims.NOT_REPRODUCED
    assert not claim(bound=(None, 1.0), baseline=math.inf).baseline_passes
    assert claim(bound=(1.0, None), baseline=math.inf).baseline_passes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bound": None}, r"claim 'slope' needs a bound \(lowest, highest\), got None"),
        ({"bound": (None, None)}, "needs a bound"),
        ({"bound": (1.0,)}, "needs a bound"),
        ({"bound": 0.5}, "needs a bound"),
        ({"bound": (math.nan, 1.0)}, "a bound is finite, or None for an open side"),
        ({"bound": (0.0, math.inf)}, "a bound is finite, or None for an open side"),
        ({"measured": torch.zeros(2)}, "measured must be a number, got tensor"),
        ({"bound": ("low", 1.0)}, "bound must be a number, got 'low'"),
        ({"bound": (0.6, 0.4)}, "is empty"),
        ({"baseline": None}, "claim 'slope' has no baseline"),
        ({"measured": "many"}, "measured must be a number, got 'many'"),
        ({"baseline": [1, 2]}, "baseline must be a number"),
    ],
)
def test_a_claim_that_cannot_be_checked_is_refused_in_the_authors_words(changes, message):
    # `make test` also checks annotations, and then a wrong type does not reach our own check.
    with pytest.raises((ClaimError, TypeError), match=f"{message}|Type-check error"):
        claim(**changes)


def test_an_exact_claim_needs_no_baseline():
    assert (
        claim(measured=0.0, bound=(0, 1e-10), baseline=None, exact=True).verdict
        == claims.REPRODUCED
    )


@pytest.mark.parametrize("number", [np.float32(-0.5), torch.tensor(-0.5), np.array(-0.5)])
def test_numbers_of_other_libraries_become_plain_floats(number):
    assert type(claim(measured=number).measured) is float


@pytest.mark.parametrize("value", [-0.5, None, math.nan, math.inf, -math.inf])
def test_a_record_is_strict_json_and_gives_the_claim_back(value):
    before = claim(measured=value)
    text = json.dumps(before.as_record(), allow_nan=False)
    after = Claim.from_record(json.loads(text))
    assert after.as_record() == before.as_record()
    assert after.verdict == before.verdict


def test_chance_values_stand_behind_a_tilde_and_exact_ones_behind_an_equals_sign():
    assert claim().shown() == {"measured": "~ -0.5", "bound": "[-0.6, -0.4]", "baseline": "~ 0"}
    exact = claim(measured=3e-17, bound=(0, 1e-10), baseline=None, exact=True).shown()
    assert exact == {"measured": "= 0 (to 1e-10)", "bound": "[0, 1e-10]", "baseline": "—"}
    assert claim(measured=7, bound=(7, 7), exact=True).shown()["bound"] == "7"
    assert claim(bound=(None, 1)).shown()["bound"] == "≤ 1"
    assert claim(bound=(0, None)).shown()["bound"] == "≥ 0"
    assert claim(measured=None).shown()["measured"] == "not tested in this profile"


def test_round_off_of_an_exact_value_does_not_reach_the_page():
    shown = {
        claim(measured=x, bound=(-1e-9, 1e-9), exact=True).shown()["measured"]
        for x in (-3e-16, 0.0, 5e-16)
    }
    assert shown == {"= 0 (to 2e-09)"}


def test_both_tables_name_every_claim_its_bound_and_its_verdict():
    two = [claim(), claim("rate", statement="1 < 2", measured=None)]
    for table in (claims.as_text(two), claims.as_html(two)):
        for word in (
            "slope",
            "rate",
            "[-0.6, -0.4]",
            claims.REPRODUCED,
            claims.NEEDS_FULL,
            "~ -0.5",
            "Theorem 1",
        ):
            assert word in table
    assert "1 &lt; 2" in claims.as_html(two)


def test_the_text_table_moves_no_columns_with_the_length_of_a_number():
    short, long = (claims.as_text([claim(measured=x, bound=(-1, 1))]) for x in (0.5, -0.123))
    assert short.replace("~ 0.5", "~ -0.123") == long


def test_claims_are_read_back_from_a_notebook(tmp_path):
    record = Record(
        {"chapter": "part/slug", "profile": "quick", "seed": 3},
        [claim(), claim("rate", measured=None)],
    )
    found = claims.read(notebook(tmp_path / "a.ipynb", {}, {"nnlib": record.as_json()}))
    assert found == record


@pytest.mark.parametrize("reports", [0, 2])
def test_a_notebook_without_one_report_is_refused_by_name(tmp_path, reports):
    report = {"nnlib": Record({}, [claim()]).as_json()}
    with pytest.raises(
        ClaimError, match=rf"b\.ipynb: expected the output of one run\.report\(\), found {reports}"
    ):
        claims.read(notebook(tmp_path / "b.ipynb", *[report] * reports))


def test_seeds_are_counted_per_claim_and_untested_ones_apart():
    runs = [
        Record({}, [claim(), claim("rate", measured=None)]),
        Record({}, [claim(measured=0.1), claim("rate", measured=None)]),
        Record({}, [claim(measured=math.nan), claim("rate")]),
    ]
    assert claims.held(runs) == {"slope": (1, 3), "rate": (1, 1)}
    assert claims.held([]) == {}
