"""Links to files of the repository: what they point at becomes a page of the site, which is whole without the checkout.

A link is written as in the repository, relative to the file it stands in, so that it works on a code host, too. One to
a file from which a page is generated, such as a method's, becomes one to that page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

LINK = re.compile(r"(\]\(|<img src=\")([^()\s#\"]+)(#[^()\s\"]*)?(\)|\")")
FILES = "files"
"""The folder of the site where these pages lie."""
GENERATED = {
    "docs/first_student.ipynb": "start/notebook.md",
    "stepdistill/methods/__init__.py": "methods/index.md",
    "stepdistill/recipes/recipe.py": "reference/recipe.md",
    "stepdistill/evaluation/suite.py": "reference/suite.md",
    "stepdistill/evaluation/evaluate.py": "reference/python.md",
    "stepdistill/training/run_report.py": "reference/python.md",
}
"""A file of the repository, and the page that is generated from it; those of methods are found by their names."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".json": "json", ".cfg": "ini"}


def uri_of(path: PurePosixPath) -> str:
    """Where a file of the repository lies in the site, below docs/."""
    if path.is_relative_to("docs"):
        return str(path.relative_to("docs"))
    return f"{FILES}/{path}" + ("" if path.suffix in (".md", ".png") else ".md")


def generated_from(path: PurePosixPath, uri: str) -> str | None:
    """The page that a page's link to a file is led to in its place; generated pages show their sources themselves."""
    if uri in GENERATED.values() or uri.startswith("methods/"):
        return None
    if path.parent == PurePosixPath("stepdistill/methods") and not path.stem.startswith("_"):
        return f"methods/{path.stem}.md"
    return GENERATED.get(str(path))


def place_of(uri: str) -> PurePosixPath:
    """Where a page of the site lies in the repository."""
    if not uri.startswith(f"{FILES}/"):
        return PurePosixPath("docs", uri)
    path = PurePosixPath(uri).relative_to(FILES)
    return path if path.suffix != ".md" or not PurePosixPath(path.stem).suffix else path.with_suffix("")


def outside_fences(text: str) -> Iterator[tuple[bool, str]]:
    """The lines of a page, each with whether it is prose rather than code."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = re.match(r"\s*(`{3,})", line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark[1]
            yield False, line
        else:
            yield not fence, line


def links(text: str, uri: str) -> Iterator[PurePosixPath]:
    """The places in the repository that a page links to."""
    for prose, line in outside_fences(text):
        for found in LINK.finditer(line) if prose else ():
            if "://" not in found[2] and not found[2].startswith("mailto:"):
                yield PurePosixPath(posixpath.normpath(place_of(uri).parent / found[2]))


def linked(root: Path, pages: Mapping[str, str], always: Iterable[str]) -> list[PurePosixPath]:
    """Files outside docs/ that the pages link to, and those that these link to.

    Raises:
        FileNotFoundError: a link leads to nothing in the repository.
    """
    found: dict[PurePosixPath, None] = {}
    waiting = [(PurePosixPath(path), "mkdocs.yml") for path in always]
    waiting += [
        (path, uri)
        for uri, text in pages.items()
        for path in links(text, uri)
        if generated_from(path, uri) is None
    ]
    while waiting:
        path, source = waiting.pop()
        if path in found or path.is_relative_to("docs"):
            continue
        if not (root / path).is_file():
            raise FileNotFoundError(f"{source} links to {path}, which is no file of the repository")
        found[path] = None
        if path.suffix == ".md":
            uri = uri_of(path)
            waiting += [
                (target, str(path))
                for target in links((root / path).read_text("utf-8"), uri)
                if generated_from(target, uri) is None
            ]
    return sorted(found)


def page(root: Path, path: PurePosixPath) -> str:
    """A file of the repository as a page: Markdown as it is, anything else as code under its name."""
    text = (root / path).read_text("utf-8")
    if path.suffix == ".md":
        return text
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    return f"{hidden}# {path.name}\n\n`{path}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"


def relinked(text: str, uri: str) -> str:
    """The page with its links between places in the repository turned into links between pages of the site."""

    def moved(found: re.Match[str]) -> str:
        if "://" in found[2] or found[2].startswith("mailto:"):
            return found[0]
        path = PurePosixPath(posixpath.normpath(place_of(uri).parent / found[2]))
        target = generated_from(path, uri) or uri_of(path)
        return (
            f"{found[1]}{posixpath.relpath(target, posixpath.dirname(uri) or '.')}{found[3] or ''}{found[4]}"
        )

    return "".join(LINK.sub(moved, line) if prose else line for prose, line in outside_fences(text))
