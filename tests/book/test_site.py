"""The built pages: what a reader clicks works, every link leads somewhere, and nothing comes from another host."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from conftest import ROOT, unavailable

HERE = "http://here/"
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
FORMULA = r"\$[^$\n]+\$|\\\(|\\\[|\\begin\{"
# The article's text without code, and what is broken in it.
INSPECT = """async () => {
    if (window.MathJax) await MathJax.startup.promise;
    const article = document.querySelector('article') ?? document.body;
    const images = [...document.images];
    images.forEach(image => image.loading = 'eager');
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode())
        if (!walker.currentNode.parentElement.closest('pre, code, script, style, mjx-container'))
            texts.push(walker.currentNode.data);
    return {
        text: texts.join('\\n'),
        errors: [...document.querySelectorAll('mjx-merror')].map(e => e.textContent),
        raw: [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length,
        broken: images.filter(image => !image.naturalWidth).map(image => image.src),
        width: document.documentElement.scrollWidth,
    };
}"""


class Page(HTMLParser):
    """What the tests need to know of a page: its anchors, links and what it loads."""

    def __init__(self, site: Path, name: str) -> None:
        super().__init__()
        self.name, self.ids, self.links, self.loads = name, set(), [], []
        self.meta: dict[str, str] = {}
        self.feed((site / name).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect."""
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag in LOADS and found.get(LOADS[tag]):
            self.loads.append((tag, found[LOADS[tag]]))
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loads.append((tag, found["href"]))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "meta":
            self.meta[found.get("name") or found.get("property") or ""] = found.get("content") or ""

    def inside(self, link: str) -> tuple[str, str] | None:
        """Path and anchor of a link that stays in the site, None of one that leaves it."""
        parts = urlsplit(urljoin(HERE + self.name, link))
        return (
            (unquote(parts.path[1:]), unquote(parts.fragment)) if parts.netloc == "here" else None
        )


@pytest.fixture(scope="module")
def pages(site):
    files = [p.relative_to(site) for p in site.rglob("*.html")]
    return {
        n: Page(site, n)
        for n in sorted(f.as_posix() for f in files if not f.parts[0].startswith("_"))
    }


@pytest.fixture(scope="module")
def chapters():
    """The chapters in `_toc.yml`."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    files = [
        s["file"]
        for part in parts
        for entry in part["chapters"]
        for s in [entry, *entry.get("sections", [])]
    ]
    found = [file for file in files if (ROOT / f"book/{file}.ipynb").exists()]
    return found or unavailable("no chapter is written yet")


@pytest.fixture
def tab(browser, served):
    """A page in a fresh browser context, 1400 pixels wide."""
    context = browser.new_context(
        viewport={"width": 1400, "height": 900}, color_scheme="light", base_url=served
    )
    yield context.new_page()
    context.close()


def test_the_site_has_the_pages_of_the_table_of_contents(pages, chapters):
    assert {
        "index.html",
        "scoreboard.html",
        "runtimes.html",
        "glossary.html",
        "api/index.html",
    } <= pages.keys()
    assert {f"{name}.html" for name in chapters} <= pages.keys()


def test_every_internal_link_leads_to_a_page_and_an_anchor(site, pages):
    dead = []
    for page in pages.values():
        for link in {*page.links, *(address for _, address in page.loads)}:
            if link.startswith(("data:", "mailto:")) or (target := page.inside(link)) is None:
                continue
            path, anchor = target
            path = path or "index.html"
            there = (site / path).is_file()
            if not there or (anchor and path in pages and anchor not in pages[path].ids):
                dead.append(f"{page.name}: {link}")
    assert not dead


def test_pages_name_no_file_of_another_host(pages):
    loads = [(page.name, link) for page in pages.values() for _, link in page.loads]
    assert not [(name, link) for name, link in loads if urlsplit(link).scheme in ("http", "https")]


def test_pages_stay_under_a_megabyte(site, pages):
    for page in pages.values():
        own = {
            page.inside(link)[0] for tag, link in page.loads if tag == "img" and page.inside(link)
        }
        size = sum((site / path).stat().st_size for path in own) + (site / page.name).stat().st_size
        assert size < 1_000_000, f"{page.name} with its images has {size} bytes"


def test_every_page_of_the_book_has_a_description(pages, chapters):
    for name in ["index", "scoreboard", *chapters]:
        meta = pages[f"{name}.html"].meta
        assert (
            meta["description"]
            and meta["og:description"]
            and meta["og:image"].startswith("https://")
        ), name


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 390)])
def test_every_page_in_the_browser(browser, served, pages, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, problems, name = context.new_page(), [], ""

    def elsewhere(route):
        problems.append(f"{name}: asks for {route.request.url}")
        route.abort()

    def note(kind, text):
        problems.append(f"{name}: {kind} {text}")

    context.route(lambda url: not url.startswith((served, "data:", "blob:")), elsewhere)
    tab.on("console", lambda message: message.type == "error" and note("console", message.text))
    tab.on("pageerror", lambda error: note("script", error))
    tab.on("response", lambda answer: answer.status >= 400 and note(answer.status, answer.url))
    for name in pages:
        tab.goto(served + name)
        seen = tab.evaluate(INSPECT)
        problems += [f"{name}: formula {error}" for error in seen["errors"]]
        problems += [
            f"{name}: formula not rendered: {text}" for text in re.findall(FORMULA, seen["text"])
        ]
        problems += [f"{name}: {seen['raw']} formulas not rendered"] * bool(seen["raw"])
        problems += [f"{name}: broken picture {source}" for source in seen["broken"]]
        problems += [f"{name}: {seen['width']} pixels wide"] * (seen["width"] > width)
    context.close()
    assert not problems


def test_search_finds_a_word_and_there_is_one_search_box(tab):
    tab.goto("index.html")
    boxes = tab.locator(
        ".search-button-field:visible, .search-button:visible, form.bd-search:visible"
    )
    assert boxes.count() == 1
    boxes.click()
    tab.locator("#pst-search-dialog input[type=search]").fill("kernel")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=kernel*")
    first = tab.locator("#search-results ul.search li a").first
    first.wait_for()
    first.click()
    assert "kernel" in tab.locator("article").inner_text().lower()


def test_theme_switch_changes_the_ground_and_is_remembered(tab):
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.goto("index.html")
    seen = {tab.evaluate(ground)}
    for _ in range(2):
        tab.locator(".theme-switch-button:visible").click()
        seen.add(tab.evaluate(ground))
    assert len(seen) == 2
    kept = tab.evaluate("document.documentElement.dataset.mode")
    tab.goto("scoreboard.html")
    assert tab.evaluate("document.documentElement.dataset.mode") == kept != "auto"


def test_solutions_are_closed_and_open_on_a_click(tab, chapters):
    for name in chapters:
        tab.goto(f"{name}.html")
        solutions = tab.locator(".solution.dropdown")
        assert solutions.count(), f"{name} has no solution in a dropdown"
        inner = solutions.first.locator(".solution-content, section").first
        assert not inner.is_visible()
        solutions.first.locator(".toggle-button").first.click()
        inner.wait_for(state="visible")


def test_launch_buttons_lead_to_the_notebook(tab, chapters):
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    repository = urls["Repository"].removeprefix("https://github.com/")
    for name in chapters:
        tab.goto(f"{name}.html")
        tab.locator(".dropdown-launch-buttons > button").hover()
        links = tab.locator(".dropdown-launch-buttons a:visible")
        assert {link.get_attribute("href") for link in links.all()} == {
            f"https://colab.research.google.com/github/{repository}/blob/main/book/{name}.ipynb",
            f"https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/book/{name}.ipynb",
        }
