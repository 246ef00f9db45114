"""Give the book its own address: `address.py URL [SITE]` rewrites pyproject.toml and everything derived from it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"


def parse(url: str, site: str = "") -> tuple[str, str]:
    """The addresses of the repository and of its pages.

    Parameters
    ----------
    url : ``https://HOST/OWNER/NAME``, with or without ``.git`` or a slash at its end.
    site : where the pages are published; for github.com it follows from `url`.

    Raises
    ------
    ValueError : not such an address, or no `site` for a host whose pages' address is not known.
    """
    url = url.strip().removesuffix("/").removesuffix(".git")
    match = re.fullmatch(rf"https://([a-z0-9.-]+\.[a-z]+)/({NAME})/({NAME})", url)
    if not match:
        raise ValueError(
            f"{url!r} is no repository's address; write make address URL=https://github.com/you/your-book"
        )
    host, owner, name = match.groups()
    if not site and host != "github.com":
        raise ValueError(
            f"say where {host} publishes the pages: make address URL={url} SITE=https://..."
        )
    site = (site.strip() or f"https://{owner}.github.io/{name}").removesuffix("/")
    if not re.fullmatch(r"https://[A-Za-z0-9.-]+\.[a-z]+(/[\w./-]+)?", site) or site == url:
        raise ValueError(
            f"{site!r} is no address of a site of its own, such as https://you.github.io/your-book"
        )
    return url, site


def current(root: Path) -> tuple[str, str]:
    """The two addresses in pyproject.toml."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"], urls["Documentation"]


def rewrite(text: str, old: tuple[str, str], new: tuple[str, str]) -> str:
    """The text with the old repository and site replaced by the new ones, in every way they are written.

    A repository also appears without its host, behind a slash (Colab, Binder, badges), and a site without its scheme.
    """
    repositories, sites = ([urlsplit(pair[i]) for pair in (old, new)] for i in (0, 1))
    changes = [(old[1], new[1]), (old[0], new[0])]
    changes += [
        (pair[0].netloc + pair[0].path, pair[1].netloc + pair[1].path)
        for pair in (sites, repositories)
    ]
    changes += [(repositories[0].path, repositories[1].path)]
    end = r"(?![\w-]|\.(?!git\b)\w)"  # the name goes on: another repository
    pattern = "|".join(re.escape(before) + end for before, _ in changes)
    return re.sub(pattern, lambda found: dict(changes)[found[0]], text)


def tracked(root: Path) -> list[Path]:
    """The files that belong to the checkout."""
    command = [
        "git",
        "-C",
        str(root),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [
        root / name
        for name in names
        if name and (root / name).is_file() and not (root / name).is_symlink()
    ]


def apply(root: Path, url: str, site: str = "") -> list[Path]:
    """Rewrite every text file of the checkout that names the old address; returns those that changed."""
    old, new = current(root), parse(url, site)
    changed = []
    for path in tracked(root):
        try:
            before = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        if (after := rewrite(before, old, new)) != before:
            path.write_bytes(after.encode("utf-8"))
            changed.append(path)
    return changed


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    try:
        found = apply(here, *sys.argv[1:3]) if len(sys.argv) > 1 else parse("")
    except ValueError as error:
        sys.exit(f"Nothing was changed: {error}.")
    print("\n".join(str(path.relative_to(here)) for path in found))
    print(f"{len(found)} files now name {current(here)[0]} and {current(here)[1]}.")
    if found:
        print(
            "Install the library anew, so that links in outputs follow: pip install -e . (make does it by itself)."
        )
