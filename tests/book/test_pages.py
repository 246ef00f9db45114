"""workflow/pages.py on a tiny book: nothing guessed, nothing stale, no link into the void."""

import base64
import io
import json

import inputs
import pages
import pytest
import yaml
from PIL import Image

from nnlib.claims import Claim, Record

CATALOGUE = """
[[parts]]
name = "alpha"
title = "Alpha"
summary = "The first part."
[[parts.papers]]
slug = "one"
title = "Chapter one"
paper = "Paper One"
authors = "A. Author"
venue = "ICML 2001"
arxiv = "0101.00001"
key = "author2001one"
question = "Is it one?"
[[parts.papers]]
slug = "two"
title = "Chapter two"
paper = "Paper Two"
authors = "B. Author"
venue = "ICML 2002"
key = "author2002two"
question = "Is it two?"
[[paths]]
title = "A path"
summary = "Both."
chapters = ["alpha/one", "alpha/two"]
"""
SITE = "https://example.org/book"
CLAIMS = [
    Claim("near-one", "It is | <one>", "Table 1: 1.0", 1.02, (0.9, 1.1), 0.0),
    Claim("at-scale", "It stays one", "Figure 2", None, (0.9, 1.1), 0.0),
]


def forget():
    """Empty the caches of `inputs`, which knows a checkout that changes between runs only."""
    for cached in [thing for thing in vars(inputs).values() if hasattr(thing, "cache_clear")]:
        cached.cache_clear()


def picture():
    Image.new("RGBA", (900, 600), (0, 0, 255, 90)).save(file := io.BytesIO(), "png")
    return base64.b64encode(file.getvalue()).decode()


def cell(kind, source, *tags, outputs=(), **metadata):
    code = {"outputs": list(outputs), "execution_count": None} if kind == "code" else {}
    return {
        "cell_type": kind,
        "id": "x",
        "metadata": {"tags": list(tags), **metadata},
        "source": source,
    } | code


def output(data, **metadata):
    return {"output_type": "display_data", "data": data, "metadata": metadata}


def notebook(name, claims=CLAIMS):
    run = {"chapter": name, "profile": "quick", "seed": 0}
    link = f"[api]({SITE}/api/{name}.html#nnlib.alpha.f)"
    mystnb = {"figure": {"caption": "One"}, "image": {"alt": "A blue box."}}
    cells = [
        cell("markdown", "# Chapter\n\n- **Cost**: <!-- cost -->"),
        cell(
            "markdown",
            "```{glossary}\nfirst term\n    Meaning of\n    the first.\n\nsecond term\n    With $x$.\n```",
        ),
        cell("code", "from nnlib.alpha import one", outputs=[output({"text/markdown": link})]),
        cell("code", 'profile = "quick"', "injected-parameters"),
        cell("code", "plot()", "hero", outputs=[output({"image/png": picture()})], mystnb=mystnb),
        cell(
            "code",
            "run.report()",
            outputs=[output({"text/plain": ""}, nnlib=Record(run, claims).as_json())],
        ),
    ]
    metadata = {"kernelspec": {"name": "python3"}, "nnlib": {"download": "one file, 3 MB"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


class Tiny:
    """A checkout with one written chapter."""

    def __init__(self, root):
        self.root = root
        self.write("nnlib/papers.toml", CATALOGUE)
        self.write("nnlib/alpha/__init__.py", "")
        self.write("nnlib/alpha/one.py", '"""The method\nof one."""\n')
        self.write("nnlib/shared.py", '"""Shared."""\n')
        self.write("book/index.md", "# Book\n\n<!-- cards -->\n\n<!-- paths -->\n")
        self.write("book/alpha/index.md", "# Alpha\n\n<!-- papers -->\n")
        self.write("book/glossary.md", "# Glossary\n")
        self.write("book/alpha/one.ipynb", notebook("alpha/one"))

    def write(self, path, content):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
        forget()

    def record(self, kind, **content):
        source = inputs.fingerprint("alpha/one")
        self.write(
            f"book/results/{kind}/alpha/one.json",
            {"source": source, "date": "2001-02-03"} | content,
        )

    def seeds(self, **content):
        claims = {"near-one": [4, 5], "at-scale": [0, 0]}
        common = {
            "seeds": [0, 1, 2, 3, 4],
            "claims": claims,
            "seconds": 12.4,
            "megabytes": 512,
            "device": "CPU",
        }
        self.record("seeds", **common | content)

    def full(self, **content):
        claim = Claim("at-scale", "It stays one", "Figure 2", 1.3, (0.9, 1.1), 0.0).as_record()
        run = {"seconds": 99.0, "device": "A GPU", "versions": {"torch": "2.9"}}
        self.record(
            "full",
            **{"run": run, "claims": [claim], "scale": "width_a [1, 2]", "megabytes": 2048}
            | content,
        )

    def tree(self):
        return pages.pages(pages.Book(self.root, committed=True).load(), SITE)

    def rows(self, page="scoreboard.md"):
        return [line for line in self.tree()[page].splitlines() if line.startswith("<tr><td>")]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    yield Tiny(tmp_path)
    forget()


def test_the_scoreboard_says_not_run_and_never_guesses(tiny):
    near, scale = tiny.rows()
    assert near.count("not run") == scale.count("not run") == 2
    assert (
        "~ 1.02" in near
        and "Table 1: 1.0" in near
        and "It is | &lt;one&gt;" in near
        and ">reproduced<" in near
    )
    assert "not tested in this profile" in scale and ">needs full<" in scale
    assert "Full run: not run." in tiny.tree()["scoreboard.md"]


def test_the_scoreboard_shows_seeds_and_the_full_run(tiny):
    tiny.seeds()
    tiny.full()
    near, scale = tiny.rows()
    assert "4/5" in near and "not in that run" in near
    assert "not tested</td>" in scale and ">not reproduced</span> ~ 1.3" in scale
    done = r"Full run: 0 of 1 claims reproduced; 2001-02-03; A GPU; width\_a \[1, 2\]."
    assert done in tiny.tree()["scoreboard.md"]
    assert "older code" not in near + scale


@pytest.mark.parametrize("path", ["nnlib/alpha/one.py", "book/alpha/one.ipynb"])
def test_records_of_older_code_are_marked(tiny, path):
    tiny.seeds()
    tiny.full()
    changed = notebook("alpha/one")
    changed["cells"][3]["source"] = "another = 1"
    tiny.write(path, changed if path.endswith("ipynb") else '"""Changed."""\n')
    assert [row.count("older code") for row in tiny.rows()] == [2, 2]


def test_prose_and_shared_modules_do_not_age_a_record(tiny):
    tiny.seeds()
    changed = notebook("alpha/one")
    changed["cells"][0]["source"] += " More words."
    tiny.write("book/alpha/one.ipynb", changed)
    tiny.write("nnlib/shared.py", '"""Changed."""\n')
    assert not any("older code" in row for row in tiny.rows())


def test_claims_are_there_for_machines(tiny):
    tiny.seeds()
    (entry,) = json.loads(tiny.tree()["_extra/claims.json"])
    assert entry["quick"] == [claim.as_record() for claim in CLAIMS]
    assert entry["seeds"]["claims"]["near-one"] == [4, 5] and entry["full"] is None


def test_planned_chapters_are_named_and_not_linked(tiny):
    tree = tiny.tree()
    for page in ("index.md", "alpha/index.md"):
        assert "Chapter two" in tree[page] and "planned" in tree[page].lower()
        assert "Chapter one" in tree[page] and "/alpha/one" in tree[page]
        assert "alpha/two" not in tree[page] and "<!--" not in tree[page]
    assert (
        ":link: /alpha/one\n" in tree["index.md"]
        and "1 of 2 claims reproduced, 1 left to a full run" in tree["index.md"]
    )


def test_a_card_has_the_hero_made_small_and_its_alt_text(tiny):
    tree = tiny.tree()
    assert ":img-top: /_static/cards/alpha/one.png\n:img-alt: A blue box.\n" in tree["index.md"]
    assert Image.open(io.BytesIO(tree["_static/cards/alpha/one.png"])).size == (480, 320)


def test_the_staged_chapter(tiny):
    tiny.seeds()
    tiny.full(run={"seconds": 99.0, "device": 'A "GPU"'})
    tiny.write(
        "tests/alpha/test_one.py",
        "def test_a(): ...\ndef helper(): ...\nclass TestB:\n    def test_c(self): ...\n",
    )
    tiny.write("benchmarks/alpha/bench_one.py", '"""Against the peer.\n\nMore."""\n')
    staged = json.loads(tiny.tree()["alpha/one.ipynb"])
    first, note = staged["cells"][0]["source"], staged["cells"][-1]["source"]
    assert (
        'quick: 12 s, 0.5 GB (CPU) · full: 99 s, 2.0 GB (A "GPU"); downloads one file, 3 MB'
        in first
    )
    assert "](../api/alpha/one.html#" in json.dumps(staged) and SITE not in json.dumps(staged)
    assert "injected-parameters" not in json.dumps(staged)
    assert (
        "4 of 5 checks hold over seeds 0, 1, 2, 3, 4" in note
        and "2 in `tests/alpha/test_one.py`" in note
    )
    assert "Against the peer." in note and "2001-02-03" in note
    assert staged["metadata"]["myst"]["html_meta"]["description"] == "Is it one?"
    tiny.write("benchmarks/alpha/bench_one.py", '"""Against the peer."""\nPEER = "somelib"\n')
    assert (
        "**Compared with**: somelib."
        in json.loads(tiny.tree()["alpha/one.ipynb"])["cells"][-1]["source"]
    )


def test_a_chapter_without_records_says_so(tiny):
    staged = json.loads(tiny.tree()["alpha/one.ipynb"])
    assert "quick: not run · full: not run" in staged["cells"][0]["source"]
    note = staged["cells"][-1]["source"]
    assert (
        "**Seeds**: not run." in note and "**Full run**: not run." in note and "nothing yet" in note
    )


def test_running_times_of_the_last_run(tiny):
    name = "_build/executed/quick/seed0/alpha/one"
    executed = notebook("alpha/one")
    executed["metadata"]["nnlib"]["executed"] = {"megabytes": 256}
    executed["cells"][-1]["outputs"][0]["metadata"]["nnlib"]["run"] |= {
        "device": "CPU",
        "versions": {"numpy": "2.0"},
    }
    tiny.write(f"{name}.ipynb", executed)
    tiny.write(f"{name}.tsv", "s\tmax_rss\n7.25\t512.0\n")
    page = pages.pages(pages.Book(tiny.root).load(), SITE)["runtimes.md"]
    quick, full = [line for line in page.splitlines() if line.startswith("<tr><td>")]
    assert "<td>7.2</td><td>0.50</td><td>CPU</td><td>numpy 2.0</td>" in quick
    assert full.count("not run") == 4


def test_terms_of_chapters_are_listed_with_their_chapter(tiny):
    page = tiny.tree()["glossary.md"]
    assert (
        "{term}`first term`\n: Meaning of the first. *Chapter:* {doc}`Chapter one </alpha/one>`"
        in page
    )
    assert "{term}`second term`\n: With $x$." in page and "```{glossary}" not in page


def test_api_pages_name_the_chapters_that_use_a_module(tiny):
    tree = tiny.tree()
    assert "automodule:: nnlib.alpha.one" in tree["api/alpha/one.md"]
    assert "{doc}`Chapter one </alpha/one>`" in tree["api/alpha/one.md"]
    assert "no chapter yet" in tree["api/shared.md"]
    assert ": The method of one.\n" in tree["api/index.md"]


def test_benchmarks_appear_with_their_results(tiny):
    assert "benchmarks.md" not in tiny.tree()
    row = {"work": "n=3", "peer": "lib", "machine": "a CPU", "date": "2001-02-03"}
    row |= {"ours_seconds": 0.5, "peer_seconds": 1.0, "limit_seconds": 0.25}
    tiny.write("book/results/benchmarks/alpha/one.json", [row])
    cells = "<td>lib</td><td>500</td><td>1e+03</td><td>250</td><td>2.00</td><td>2.0</td>"
    assert cells in tiny.tree()["benchmarks.md"]
    assert "benchmarks" in pages.toc(pages.Book(tiny.root))


def test_the_table_of_contents_follows_catalogue_and_notebooks(tiny):
    tiny.write("book/alpha/two.ipynb", notebook("alpha/two"))
    papers = yaml.safe_load(pages.toc(pages.Book(tiny.root)))["parts"][0]["chapters"]
    assert papers == [
        {"file": "alpha/index", "sections": [{"file": "alpha/one"}, {"file": "alpha/two"}]}
    ]
    assert len(tiny.tree()["scoreboard.md"].split("\n## ")) == 3
    assert tiny.tree()["index.md"].count("grid-item-card") == 2


def test_a_stale_table_of_contents_stops_the_build(tiny, capsys):
    assert pages.main(["--committed"], tiny.root) == 1
    assert capsys.readouterr().err == "pages: _toc.yml is out of date; run `make toc`\n"
    assert pages.main(["--toc"], tiny.root) == 0 == pages.main(["--committed"], tiny.root)
    tiny.write("book/alpha/two.ipynb", notebook("alpha/two"))
    assert pages.main(["--committed"], tiny.root) == 1


def test_what_is_wrong_is_said_in_a_sentence(tiny, capsys):
    pages.main(["--toc"], tiny.root)
    assert pages.main([], tiny.root) == 1
    assert "alpha/one: not executed; run `make book`" in capsys.readouterr().err
    tiny.write("book/results/full/alpha/one.json", "{")
    assert pages.main(["--committed"], tiny.root) == 1
    assert "book/results/full/alpha/one.json is not valid JSON" in capsys.readouterr().err
    tiny.write("book/alpha/three.ipynb", notebook("alpha/three"))
    assert pages.main(["--committed"], tiny.root) == 1
    assert "book/alpha/three.ipynb is not in nnlib/papers.toml" in capsys.readouterr().err


def test_a_second_build_touches_only_what_changed(tiny):
    pages.main(["--toc"], tiny.root)
    pages.main(["--committed"], tiny.root)
    source = tiny.root / "_build/source"
    tiny.write("_build/source/left/over.md", "old")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}
    tiny.write("book/glossary.md", "# Words\n")
    pages.main(["--committed"], tiny.root)
    after = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after.get(path)} == {
        "glossary.md",
        "over.md",
    }
