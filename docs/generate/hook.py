"""What mkdocs calls while it builds the site: generated pages go in, links to files of the repository become pages.

`mkdocs build --strict` needs an installed stepdistill, as the reference is read from its code.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import method_pages
import notebook
import reference_pages
import repository_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

from stepdistill.system.shipped import method_names

ROOT = Path(__file__).resolve().parents[2]
LOG = logging.getLogger("mkdocs.hooks.generate")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(https?:[^\"]+)\"")
ALWAYS = ("CHANGELOG.md", "LOG.md", "eval/bench/README.md")
"""Files of the repository that are in the navigation."""


def generated() -> dict[str, str]:
    """All generated pages: path below docs/ -> Markdown."""
    return {
        **reference_pages.pages(),
        **method_pages.pages(ROOT),
        "start/notebook.md": notebook.page(ROOT / "docs" / "first_student.ipynb"),
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the page of every method into the navigation."""
    nav: list[dict[str, Any]] = config.nav or []
    for entry in nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *(f"methods/{name}.md" for name in method_names())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and every file of the repository that some page links to."""
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    made = generated()
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for path in repository_pages.linked(ROOT, pages | made, ALWAYS):
        uri = repository_pages.uri_of(path)
        level = InclusionLevel.UNDEFINED if str(path) in ALWAYS else InclusionLevel.NOT_IN_NAV
        if path.suffix == ".png":
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
        else:
            files.append(
                File.generated(config, uri, content=repository_pages.page(ROOT, path), inclusion=level)
            )
    return files


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:
    """Warns, which ends a strict build, of what a browser would fetch from elsewhere."""
    for found in FETCHED.findall(output):
        LOG.warning("%s fetches %s", page.file.src_uri, found)
    return output


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turns links between places in the repository into links between pages of the site."""
    return repository_pages.relinked(markdown, page.file.src_uri)
