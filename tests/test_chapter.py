"""Starting a run, making and reporting claims, showing the library's source."""

import random

import numpy as np
import pytest
import torch

from nnlib import chapter, claims, training
from nnlib.claims import ClaimError

NAME = "part/slug"
PAPER = {
    "title": "A title",
    "paper": "A paper",
    "authors": "A. Author",
    "venue": "Venue 2000",
    "arxiv": "2001.00001",
}


@pytest.fixture(autouse=True)
def one_chapter(monkeypatch):
    """A catalogue of two papers, one of them with a module; the global settings are put back."""
    monkeypatch.setattr(
        chapter, "papers", lambda: {NAME: PAPER, "part/later": PAPER | {"arxiv": None}}
    )
    monkeypatch.setattr(chapter, "written", lambda: [NAME])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(**options):
    return chapter.start(NAME, **options)


def make(a_run, id="slope", **changes):
    fields = {"paper": "Theorem 1", "measured": -0.5, "bound": (-0.6, -0.4), "baseline": 0.0}
    return a_run.claim(id, "It falls.", **fields | changes)


def test_a_start_seeds_every_generator():
    draws = []
    for _ in range(2):
        run(seed=7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    run(seed=8)
    assert torch.rand(1).item() != draws[0][2]


def test_a_quick_run_takes_one_thread_and_the_cpu_and_says_what_it_is(capsys):
    quick = run()
    assert torch.get_num_threads() == 1 and quick.device == torch.device("cpu")
    said = capsys.readouterr().out
    assert "A title: A. Author, “A paper”, Venue 2000, arXiv:2001.00001" in said
    assert "profile quick, seed 0" in said


def test_a_full_run_takes_the_number_of_threads_that_it_is_given(monkeypatch):
    monkeypatch.setenv("NNLIB_THREADS", "2")
    run(profile="full")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["part/later", "part", "", "slug"])
def test_an_unknown_chapter_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=rf"unknown chapter '{name}'; there are: {NAME}"):
        chapter.start(name)


def test_an_unknown_profile_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown profile 'fast'; choose one of quick, full"):
        run(profile="fast")


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", None, True])
def test_a_seed_that_is_no_seed_is_refused(seed):
    # `make test` also checks annotations, and then a wrong type does not reach our own check.
    with pytest.raises(
        (ValueError, TypeError), match=r"the seed must be an integer|Type-check error"
    ):
        run(seed=seed)


def test_sizes_are_those_of_the_profile():
    assert run().sizes(quick={"n": 1}, full={"n": 2}).n == 1
    assert run(profile="full").sizes(quick={"n": 1}, full={"n": 2}).n == 2


def test_a_size_that_one_profile_lacks_is_named():
    with pytest.raises(ValueError, match=r"\['draws', 'n'\]"):
        run().sizes(quick={"n": 1}, full={"draws": 2})


def test_the_same_claim_id_twice_is_refused():
    a_run = run()
    make(a_run)
    with pytest.raises(ClaimError, match="claim 'slope' was made before"):
        make(a_run)
    assert len(a_run.claims) == 1


def test_at_quick_a_bound_that_the_baseline_passes_is_refused():
    with pytest.raises(ClaimError, match=r"claim 'slope': the baseline \(-0.45\) passes the bound"):
        make(run(), baseline=-0.45)


def test_at_full_such_a_claim_is_kept_as_not_reproduced():
    assert make(run(profile="full"), baseline=-0.45).verdict == claims.NOT_REPRODUCED


@pytest.mark.parametrize(
    "changes, message", [({"bound": None}, "needs a bound"), ({"baseline": None}, "no baseline")]
)
def test_a_claim_without_bound_or_baseline_never_enters_the_run(changes, message):
    a_run = run()
    with pytest.raises((ClaimError, TypeError), match=f"{message}|Type-check error"):
        make(a_run, **changes)
    assert a_run.claims == []


def test_only_a_quick_run_may_leave_a_claim_untested():
    assert make(run(), measured=None).verdict == claims.NEEDS_FULL
    with pytest.raises(ClaimError, match="claim 'slope' has no measured value in a full run"):
        make(run(profile="full"), measured=None)


def test_nan_is_not_reproduced():
    assert make(run(), measured=float("nan")).verdict == claims.NOT_REPRODUCED


def test_a_report_without_claims_is_refused():
    with pytest.raises(ClaimError, match="part/slug made no claim"):
        run().report()


def test_a_report_carries_table_and_record(monkeypatch):
    shown = {}
    monkeypatch.setattr(chapter, "_display", lambda data, **more: shown.update(data=data, **more))
    a_run = run(seed=2)
    made = make(a_run)
    a_run.report()
    assert shown["data"] == {
        "text/plain": claims.as_text([made]),
        "text/html": claims.as_html([made]),
    }
    record = shown["metadata"]["nnlib"]
    assert record["claims"] == [made.as_record()]
    assert {k: record["run"][k] for k in ("chapter", "profile", "seed")} == {
        "chapter": NAME,
        "profile": "quick",
        "seed": 2,
    }
    assert {"device", "seconds", "versions"} <= record["run"].keys()
    assert {"nnlib", "torch", "numpy", "python"} == record["run"]["versions"].keys()


def test_outside_a_notebook_a_report_prints_its_table(capsys):
    a_run = run()
    make(a_run)
    a_run.report()
    assert "slope: reproduced" in capsys.readouterr().out


def test_show_source_prints_the_code_of_a_library_function(capsys):
    chapter.show_source(training.fit)
    assert capsys.readouterr().out.startswith("def fit(")


def test_show_source_links_the_page_and_the_file(monkeypatch):
    shown = {}
    monkeypatch.setattr(chapter, "_display", lambda data, **more: shown.update(data))
    chapter.show_source(training.fit)
    assert (
        f"{chapter.address('Documentation')}/api/training.html#nnlib.training.fit"
        in shown["text/markdown"]
    )
    assert f"{chapter.address('Repository')}/blob/main/nnlib/training.py" in shown["text/markdown"]


@pytest.mark.parametrize("foreign", [torch.sum, np.linalg.norm, random.Random, len, lambda: 0, 3])
def test_show_source_refuses_code_that_is_not_the_librarys(foreign):
    with pytest.raises(ValueError, match="show_source shows the library's own code"):
        chapter.show_source(foreign)


def test_an_address_that_the_package_lacks_is_refused():
    with pytest.raises(ValueError, match="names no 'Homepage' address"):
        chapter.address("Homepage")


def test_a_cost_line_gives_seconds_memory_and_download():
    quick = {"seconds": 12.4, "megabytes": 1536, "device": "CPU, 1 thread(s)"}
    assert chapter.cost_line(quick, None, "MNIST, 55 MB") == (
        "quick: 12 s, 1.5 GB (CPU, 1 thread(s)) · full: not run; downloads MNIST, 55 MB"
    )
    assert "quick: not run · full: 90 s (GPU)" in chapter.cost_line(
        None, {"seconds": 90, "device": "GPU"}
    )


def test_a_paper_without_arxiv_number_is_cited_without_one():
    assert chapter.citation("part/later") == "A. Author, “A paper”, Venue 2000"


def test_the_catalogue_is_complete_and_every_module_is_in_it(monkeypatch):
    monkeypatch.undo()
    papers = chapter.papers()
    assert len(papers) == 45
    for name, paper in papers.items():
        assert {"slug", "title", "paper", "authors", "venue", "key", "question"} <= paper.keys(), (
            name
        )
    assert len({paper["key"] for paper in papers.values()}) == 45
    assert set(chapter.written()) <= set(papers)
