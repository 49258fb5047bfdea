"""Small tables for notebooks. Every text is escaped: names and errors come from files of others."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

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
