"""Texts of others inside of HTML and Markdown, and small tables for notebooks. Names and errors come from files: every text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from reelquant._errors import printable


def table(title: str, rows: Iterable[Sequence[object]], head: Sequence[str] = (), notes: Iterable[str] = ()) -> str:
    """A table with a caption, and lines of text below it."""
    top = f"<thead><tr>{_cells('th', head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    below = "".join(f"<p>{_safe(note)}</p>" for note in notes)
    return f'<table><caption style="text-align:left">{_safe(title)}</caption>{top}<tbody>{body}</tbody></table>{below}'


def _cells(tag: str, texts: Iterable[object]) -> str:
    return "".join(f'<{tag} style="text-align:left">{_safe(text)}</{tag}>' for text in texts)


def _safe(text: object) -> str:
    return html.escape(printable(str(text)))


def escaped(text: Any) -> str:
    """Text that Markdown, and whatever makes HTML of it, shows as it is, on one line."""
    words = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(printable(str(text)).split()))
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
