"""Hooks of MkDocs: the start page is the README, and pages may link to results and other files outside of ``docs/``.

On disk, and where a repository is browsed, such links are relative paths. In the site, the files of :data:`OUTSIDE` are below
``repository/``, and every relative link is led there. A link to a file that the site does not have (sources, tables in CSV) stays as
words; one to a file that does not exist is left alone, so a strict build fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs"
HOME = "README.md"
OUTSIDE = (
    "examples/*.*",
    "benchmarks/*.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "training/*.md",
    "training/**/*.png",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
BELOW = "repository"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_REMOTE = re.compile(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>~?([\w.]+?)(?:\(\))?</code>")


def uri_of(path: str) -> str | None:
    """The place in the site of a file of the repository, given by its path; None if it is not in the site."""
    if path == HOME:
        return "index.md"
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/") if (ROOT / path).is_file() else None
    return f"{BELOW}/{path}" if any((ROOT / path).match(str(ROOT / pattern)) for pattern in _flat()) and (ROOT / path).is_file() else None


def path_of(uri: str) -> str:
    """The path in the repository of a page of the site."""
    if uri == "index.md":
        return HOME
    return uri.removeprefix(f"{BELOW}/") if uri.startswith(f"{BELOW}/") else f"{DOCS}/{uri}"


def _flat() -> list[str]:
    """:data:`OUTSIDE` for ``Path.match``, which knows no ``**`` before Python 3.13."""
    return [made for pattern in OUTSIDE for made in (pattern, pattern.replace("**/", ""), pattern.replace("**/", "*/"))]


def led(markdown: str, uri: str) -> str:
    """The text of a page with every relative link led to a page of the site.

    Args:
        markdown: the text.
        uri: of the page.
    """
    here = posixpath.dirname(path_of(uri))

    def lead(found: re.Match[str]) -> str:
        picture, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        if ":" in target or target.startswith("/"):
            return found[0]
        path = posixpath.normpath(posixpath.join(here, target))
        place = uri_of(path)
        if place is not None:
            return f"{picture}[{words}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor})"
        return words if (ROOT / path).exists() and not picture else found[0]

    return _LINK.sub(lead, markdown)


def on_files(files: Files, config: Any) -> Files:
    """Add the README and what lies outside of ``docs/``."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / HOME)))
    for path in sorted({path for pattern in OUTSIDE for path in ROOT.glob(pattern)}):
        place = f"{BELOW}/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links of a page."""
    return led(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Roles that docstrings use (``:func:`quantize```) become code, and a link where the page has that name."""

    def show(found: re.Match[str]) -> str:
        name = found[1]
        place = next((one for one in (name, f"reelquant.{name}") if f'id="{one}"' in html), None)
        words = f"<code>{name.removeprefix('reelquant.')}</code>"
        return words if place is None else f'<a href="#{place}">{words}</a>'

    return _ROLE.sub(show, html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would fetch something from elsewhere when it is read."""
    if found := _REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch from elsewhere: {found[0]:.200}")
    return output
