"""The form of a chapter and of the library: every rule that needs no run, with a sentence on what to do.

`python tests/book/form.py [book/part/slug.ipynb ...]` lists the problems of these chapters, or of all of them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat

from nnlib import claims

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = (
    "The question",
    "The idea",
    "The method in code",
    "Experiments",
    "Claims",
    "Limits",
    "Exercises",
    "Further reading",
)
GLANCE = ("Paper", "Question", "Answer", "You will be able to", "Read before")
TAGS = {"colab", "parameters", "setup", "hero", "stub", "solution", "check", "nbval-check-output"}
TAGS |= {"hide-cell", "hide-input", "hide-output", "full-width"}  # how Jupyter Book lays a cell out
GENERATED = {"scoreboard", "runtimes", "benchmarks", "bibliography"}  # pages without a source file
COLAB = """import importlib.util
import os

if importlib.util.find_spec("nnlib") is None:
    source = os.environ.get("NNLIB_SOURCE", "nnlib @ git+{repository}")
    %pip install -q "{{source}}\""""
PARAMETERS = 'profile = "quick"\nseed = 0'
NEVER_IN_OUTPUT = {
    "a path of this machine": r"(?<![\w.:/-])/(?:root|home|tmp|work|usr|opt|mnt|var|Users|content)/\S|[A-Z]:\\\w",
    "a memory address": r"\b0x[0-9a-f]{6,}\b",
    "a progress bar": r"\d%\|| it/s\b|\r",
    "a warning": r"\w*Warning:",
    "an object of Matplotlib": r"<(?:Figure|Axes|matplotlib)|\bText\(",
}
# Not looked for where a cell shows the library's source: there, they are part of the text.
NEVER_MEASURED = {
    "a running time": r"\d\s?(?:s|ms|µs|us|ns|secs?|seconds?|minutes?|hours?)\b(?!/)",
    "a version number": r"(?<![\w.])\d+\.\d+\.\d+(?:[.+]?(?:post|dev|rc|cpu|cu)\w*)?(?![\w.]*\d)",
}
DIRECTIVE = re.compile(
    r"^(?:`{3,}|:{3,})\{(exercise|solution)(?:-start)?\}[^\n]*(?:\n:[^\n]*)*", re.M
)


@dataclass
class Cell:
    """One cell: its number from 1, its kind, its text, its tags, and the section it stands in."""

    number: int
    kind: str
    text: str
    raw: dict
    section: str

    @property
    def tags(self) -> list[str]:
        return self.raw.get("metadata", {}).get("tags", [])

    @property
    def outputs(self) -> list[dict]:
        return self.raw.get("outputs", [])

    @property
    def shows_source(self) -> bool:
        return "chapter.show_source(" in self.text

    @property
    def printed(self) -> str:
        """Everything the outputs say, without the pictures."""
        texts = []
        for output in self.outputs:
            data = output.get("data", {})
            texts += [output.get("text", "")]
            texts += [
                data[kind] for kind in data if kind.startswith("text/") and "image/png" not in data
            ]
        return "\n".join("".join(text) for text in texts)

    def __str__(self) -> str:
        return f"cell {self.number}"


class Chapter:
    """A notebook and the files that belong to it."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path.resolve(), path.resolve().parents[2]
        self.part, self.slug = self.path.parent.name, self.path.stem
        self.name, self.prefix = f"{self.part}/{self.slug}", self.slug.replace("_", "-")
        self.notebook = json.loads(self.path.read_text(encoding="utf-8"))
        self.cells, section = [], ""
        for number, raw in enumerate(self.notebook["cells"], 1):
            text = "".join(raw["source"])
            if raw["cell_type"] == "markdown" and (heading := re.match(r"## (.+)", text)):
                section = heading[1].strip()
            self.cells.append(Cell(number, raw["cell_type"], text, raw, section))

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def prose(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "markdown"]

    def tagged(self, tag: str) -> list[Cell]:
        return [cell for cell in self.cells if tag in cell.tags]

    @cached_property
    def entry(self) -> dict | None:
        """The catalogue's entry."""
        catalogue = tomllib.loads((self.root / "nnlib/papers.toml").read_text(encoding="utf-8"))
        entries = {
            f"{part['name']}/{p['slug']}": p for part in catalogue["parts"] for p in part["papers"]
        }
        return entries.get(self.name)

    @cached_property
    def bibliography(self) -> set[str]:
        return set(
            re.findall(
                r"^@\w+\{\s*([^,\s]+)", (self.root / "book/references.bib").read_text("utf-8"), re.M
            )
        )


def problems(notebook: Path) -> list[str]:
    """What is wrong with the form of a chapter, a sentence each; nothing if it is as it should be."""
    chapter = Chapter(Path(notebook))
    return [problem for rule in RULES for problem in rule(chapter)]


def stored_cleanly(c: Chapter) -> Iterator[str]:
    """Format, metadata and size of the file itself."""
    if (c.notebook.get("nbformat"), c.notebook.get("nbformat_minor", 0) >= 5) != (4, True):
        yield "save the notebook in format 4.5 or later, whose cells have ids"
    metadata = c.notebook["metadata"]
    if metadata.get("kernelspec") != {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }:
        yield 'the kernelspec must be {"display_name": "Python 3", "language": "python", "name": "python3"}'
    if metadata.get("language_info") != {"name": "python"}:
        yield 'language_info must be {"name": "python"}: `make outputs` writes it so'
    if extra := sorted(metadata.keys() - {"kernelspec", "language_info", "nnlib"}):
        yield f"remove the notebook metadata {extra}: `make outputs` does"
    ids = [cell.raw.get("id") for cell in c.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "every cell needs an id of its own"
    else:
        try:
            nbformat.validate(c.notebook)
        except nbformat.ValidationError as error:
            yield f"the file is no valid notebook: {str(error).splitlines()[0]}"
    extra = {
        name: cell
        for cell in c.cells
        for name in cell.raw.get("metadata", {})
        if name not in ("tags", "mystnb")
    }
    for name, cell in extra.items():
        yield f"remove the metadata {name} from the cells ({cell} has it): `make outputs` does"
    if (size := c.path.stat().st_size) >= 800_000:
        yield f"the notebook has {size // 1000} KB, the limit is 800: draw fewer points or fewer figures"


def first_cells(c: Chapter) -> Iterator[str]:
    """Title, At a glance, installation, parameters, setup."""
    if [cell.kind for cell in c.cells[:5]] != ["markdown"] * 2 + ["code"] * 3:
        yield "the first five cells must be: title, At a glance (both markdown), installation, parameters, setup"
        return
    title, glance, install, parameters, setup = c.cells[:5]
    if not re.fullmatch(r"# \S[^\n]*\s*", title.text):
        yield "the first cell must be the title alone, `# Title`"
    elif c.entry and title.text.strip() != f"# {c.entry['title']}":
        yield f"the title must be the catalogue's, `# {c.entry['title']}`"
    if not re.match(r":::+\{admonition\} At a glance\n", glance.text):
        yield "the second cell must be the block `:::{admonition} At a glance`"
    for label in GLANCE:
        if f"**{label}" not in glance.text:
            yield f"At a glance lacks its line **{label}**"
    if glance.text.count("<!-- cost -->") != 1:
        yield "At a glance needs the marker <!-- cost --> once: the cost line is filled in there"
    if c.entry and not re.search(rf"\{{cite(?::\w+)?\}}`{re.escape(c.entry['key'])}`", glance.text):
        yield f"At a glance must cite the paper: {{cite:t}}`{c.entry['key']}`"
    project = tomllib.loads((c.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    standard = COLAB.format(repository=project["urls"]["Repository"])
    if install.text.strip() != standard or not {"colab", "hide-cell"} <= set(install.tags):
        yield f"the third cell, tagged colab and hide-cell, must be exactly:\n{standard}"
    if parameters.text.strip() != PARAMETERS or parameters.tags != ["parameters"]:
        yield f"the fourth cell, tagged parameters, must be exactly:\n{PARAMETERS}"
    if (
        f'chapter.start("{c.name}", profile=profile, seed=seed)' not in setup.text
        or "setup" not in setup.tags
    ):
        yield f'the fifth cell, tagged setup, must say `run = chapter.start("{c.name}", profile=profile, seed=seed)`'
    if not any("run.sizes(" in cell.text for cell in c.tagged("setup")):
        yield "a setup cell must state both profiles' sizes: `size = run.sizes(quick=dict(...), full=dict(...))`"


def sections(c: Chapter) -> Iterator[str]:
    """The eight sections, and one title."""
    headings = [h.strip() for cell in c.prose for h in re.findall(r"^## (.+)", cell.text, re.M)]
    if headings != list(SECTIONS):
        yield f"the `##` headings must be {', '.join(SECTIONS)}; they are {', '.join(headings)}"
    if sum(len(re.findall(r"^# ", cell.text, re.M)) for cell in c.prose) != 1:
        yield "only the title may be a heading of the first level"
    for cell in c.prose:
        if "\n## " in cell.text:
            yield f"{cell}: begin a cell with a `##` heading, do not put it inside one"


def tags(c: Chapter) -> Iterator[str]:
    """Known tags, each of the unique ones once."""
    for cell in c.cells:
        if unknown := sorted(set(cell.tags) - TAGS):
            yield f"{cell}: unknown tag {', '.join(unknown)}; known are {', '.join(sorted(TAGS))}"
    if [cell.number for cell in c.tagged("setup")] not in ([5], [5, 6]):
        yield "the fifth cell, and no other but the sixth, carries the tag setup"
    for tag in ("colab", "parameters", "hero"):
        if len(c.tagged(tag)) != 1:
            yield f"exactly one cell must carry the tag {tag}, {len(c.tagged(tag))} do"


def files(c: Chapter) -> Iterator[str]:
    """The chapter's other files, its places in catalogue, contents and bibliography."""
    for file in (
        f"nnlib/{c.name}.py",
        f"tests/{c.part}/test_{c.slug}.py",
        f"benchmarks/{c.part}/bench_{c.slug}.py",
    ):
        if not (c.root / file).is_file():
            yield f"{file} is missing"
    toc = c.root / "_toc.yml"
    if not toc.exists() or f"file: {c.name}\n" not in toc.read_text(encoding="utf-8") + "\n":
        yield f"_toc.yml does not list {c.name}: `make toc` writes it"
    if c.entry is None:
        yield f"nnlib/papers.toml has no entry for {c.name}"
    elif c.entry["key"] not in c.bibliography:
        yield f"book/references.bib has no entry {c.entry['key']}"


def code(c: Chapter) -> Iterator[str]:
    """Short cells, short functions."""
    for cell in c.code[1:]:
        lines = [line for line in cell.text.splitlines() if line.strip()]
        limit = (
            40 if "setup" in cell.tags else 25
        )  # both profiles' sizes stand in sight, one under the other
        if len(lines) > limit:
            yield f"{cell} has {len(lines)} lines of code, the limit is {limit}: split it"
        try:
            tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.text, flags=re.M))
        except SyntaxError as error:
            yield f"{cell} is not valid Python: {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if (length := node.end_lineno - node.lineno + 1) > 10:
                    yield f"{cell}: {node.name} has {length} lines, the limit is 10: move it to nnlib/{c.name}.py"
        if cell.shows_source and "nbval-check-output" not in cell.tags:
            yield f"{cell} shows the library's source: tag it nbval-check-output"


def figures(c: Chapter) -> Iterator[str]:
    """Caption, label and alt text of every picture."""
    seen = set()
    for cell in c.code:
        count = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        if not count:
            if "hero" in cell.tags:
                yield f"{cell} carries the tag hero but its output has no figure"
            continue
        if count > 1:
            yield f"{cell} draws {count} figures: one figure to a cell"
        settings = cell.raw["metadata"].get("mystnb", {})
        label = settings.get("figure", {}).get("name", "")
        if not settings.get("figure", {}).get("caption", "").strip():
            yield f"{cell}: its figure needs a caption, mystnb.figure.caption in the cell's metadata"
        if not label.startswith(f"fig-{c.prefix}-") or label in seen:
            yield f"{cell}: its figure needs a label of its own, mystnb.figure.name, that begins fig-{c.prefix}-"
        if len(settings.get("image", {}).get("alt", "").strip()) < 30:
            yield f"{cell}: describe the figure in mystnb.image.alt, in 30 characters or more, for who cannot see it"
        seen.add(label)


def outputs(c: Chapter) -> Iterator[str]:
    """Stored outputs say nothing about the machine and the moment."""
    if [cell.raw.get("execution_count") for cell in c.code] != list(range(1, len(c.code) + 1)):
        yield "the cells were not run once each, from first to last: `make outputs` does it"
    for cell in c.code:
        kinds = {output["output_type"] for output in cell.outputs}
        if "error" in kinds:
            yield f"{cell} stores an error"
        if any(output.get("name") == "stderr" for output in cell.outputs):
            yield f"{cell} stores text on stderr: remove what causes the warning or the progress bar"
        never = NEVER_IN_OUTPUT | ({} if cell.shows_source else NEVER_MEASURED)
        for what, pattern in never.items():
            if found := re.search(pattern, cell.printed):
                yield f"{cell} prints {what} ({found[0].strip()!r}), which differs on every machine; leave it out"


def checked_claims(c: Chapter) -> Iterator[str]:
    """The stored record of claims."""
    try:
        record = claims.read(c.path)
    except (claims.ClaimError, KeyError, TypeError) as error:
        yield f"the record of claims cannot be read: {error}"
        return
    if record.run != {"chapter": c.name, "profile": "quick", "seed": 0}:
        yield f"the stored run must be chapter, profile quick and seed 0 and nothing else, it is {record.run}"
    if len(record.claims) < 4:
        yield f"a chapter checks at least four claims, this one {len(record.claims)}"
    reports = [
        cell
        for cell in c.code
        if any("nnlib" in output.get("metadata", {}) for output in cell.outputs)
    ]
    stored = {claim["id"]: claim["verdict"] for o in reports[0].outputs for claim in _record(o)}
    limits = "\n".join(cell.text for cell in c.prose if cell.section == "Limits")
    for claim in record.claims:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim.id):
            yield f"claim {claim.id!r}: write its id in kebab case"
        if stored[claim.id] != claim.verdict:
            yield f"claim {claim.id!r} is stored as {stored[claim.id]} but its numbers say {claim.verdict}"
        if (
            claim.exact
            and None in claim.bound
            and claim.measured is not None
            and claim.measured % 1
        ):
            yield f"claim {claim.id!r} is exact: give its bound both sides, so that round-off is not compared"
        if claim.baseline_passes:
            yield f"claim {claim.id!r}: its baseline passes the bound too, so it shows nothing"
        if claim.verdict == claims.NOT_REPRODUCED and claim.id not in limits:
            yield f"claim {claim.id!r} is not reproduced: say why in Limits, by its id"
    last = [cell for cell in c.code if cell.section == "Claims"][-1:]
    if (
        last != reports
        or last[0].text.strip() != "run.report()"
        or "nbval-check-output" not in last[0].tags
    ):
        yield "the last code cell of Claims must be `run.report()` alone, tagged nbval-check-output"


def _record(output: dict) -> list[dict]:
    return output.get("metadata", {}).get("nnlib", {}).get("claims", [])


def exercises(c: Chapter) -> Iterator[str]:
    """Three or four exercises, each with a solution that a student version can leave out."""
    found: dict[str, list[str]] = {"exercise": [], "solution": []}
    blocks: list[list[Cell]] = []  # an exercise and the cells up to the next one
    inside = False  # between solution-start and solution-end
    for cell in c.cells:
        kinds = []
        for match in DIRECTIVE.finditer(cell.text) if cell.kind == "markdown" else ():
            kinds.append(match[1])
            label = re.search(r"^:label:\s*(\S+)", match[0], re.M) or re.search(
                r"\}[ \t]*(\S+)", match[0]
            )
            found[match[1]].append(label[1] if label else "")
        if len(set(kinds)) > 1:
            yield f"{cell}: give the solution a cell of its own, so that the student version can leave it out"
        if "exercise" in kinds:
            blocks.append([])
        if blocks:
            blocks[-1].append(cell)
        inside |= "solution" in kinds and "{solution-start}" in cell.text
        expected = inside or kinds == ["solution"]
        if expected != ("solution" in cell.tags) and not (inside and "check" in cell.tags):
            yield f"{cell}: a solution's cells, and no others, carry the tag solution"
        inside &= "{solution-end}" not in cell.text
    labels = found["exercise"]
    if not 3 <= len(labels) <= 4:
        yield f"a chapter has three or four exercises, this one {len(labels)}"
    for label in labels:
        if not label.startswith(f"{c.prefix}-"):
            yield f"exercise {label!r}: begin its label with {c.prefix}-, labels are global in the book"
    if sorted(labels) != sorted(found["solution"]):
        yield f"each exercise needs one solution: exercises {labels}, solutions {found['solution']}"
    for block in blocks:
        roles = [
            tag
            for cell in block
            for tag in ("stub", "solution", "check")
            if tag in cell.tags and cell.kind == "code"
        ]
        if {"stub", "check"} & set(roles) and [
            r for n, r in enumerate(roles) if r not in roles[:n]
        ] != [
            "stub",
            "solution",
            "check",
        ]:
            yield f"{block[0]}: an exercise that asks for code needs a stub, then its solution, then a check cell"


def links(c: Chapter) -> Iterator[str]:
    """Links to pages, files and bibliography entries lead somewhere."""
    for cell in c.prose:
        for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", cell.text):
            if not _page_exists(c, target.strip()):
                yield f"{cell}: there is no page {target!r} to link to"
        for target in re.findall(r"\]\(<?([^)\s>]+)", cell.text):
            if not re.match(r"https?:|mailto:|#", target) and not _page_exists(
                c, target.split("#")[0]
            ):
                yield f"{cell}: the link to {target!r} leads nowhere"
        for keys in re.findall(r"\{cite(?::\w+)*\}`([^`]+)`", cell.text):
            for key in sorted({key.strip() for key in keys.split(",")} - c.bibliography):
                yield f"{cell}: book/references.bib has no entry {key}"


def _page_exists(c: Chapter, target: str) -> bool:
    book = c.root / "book"
    page = book / target.lstrip("/") if target.startswith("/") else (c.path.parent / target)
    if page.is_file() or any(Path(f"{page}{suffix}").is_file() for suffix in (".md", ".ipynb")):
        return True
    inside = page.resolve()
    name = inside.relative_to(book).as_posix() if inside.is_relative_to(book) else ""
    name = re.sub(r"\.(html|md)$", "", name)
    return name in GENERATED or (
        name.startswith("api/") and (c.root / f"nnlib/{name[4:]}.py").is_file()
    )


RULES = (
    stored_cleanly,
    first_cells,
    sections,
    tags,
    files,
    code,
    figures,
    outputs,
    checked_claims,
    exercises,
    links,
)

DRAWS = "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like".split()
FILLS = "normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ cauchy_ geometric_ trunc_normal_".split()
FILLS += (
    "kaiming_normal_ kaiming_uniform_ xavier_normal_ xavier_uniform_ orthogonal_ sparse_".split()
)
SEEDED = {
    f"numpy.random.{n}"
    for n in ("default_rng", "Generator", "RandomState", "SeedSequence", "PCG64")
}
NOTEBOOK_TOOLS = {
    "IPython",
    "ipykernel",
    "jupyter",
    "nbformat",
    "nbclient",
    "papermill",
    "sphinx",
    "myst_nb",
}


def library_problems(root: Path = ROOT) -> list[str]:
    """What is wrong with the form of the library's modules."""
    found = []
    for path in sorted((root / "nnlib").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        shared = path.parent == root / "nnlib"
        for line, problem in _module_problems(tree, shared, path.name, _parts(root)):
            found.append(f"{path.relative_to(root).as_posix()}:{line}: {problem}")
    return found


def _parts(root: Path) -> set[str]:
    return {
        path.name
        for path in (root / "nnlib").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }


def _module_problems(
    tree: ast.Module, shared: bool, file: str, parts: set[str]
) -> Iterator[tuple[int, str]]:
    names: dict[str, str] = {}  # local name: what it stands for
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name
                if alias.asname
                else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            module = ("nnlib." if node.level and shared else "." * node.level) + (node.module or "")
            imported = [f"{module}.{alias.name}" for alias in node.names]
            names |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        for name in imported:
            package, _, rest = name.replace("..", ".").partition(".")
            if package in NOTEBOOK_TOOLS and file != "chapter.py":
                yield (
                    node.lineno,
                    f"imports {package}; only nnlib/chapter.py may know about notebooks",
                )
            if shared and package == "nnlib" and rest.split(".")[0] in parts:
                yield (
                    node.lineno,
                    f"a shared module imports the part {rest.split('.')[0]}; parts import shared modules",
                )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not (shared and file == "chapter.py"):
            if problem := _unseeded(node, names):
                yield node.lineno, problem
    if ast.get_docstring(tree) is None and tree.body:
        yield 1, "the module needs a docstring"
    for node in tree.body:
        yield from _undocumented(node)


def _unseeded(call: ast.Call, names: dict[str, str]) -> str | None:
    written = ast.unparse(call.func)
    if not re.fullmatch(
        r"[\w.]+", written
    ):  # a method of something computed: only its name is known
        written = f"tensor.{written.rsplit('.', 1)[-1]}"
    head, _, rest = written.partition(".")
    name = names.get(head, head) + (f".{rest}" if rest else "")
    last = name.rsplit(".", 1)[-1]
    has_generator = any(keyword.arg in ("generator", None) for keyword in call.keywords)
    if name.startswith("numpy.random.") and not (name in SEEDED and (call.args or call.keywords)):
        return f"{written} draws from a generator nobody seeded; take a numpy.random.Generator as an argument"
    if names.get(head, "").split(".")[0] == "random" and name not in (
        "random.Random",
        "random.SystemRandom",
    ):
        return (
            f"{written} draws from Python's global generator; take a torch.Generator as an argument"
        )
    if (
        (name.startswith("torch.") and last in DRAWS) or ("." in name and last in FILLS)
    ) and not has_generator:
        return f"{written} draws without generator=...; take a torch.Generator as an argument and pass it on"
    return None


def _undocumented(node: ast.stmt, owner: str = "") -> Iterator[tuple[int, str]]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    if node.name.startswith("_") or (owner and node.name == "forward"):
        return
    if ast.get_docstring(node) is None:
        yield node.lineno, f"{owner}{node.name} is public and needs a docstring"
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            yield from _undocumented(member, f"{node.name}.")


def chapters(root: Path = ROOT) -> list[Path]:
    """Every chapter's notebook."""
    return sorted(
        path for path in (root / "book").glob("*/*.ipynb") if ".ipynb_checkpoints" not in path.parts
    )


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or chapters()
    lines = [f"{path}: {problem}" for path in paths for problem in problems(path)]
    print("\n".join(lines), file=sys.stderr)
    sys.exit(1 if lines else 0)
