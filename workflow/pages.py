"""Makes `_build/source`, the tree that Jupyter Book renders: the texts of `book/`, the chapters with their outputs,
and every page that is made from records (scoreboard, running times, API pages, cards)."""

from __future__ import annotations

import argparse
import ast
import base64
import html
import io
import json
import re
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import yaml
from PIL import Image
from records import cost

from nnlib import claims
from nnlib.chapter import address, cost_line

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ["read", "run", "teach", "write", "reproduce"]
REFERENCE = ["scoreboard", "runtimes", "benchmarks", "glossary", "bibliography"]
NOT_RUN = '<span class="none">not run</span>'


class SiteError(Exception):
    """What keeps the site from being made, in one sentence for its author."""


def read(path: Path) -> Any:
    """A JSON file; None if it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise SiteError(f"{path} is not valid JSON: {error}") from None


@dataclass
class Chapter:
    """A written chapter: its notebook as it will be shown, and what is recorded about it."""

    name: str  # "<part>/<slug>"
    entry: dict[str, Any]  # in papers.toml
    notebook: dict[str, Any]
    claims: list[claims.Claim]
    quick: dict[str, Any] | None  # seconds, megabytes, device, versions
    seeds: dict[str, Any] | None  # book/results/seeds
    full: dict[str, Any] | None  # book/results/full
    source: str  # fingerprint of today's code

    @property
    def cells(self) -> list[tuple[str, list[str], dict[str, Any]]]:
        """(text, tags, cell) of each cell."""
        return [
            ("".join(c["source"]), c["metadata"].get("tags", []), c) for c in self.notebook["cells"]
        ]

    @property
    def good(self) -> str:
        """How many of its claims hold in the run that is shown."""
        return tally([claim.verdict for claim in self.claims])

    @property
    def cost(self) -> dict[str, Any] | None:
        """What the full run cost."""
        return self.full and self.full["run"] | {"megabytes": self.full.get("megabytes")}

    def age(self, record: dict[str, Any]) -> str:
        """A mark for a record that other code than today's has made."""
        return "" if record.get("source") == self.source else ' <em class="old">older code</em>'


def tally(verdicts: list[str]) -> str:
    """How many claims of a run were reproduced, and how many it cannot test."""
    text = f"{verdicts.count(claims.REPRODUCED)} of {len(verdicts)} claims reproduced"
    untested = verdicts.count(claims.NEEDS_FULL)
    return f"{text}, {untested} left to a full run" if untested else text


class Book:
    """Everything that the pages are made from.

    Parameters
    ----------
    root : the checkout.
    committed : show the notebooks' committed outputs, and not those of the last run.
    """

    def __init__(self, root: Path, committed: bool = False) -> None:
        self.root = root
        catalogue = tomllib.loads((root / "nnlib/papers.toml").read_text(encoding="utf-8"))
        self.parts, self.paths = catalogue["parts"], catalogue.get("paths", [])
        self.entries = {
            f"{part['name']}/{p['slug']}": p for part in self.parts for p in part["papers"]
        }
        files = {f"{path.parent.name}/{path.stem}" for path in root.glob("book/*/*.ipynb")}
        if unknown := sorted(files - self.entries.keys()):
            raise SiteError(
                f"book/{unknown[0]}.ipynb is not in nnlib/papers.toml; add its paper there"
            )
        self.written = [name for name in self.entries if name in files]
        self.committed = committed
        self.chapters: dict[str, Chapter] = {}

    def load(self) -> Book:
        """Read the chapters and their records."""
        folder = self.root / ("book" if self.committed else "_build/executed/quick/seed0")
        if missing := [name for name in self.written if not (folder / f"{name}.ipynb").exists()]:
            raise SiteError(
                f"{', '.join(missing)}: not executed; run `make book`, or `make html` for stored outputs"
            )
        self.chapters = {
            name: self._chapter(name, folder / f"{name}.ipynb") for name in self.written
        }
        return self

    def _chapter(self, name: str, path: Path) -> Chapter:
        notebook, record = read(path), claims.read(path)
        seeds, full = (
            read(self.root / f"book/results/{kind}/{name}.json") for kind in ("seeds", "full")
        )
        quick = record.run | cost(path) if path.with_suffix(".tsv").exists() else seeds
        source = inputs.fingerprint(name)
        return Chapter(
            name, self.entries[name], notebook, record.claims, quick, seeds, full, source
        )

    def title(self, name: str) -> str:
        """A paper's title: a link if its chapter is written."""
        if name in self.written:
            return f"{{doc}}`{self.entries[name]['title']} </{name}>`"
        return f"{self.entries[name]['title']} *(planned)*"

    def modules(self) -> list[str]:
        """The library's modules, the shared ones first, without the leading `nnlib`."""
        files = [
            p.relative_to(self.root / "nnlib").with_suffix("")
            for p in self.root.glob("nnlib/**/*.py")
        ]
        return [
            p.as_posix()
            for p in sorted(files, key=lambda p: (len(p.parts), p))
            if p.stem != "__init__"
        ]


def toc(book: Book) -> str:
    """The text of `_toc.yml`."""

    def there(pages: list[str]) -> list[dict[str, Any]]:
        return [{"file": page} for page in pages]

    papers: list[dict[str, Any]] = []
    for part in book.parts:
        chapters = [name for name in book.written if name.startswith(part["name"] + "/")]
        if (book.root / f"book/{part['name']}/index.md").exists():
            entry = {"file": f"{part['name']}/index"}
            papers.append(entry | {"sections": there(chapters)} if chapters else entry)
        else:
            papers += there(chapters)
    guide = [path.stem for path in (book.root / "book/guide").glob("*.md")]
    guide.sort(key=lambda page: (GUIDE.index(page) if page in GUIDE else len(GUIDE), page))
    made = ["scoreboard", "runtimes"] + ["benchmarks"] * bool(benchmark_records(book))
    reference = [
        page for page in REFERENCE if page in made or (book.root / f"book/{page}.md").exists()
    ]
    api = {"file": "api/index", "sections": there([f"api/{module}" for module in book.modules()])}
    parts = [
        {"caption": "Papers", "numbered": 2, "chapters": papers},
        {"caption": "Guide", "chapters": there([f"guide/{page}" for page in guide])},
        {"caption": "Results and reference", "chapters": [*there(reference), api]},
    ]
    content = {
        "format": "jb-book",
        "root": "index",
        "parts": [part for part in parts if part["chapters"]],
    }
    return "# Generated by `make toc`.\n" + yaml.safe_dump(content, sort_keys=False)


def table(head: list[str], rows: list[list[str]], kind: str = "records") -> str:
    """An HTML table that scrolls sideways where it is too wide; cells are HTML."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'


def verdict(text: str) -> str:
    """A verdict in its colour."""
    return f'<span class="verdict {text.replace(" ", "-")}">{text}</span>'


def where(chapter: Chapter) -> str:
    """Result, date, device and scale of the full run, in Markdown."""
    if not chapter.full:
        return "not run"
    found = [
        tally([claims.Claim.from_record(claim).verdict for claim in chapter.full["claims"]]),
        chapter.full.get("date"),
        chapter.full["run"]["device"],
        chapter.full.get("scale"),
    ]
    text = re.sub(r"([\\*_\[\]$`<])", r"\\\1", "; ".join(filter(None, found)))
    return text + chapter.age(chapter.full)


def scoreboard(book: Book) -> str:
    """Every claim of every chapter, against the paper, the baseline, other seeds and the full run."""
    every = [claim for chapter in book.chapters.values() for claim in chapter.claims]
    kinds = (claims.REPRODUCED, claims.NOT_REPRODUCED, claims.NEEDS_FULL)
    counts = ", ".join(f"{sum(c.verdict == kind for c in every)} {kind}" for kind in kinds)
    page = [
        "# Scoreboard\n",
        f"{len(book.chapters)} of {len(book.entries)} papers have a chapter. They check {len(every)} claims; "
        f"in quick runs: {counts}. No number on this page is written by hand: all come from the chapters' runs "
        '(<a href="claims.json">as JSON</a>). *Without the effect* is the same quantity for the baseline, which '
        "the bound has to reject; *seeds* says in how many quick runs the claim held. A record marked *older code* "
        "was made before the chapter or its module last changed.\n",
    ]
    head = [
        "claim",
        "statement",
        "paper",
        "ours, quick",
        "without the effect",
        "quick",
        "seeds",
        "full",
    ]
    for chapter in book.chapters.values():
        page.append(f"## {book.title(chapter.name)}\n")
        page.append(f"Full run: {where(chapter)}.\n")
        rows = [_score(chapter, claim) for claim in chapter.claims]
        page.append(table(head, rows, "claims scoreboard"))
    return "\n".join(page)


def _score(chapter: Chapter, claim: claims.Claim) -> list[str]:
    shown, seeds, full = claim.shown(), NOT_RUN, NOT_RUN
    if chapter.seeds:
        held, tested = chapter.seeds["claims"].get(claim.id, (0, 0))
        seeds = (f"{held}/{tested}" if tested else "not tested") + chapter.age(chapter.seeds)
    if chapter.full:
        found = [claims.Claim.from_record(c) for c in chapter.full["claims"] if c["id"] == claim.id]
        full = (
            f"{verdict(found[0].verdict)} {found[0].shown()['measured']}"
            if found
            else "not in that run"
        )
        full += chapter.age(chapter.full)
    ours = f"{shown['measured']}<br><small>bound {shown['bound']}</small>"
    texts = [f"<code>{claim.id}</code>", html.escape(claim.statement), html.escape(claim.paper)]
    return [*texts, ours, shown["baseline"], verdict(claim.verdict), seeds, full]


def runtimes(book: Book) -> str:
    """Seconds, memory, device and versions of each chapter, for both profiles."""
    rows = []
    for chapter in book.chapters.values():
        for profile, run in (("quick", chapter.quick), ("full", chapter.cost)):
            cells = [
                f'<a href="{chapter.name}.html">{html.escape(chapter.entry["title"])}</a>',
                profile,
            ]
            if run is None:
                rows.append([*cells, NOT_RUN, NOT_RUN, NOT_RUN, NOT_RUN])
                continue
            memory = f"{run['megabytes'] / 1024:.2f}" if run.get("megabytes") else "not measured"
            versions = (
                ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items()) or "not recorded"
            )
            rows.append(
                [*cells, f"{run['seconds']:.1f}", memory, html.escape(run["device"]), versions]
            )
    head = ["chapter", "profile", "seconds", "memory (GB)", "device", "versions"]
    text = "Time and peak memory of a whole notebook, imports included. *quick* is what this site shows; *full* is near the paper's scale.\n\n"
    return "# Running times\n\n" + text + table(head, rows)


def benchmarks(book: Book) -> str:
    """Each module against the library that a practitioner would use."""
    rows = []
    for path in benchmark_records(book):
        chapter = f"{path.parent.name}/{path.stem}"
        for r in read(path):
            ours, theirs, limit = (r[f"{who}_seconds"] for who in ("ours", "peer", "limit"))
            times = [f"{1e3 * t:.3g}" if t else "—" for t in (ours, theirs, limit)]
            ratios = [f"{theirs / ours:.2f}", f"{ours / limit:.1f}" if limit else "—"]
            texts = [html.escape(r[name]) for name in ("work", "peer", "machine", "date")]
            link = f'<a href="{chapter}.html">{html.escape(book.entries[chapter]["title"])}</a>'
            rows.append([link, texts[0], texts[1], *times, *ratios, f"{texts[2]}, {texts[3]}"])
    head = ["module of", "work", "peer", "ours (ms)", "peer (ms)", "limit (ms)", "peer / ours"]
    text = (
        "The same work in one run on one machine, median of several rounds. Above 1 in *peer / ours*, the book's "
        "module is the faster. *Limit* is the time of the operations that no implementation can avoid, as the "
        "benchmark states them; *ours / limit* says how far from it the module is.\n\n"
    )
    return "# Benchmarks\n\n" + text + table([*head, "ours / limit", "machine"], rows)


def benchmark_records(book: Book) -> list[Path]:
    """The records that `make bench` wrote, of chapters that are written."""
    paths = (book.root / f"book/results/benchmarks/{name}.json" for name in book.written)
    return [path for path in paths if path.exists()]


def api(book: Book) -> dict[str, str]:
    """One page for each module of the library, and their index."""
    uses = {name: inputs.modules(name) for name in book.written}
    pages, rows = {}, []
    for module in book.modules():
        dotted = f"nnlib.{module.replace('/', '.')}"
        file = book.root / f"nnlib/{module}.py"
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split(
            "\n\n"
        )[0]
        users = (
            ", ".join(book.title(name) for name, used in uses.items() if file in used)
            or "no chapter yet"
        )
        directive = f"```{{eval-rst}}\n.. automodule:: {dotted}\n   :members:\n```\n"
        pages[f"api/{module}.md"] = f"# {dotted}\n\nUsed in chapters: {users}\n\n{directive}"
        rows.append(f"{{doc}}`{dotted} </api/{module}>`\n: {' '.join(summary.split())}\n")
    return pages | {"api/index.md": "# Library\n\n" + "\n".join(rows)}


def glossary(book: Book) -> str:
    """The terms that chapters define, as a list with links to their chapters."""
    items = []
    for chapter in book.chapters.values():
        texts = "\n".join(
            text for text, _, cell in chapter.cells if cell["cell_type"] == "markdown"
        )
        for block in re.findall(r"^```\{glossary\}\n(.*?)^```", texts, re.M | re.S):
            for term, meaning in re.findall(r"^(\S[^\n]*)\n((?:[ \t]+[^\n]*\n|\n)+)", block, re.M):
                meaning = " ".join(textwrap.dedent(meaning).split())
                items.append(
                    f"{{term}}`{term.strip()}`\n: {meaning} *Chapter:* {book.title(chapter.name)}\n"
                )
    return (
        "\n## Terms defined in chapters\n\n" + "\n".join(sorted(items, key=str.lower))
        if items
        else ""
    )


def hero(chapter: Chapter) -> tuple[bytes, str] | None:
    """The chapter's card: the figure of its cell tagged `hero`, made small, and its alt text."""
    for _, tags, cell in chapter.cells:
        for output in cell.get("outputs", []) if "hero" in tags else []:
            if "image/png" in output.get("data", {}):
                data = base64.b64decode("".join(output["data"]["image/png"]))
                image = Image.open(io.BytesIO(data)).convert("RGBA")
                image.thumbnail((480, 480), Image.Resampling.LANCZOS)
                image.quantize(96, Image.Quantize.FASTOCTREE).save(
                    file := io.BytesIO(), "png", optimize=True
                )
                return file.getvalue(), cell["metadata"].get("mystnb", {}).get("image", {}).get(
                    "alt", ""
                )
    return None


def cards(book: Book) -> str:
    """A card for each part, followed by those of its written chapters."""
    page = []
    for part in book.parts:
        names = [f"{part['name']}/{paper['slug']}" for paper in part["papers"]]
        there = (book.root / f"book/{part['name']}/index.md").exists()
        title = f"[{part['title']}]({part['name']}/index.md)" if there else part["title"]
        planned = " · ".join(
            book.entries[name]["title"] for name in names if name not in book.chapters
        )
        page.append(f":::{{card}} {title}\n:class-card: part\n{part['summary']}\n")
        page.append(f"{{.small}}\nPlanned: {planned}\n:::\n" if planned else ":::\n")
        if written := [book.chapters[name] for name in names if name in book.chapters]:
            page += ["::::{grid} 1 2 2 3\n:gutter: 3\n", *map(_card, written), "::::\n"]
    return "\n".join(page)


def _card(chapter: Chapter) -> str:
    picture = hero(chapter)
    image = (
        f":img-top: /_static/cards/{chapter.name}.png\n:img-alt: {picture[1]}\n" if picture else ""
    )
    return (
        f":::{{grid-item-card}} {chapter.entry['title']}\n:link: /{chapter.name}\n:link-type: doc\n{image}"
        f":class-card: chapter\n{chapter.entry['question']}\n\n{{.small}}\n"
        f"{chapter.entry['venue']} · {chapter.good}\n:::\n"
    )


def paths(book: Book) -> str:
    """The learning paths."""
    return "\n".join(
        f"**{path['title']}.** {path['summary']}\n\n"
        + "".join(f"1. {book.title(name)}\n" for name in path["chapters"])
        for path in book.paths
    )


def papers(book: Book, part: str) -> str:
    """The papers of a part: chapter, question and citation."""
    entries = next((p["papers"] for p in book.parts if p["name"] == part), [])
    lines = ["| chapter | question | paper |", "| --- | --- | --- |"]
    for p in entries:
        chapter = book.title(f"{part}/{p['slug']}")
        arxiv = (
            f", [arXiv:{p['arxiv']}](https://arxiv.org/abs/{p['arxiv']})" if p.get("arxiv") else ""
        )
        cited = f"{p['authors']}, *{p['paper']}*, {p['venue']}{arxiv}"
        lines.append(f"| {chapter} | {p['question']} | {cited} |")
    return "\n".join(lines) + "\n"


def checked(book: Book, chapter: Chapter) -> str:
    """The note at a chapter's end: by what it was checked."""
    part, slug = chapter.name.split("/")
    seeds = "not run"
    if chapter.seeds:
        held, tested = (
            sum(column) for column in zip(*chapter.seeds["claims"].values(), strict=True)
        )
        seeds = f"{held} of {tested} checks hold over seeds {', '.join(map(str, chapter.seeds['seeds']))}"
        seeds += chapter.age(chapter.seeds)
    test, bench = f"tests/{part}/test_{slug}.py", f"benchmarks/{part}/bench_{slug}.py"
    return (
        ":::{admonition} How this chapter was checked\n:class: checked\n"
        f"- **Claims**: {chapter.good} in the run on this page, see the {{doc}}`/scoreboard`.\n"
        f"- **Seeds**: {seeds}.\n- **Tests**: {count_tests(book.root / test)} in `{test}`.\n"
        f"- **Compared with**: {peer(book.root / bench)}.\n- **Full run**: {where(chapter)}.\n:::\n"
    )


def count_tests(path: Path) -> int:
    """The number of test functions in a file; 0 if there is none."""
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return sum(
        isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        for node in ast.walk(tree)
    )


def peer(path: Path) -> str:
    """What a benchmark compares with: its constant `PEER`, else the first line of its docstring."""
    if not path.exists():
        return "nothing yet"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PEER":
            return str(ast.literal_eval(node.value))
    return (ast.get_docstring(tree) or "not named").splitlines()[0].rstrip(".")


def staged(book: Book, chapter: Chapter, site: str) -> str:
    """The chapter's notebook as the site shows it."""
    metadata = chapter.notebook["metadata"]
    line = cost_line(
        chapter.quick, chapter.cost, metadata.get("nnlib", {}).get("download", "nothing")
    )
    kept = [cell for _, tags, cell in chapter.cells if "injected-parameters" not in tags]
    text = json.dumps(kept, ensure_ascii=False).replace(f"{site}/", "../")
    cells = json.loads(text.replace("<!-- cost -->", json.dumps(line, ensure_ascii=False)[1:-1]))
    cells += [
        {"cell_type": "markdown", "id": "checked", "metadata": {}, "source": checked(book, chapter)}
    ]
    metadata |= {"myst": {"html_meta": {"description": chapter.entry["question"]}}}
    return json.dumps(chapter.notebook | {"cells": cells, "metadata": metadata}, ensure_ascii=False)


def filled(book: Book, text: str, part: str) -> str:
    """A text with its markers filled."""
    fill = {
        "cards": lambda: cards(book),
        "paths": lambda: paths(book),
        "papers": lambda: papers(book, part),
    }
    return re.sub(r"<!-- (cards|paths|papers) -->", lambda marker: fill[marker[1]](), text)


def pages(book: Book, site: str) -> dict[str, str | bytes]:
    """Every file of the tree, by its path."""
    tree: dict[str, str | bytes] = {"_toc.yml": toc(book)}
    for path in sorted((book.root / "book").rglob("*")):
        name = path.relative_to(book.root / "book")
        if path.suffix == ".md":
            tree[name.as_posix()] = filled(book, path.read_text(encoding="utf-8"), name.parts[0])
        elif path.is_file() and path.suffix != ".ipynb" and name.parts[0] != "results":
            tree[name.as_posix()] = path.read_bytes()
    if "glossary.md" in tree:
        tree["glossary.md"] += glossary(book)
    for name, chapter in book.chapters.items():
        tree[f"{name}.ipynb"] = staged(book, chapter, site)
        if picture := hero(chapter):
            tree[f"_static/cards/{name}.png"] = picture[0]
    tree |= {"scoreboard.md": scoreboard(book), "runtimes.md": runtimes(book)} | api(book)
    if benchmark_records(book):
        tree["benchmarks.md"] = benchmarks(book)
    records = [
        {
            "chapter": c.name,
            "quick": [x.as_record() for x in c.claims],
            "seeds": c.seeds,
            "full": c.full,
        }
        | {"source": c.source}
        for c in book.chapters.values()
    ]
    return tree | {"_extra/claims.json": json.dumps(records, indent=1, ensure_ascii=False)}


def sync(tree: dict[str, str | bytes], target: Path) -> None:
    """Write the tree; files that stay the same are left alone, so that Sphinx need not read them again."""
    for path in list(target.rglob("*")):
        if path.is_file() and path.relative_to(target).as_posix() not in tree:
            path.unlink()
    for name, content in tree.items():
        path, data = target / name, content.encode() if isinstance(content, str) else content
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Make the tree, or with `--toc` the table of contents; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--committed", action="store_true", help="show the outputs stored in book/")
    parser.add_argument("--toc", action="store_true", help="write _toc.yml anew, and nothing else")
    options = parser.parse_args(arguments)
    try:
        book = Book(root, options.committed)
        if options.toc:
            (root / "_toc.yml").write_text(toc(book), encoding="utf-8")
            return 0
        if not (root / "_toc.yml").exists() or (root / "_toc.yml").read_text(
            encoding="utf-8"
        ) != toc(book):
            raise SiteError("_toc.yml is out of date; run `make toc`")
        sync(pages(book.load(), address("Documentation")), root / "_build/source")
    except (SiteError, claims.ClaimError) as error:
        print(f"pages: {error}", file=sys.stderr)
        return 1
    if "/OWNER/" in address("Repository"):
        print(
            f"The address is still the placeholder {address('Repository')}: make address URL=... sets it."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
