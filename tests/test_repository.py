"""The files around the book agree: address, versions, citation, workflows; and the address can be changed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nnlib import chapter

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "workflow"))

import address  # noqa: E402

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
NOTEBOOKS = sorted((ROOT / "book").glob("*/*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY, SITE = PROJECT["urls"]["Repository"], PROJECT["urls"]["Documentation"]
EXTRAS = PROJECT["optional-dependencies"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# The address


def test_the_address_is_one_of_a_repository_and_of_its_site():
    assert address.parse(REPOSITORY, SITE) == (REPOSITORY, SITE)


def test_every_place_that_is_derived_from_the_address_agrees_with_it():
    config, citation = yaml.safe_load(read("_config.yml")), yaml.safe_load(read("CITATION.cff"))
    assert config["repository"]["url"] == REPOSITORY
    assert config["html"]["baseurl"].rstrip("/") == SITE
    assert (citation["repository-code"], citation["url"]) == (REPOSITORY, SITE)
    assert REPOSITORY in read("README.md") and SITE in read("README.md")
    assert (chapter.address("Repository"), chapter.address("Documentation")) == (REPOSITORY, SITE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_in_the_outputs_of_a_chapter_agree_with_the_address(path):
    outputs = json.dumps([cell.get("outputs") for cell in json.loads(read(path))["cells"]])
    for link in re.findall(r"https://[^\s)\"\\]+(?:/api/|/blob/main/)[^\s)\"\\]+", outputs):
        assert link.startswith((f"{SITE}/api/", f"{REPOSITORY}/blob/main/nnlib/"))


@pytest.fixture
def copy(tmp_path):
    """A copy of the checkout's files, in a repository of its own."""
    for path in address.tracked(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def texts(root):
    return {path: path.read_bytes() for path in address.tracked(root)}


# Put together here: an address that stands in this file would be taken back to the old one, too.
ELSEWHERE = [
    ("/".join(["https://github.com", "some-one", "a.book"]), ""),
    (
        "/".join(["https://git.example.org", "team", "book-2"]),
        ".".join(["https://papers", "example", "org"]),
    ),
]


@pytest.mark.parametrize("url, site", ELSEWHERE, ids=["github", "elsewhere"])
def test_a_new_address_is_taken_everywhere_and_can_be_taken_back(copy, url, site):
    before, (old_url, old_site) = texts(copy), address.current(copy)
    changed = address.apply(copy, url, site)
    new_url, new_site = address.current(copy)
    assert new_url == url and new_site == (site or address.parse(url)[1])
    for name in ("pyproject.toml", "_config.yml", "README.md", "CITATION.cff"):
        assert copy / name in changed
    left = [
        path
        for path, text in texts(copy).items()
        for old in (old_url, old_site)
        if old[8:].encode() in text
    ]
    assert left == []
    assert all(f"/{old_url.split('/', 3)[3]}".encode() not in text for text in texts(copy).values())
    address.apply(copy, old_url, old_site)
    assert texts(copy) == before


def test_the_address_is_found_in_every_way_it_is_written_and_other_addresses_stay():
    old, new = (
        address.parse("https://github.com/me/book"),
        address.parse("https://github.com/you/pages"),
    )
    text = """git+https://github.com/me/book https://github.com/me/book.git git@github.com/me/book
    https://colab.research.google.com/github/me/book/blob/main/a.ipynb https://mybinder.org/v2/gh/me/book/main
    https://me.github.io/book/a.html me.github.io/book. See https://github.com/me/book."""
    moved = address.rewrite(text, old, new)
    assert "me/book" not in moved and "me.github.io" not in moved
    assert moved.count("you/pages") == 6 and moved.count("you.github.io/pages") == 2
    assert address.rewrite(moved, new, old) == text
    others = "https://github.com/me/bookshop https://github.com/me/book-2 https://github.com/me/book.js some/book"
    assert address.rewrite(others, old, new) == others


@pytest.mark.parametrize(
    "url",
    [
        "",
        "github.com/me/book",
        "http://github.com/me/book",
        "https://github.com/me",
        "https://github.com/me/book/tree/main",
        "https://github.com/me/my book",
        "https://github.com/me/book?tab=readme",
        "https://user:secret@github.com/me/book",
        "https://github.com/me/'; rm -rf book",
        "ssh://git@github.com/me/book",
    ],
)
def test_what_is_no_address_is_refused_with_a_sentence_and_changes_nothing(url, copy):
    before = texts(copy)
    command = [sys.executable, copy / "workflow/address.py", url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy)
    assert (
        done.returncode == 1
        and "Nothing was changed" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "make address URL=https://github.com/you/your-book" in done.stderr
    assert texts(copy) == before


def test_another_host_has_to_say_where_its_pages_are():
    with pytest.raises(ValueError, match=r"say where git\.example\.org publishes the pages"):
        address.parse("https://git.example.org/me/book")
    for site in ("https://git.example.org/me/book", "book.example.org", "http://book.example.org"):
        with pytest.raises(ValueError, match="is no address of a site of its own"):
            address.parse("https://git.example.org/me/book", site)


@pytest.mark.parametrize("end", ["", "/", ".git", ".git/"])
def test_ways_to_end_an_address_are_the_same(end):
    assert address.parse(f"https://github.com/me/book{end}")[0] == "https://github.com/me/book"


# Versions


def pins():
    lines = [line.split("#")[0].strip() for line in read("constraints.txt").splitlines()]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def test_every_package_that_is_asked_for_is_pinned_within_its_range():
    for line in PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra]:
        wanted = Requirement(line)
        assert canonicalize_name(wanted.name) in pins(), (
            f"constraints.txt does not pin {wanted.name}"
        )
        assert wanted.specifier.contains(
            pins()[canonicalize_name(wanted.name)], prereleases=True
        ), line


def test_a_pin_names_a_version_that_every_machine_can_get():
    for name, version in pins().items():
        assert re.fullmatch(r"[\w.]+", version), (
            f"{name}=={version}: no build of one machine, no path"
        )


def test_the_conda_environment_takes_the_same_versions():
    wanted = yaml.safe_load(read("environment.yml"))["dependencies"]
    (pip,) = (entry["pip"] for entry in wanted if isinstance(entry, dict))
    assert "-c constraints.txt" in pip
    (install,) = (line for line in pip if line.startswith("-e "))
    assert set(re.search(r"\[(.*)\]", install)[1].split(",")) <= EXTRAS.keys()
    (python,) = (
        entry for entry in wanted if isinstance(entry, str) and entry.startswith("python=")
    )
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    for entry in wanted:
        if (
            isinstance(entry, str)
            and "=" in entry
            and canonicalize_name(entry.split("=")[0]) in pins()
        ):
            assert pins()[canonicalize_name(entry.split("=")[0])].startswith(entry.split("=")[-1])


# Citation


def test_the_citation_is_valid_and_names_this_version():
    validate("vendor.citation-file-format", ROOT / "CITATION.cff")
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]


# Workflows


def validate(schema, *files):
    """Check files against a schema that comes with check-jsonschema; no network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def steps(path):
    return [step for job in yaml.safe_load(read(path))["jobs"].values() for step in job["steps"]]


def test_there_are_the_four_workflows_and_they_are_valid():
    assert [path.stem for path in WORKFLOWS] == ["gpu", "publish", "scheduled", "test"]
    validate("vendor.github-workflows", *WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
class TestWorkflow:
    def test_scripts_stop_at_the_first_error(self, path):
        for script in (step["run"].strip() for step in steps(path) if "run" in step):
            assert "\n" not in script or script.startswith("set -euo pipefail\n"), script
            assert (
                subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr
                == ""
            )

    def test_scripts_take_values_from_the_environment_and_not_by_insertion(self, path):
        assert not [step["run"] for step in steps(path) if "${{" in step.get("run", "")]

    def test_permissions_are_stated_and_minimal(self, path):
        content = yaml.safe_load(read(path))
        assert content["permissions"] == {"contents": "read"}
        more = {
            name: job["permissions"]
            for name, job in content["jobs"].items()
            if "permissions" in job
        }
        allowed = {
            "deploy": {"pages": "write", "id-token": "write"},
            "release": {"contents": "write"},
            "report": {"issues": "write"},
        }
        assert all(allowed.get(name) == permissions for name, permissions in more.items())

    def test_actions_are_pinned_by_commit_beside_their_version(self, path):
        used = re.findall(r"uses: *(.*)", read(path))
        assert used
        for line in used:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line

    def test_every_job_has_a_time_limit(self, path):
        assert all("timeout-minutes" in job for job in yaml.safe_load(read(path))["jobs"].values())

    def test_make_targets_and_scripts_exist(self, path):
        targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
        for script in (step.get("run", "") for step in steps(path)):
            assert set(re.findall(r"\bmake ([a-z-]+)", script)) <= targets
            assert all(
                (ROOT / name).is_file() for name in re.findall(r"\b(workflow/\w+\.py)\b", script)
            )


def test_one_version_of_an_action_is_used_everywhere():
    used = {
        tuple(line.split("@"))
        for path in WORKFLOWS
        for line in re.findall(r"uses: *(.*)", read(path))
    }
    assert len({name for name, _ in used}) == len(used)


def test_the_oldest_torch_and_python_that_are_promised_are_tested():
    matrix = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["library"]["strategy"][
        "matrix"
    ]["include"]
    (torch,) = (
        Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == "torch"
    )
    oldest = matrix[0]
    assert f"torch{oldest['torch']}" == f"torch=={str(torch.specifier).removeprefix('>=')}.*"
    assert f">={oldest['python']}" == PROJECT["requires-python"]


# Notebooks and hooks


def test_the_hooks_are_valid_and_need_no_network():
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", ROOT / ".pre-commit-config.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [repo["repo"] for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]] == [
        "local"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_written_as_make_outputs_writes_it(path):
    nbformat = pytest.importorskip("nbformat")
    outputs = pytest.importorskip("outputs")  # workflow/outputs.py
    stored = nbformat.read(path, as_version=4)
    clean = outputs.clean(nbformat.read(path, as_version=4), stored)
    assert nbformat.writes(clean) + "\n" == read(path)
