"""Tables that fit the screen: columns that say least are hidden first, words break where they may, and no figure or name is cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from reelquant._errors import printable

_BREAK = re.compile(r"(?<=\s)(?=\S)|(?<=\|)(?=\w)|(?<=\D\.)(?=\w)|(?<=\.)(?=[^\W\d])")  # between words, parts of a name, alternatives
LEAST = 12  # columns that words get where a screen is too narrow for the longest of them


class Plain(Table):
    """A table whose cells, title and caption are texts as they are: names of files and layers may look like markup.

    Attributes:
        hides: headings of the columns that go where the screen is too narrow, the first of them first.
    """

    def __init__(self, title: str, **options: Any) -> None:
        super().__init__(title=Text(printable(title)), pad_edge=False, **options)
        self.hides: tuple[str, ...] = ()
        self.title_justify = self.caption_justify = "left"
        self.title_style, self.caption_style = "bold", "dim"

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; a cell with markup of ours comes as :func:`reelquant.cli.console.marked`."""
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table as it fits."""
        yield from Table.__rich_console__(self.fitted(options.max_width), console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Of the table as it fits."""
        return Table.__rich_measure__(self.fitted(options.max_width), console, options)

    def fitted(self, width: int) -> Table:
        """The table that fits into so many columns of the screen."""
        kept, hidden = self._kept(width)
        needs, wants, firm = zip(*((self._need(number), self._want(number), self.columns[number].no_wrap) for number in kept), strict=True)
        widths = share(needs, wants, firm, width - self._gaps(len(kept)))
        made = Table(box=self.box, show_header=self.show_header, padding=self.padding, pad_edge=False)
        across = sum(widths) + self._gaps(len(kept))
        made.title, made.caption = _annotation(self.title, across), _annotation(_caption(self.caption, hidden), across)
        for name in ("title_justify", "title_style", "caption_justify", "caption_style"):
            setattr(made, name, getattr(self, name))
        for number, size in zip(kept, widths, strict=True):
            column = self.columns[number]
            made.add_column(folded(_text(column.header), size), justify=column.justify, style=column.style, no_wrap=True, width=size)
        cells = [list(column.cells) for column in self.columns]
        for place, row in enumerate(self.rows):
            words = (folded(_text(cells[number][place]), size) for number, size in zip(kept, widths, strict=True))
            made.add_row(*words, end_section=row.end_section)
        return made

    def _kept(self, width: int) -> tuple[list[int], list[str]]:
        """Numbers of the columns that are shown, and headings of those that are not."""
        kept, hidden = list(range(len(self.columns))), []
        for heading in self.hides:
            if sum(map(self._need, kept)) + self._gaps(len(kept)) <= width:
                break
            for number in [number for number in kept if _text(self.columns[number].header).plain == heading]:
                kept.remove(number)
                hidden.append(heading)
        return kept, hidden

    def _need(self, number: int) -> int:
        """The narrowest that breaks nothing: a whole figure, or the longest piece of the words."""
        column = self.columns[number]
        words = [_text(column.header).plain, *(() if column.no_wrap else (_text(cell).plain for cell in column.cells))]
        figures = (cell_len(_text(cell).plain) for cell in column.cells) if column.no_wrap else ()
        pieces = (cell_len(piece.rstrip()) for text in words for piece in _BREAK.split(text))
        return max((*figures, *pieces), default=0)

    def _want(self, number: int) -> int:
        """The widest that is of use."""
        column = self.columns[number]
        lines = (line for cell in (column.header, *column.cells) for line in _text(cell).plain.split("\n"))
        return max((cell_len(line) for line in lines), default=0)

    def _gaps(self, count: int) -> int:
        """Columns of the screen between and around so many columns of the table."""
        return 2 * (count - 1) if self.box is None else 3 * (count - 1) + 2


def table(title: str, left: Sequence[str], right: Sequence[str] = (), hides: Sequence[str] = ()) -> Plain:
    """An empty table; ``left`` columns hold words, ``right`` ones figures, which are never cut. ``hides`` go in turn where it is wide."""
    made = Plain(title, box=box.SIMPLE_HEAD)
    made.hides = tuple(hides)
    for name in left:
        made.add_column(Text(printable(name)))
    for name in right:
        made.add_column(Text(printable(name)), justify="right", no_wrap=True)
    return made


def facts(title: str, rows: Sequence[tuple[str, str | Text]]) -> Plain:
    """Names and values in two columns."""
    made = Plain(title, box=None, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim")
    made.add_column()
    for row in rows:
        made.add_row(*row)
    return made


def share(needs: Sequence[int], wants: Sequence[int], firm: Sequence[bool], room: int) -> list[int]:
    """Widths of columns: what each needs, and the rest to the narrowest until it has what it wants.

    Where the needs have no room, the widest that are not firm give way, down to :data:`LEAST`.
    """
    widths = list(needs)
    loose = [number for number in range(len(widths)) if not firm[number]]
    while sum(widths) > room and loose and widths[widest := max(loose, key=widths.__getitem__)] > LEAST:
        widths[widest] -= 1
    for _ in range(room - sum(widths)):
        growing = [number for number, width in enumerate(widths) if width < wants[number]]
        if not growing:
            break
        widths[min(growing, key=lambda number: widths[number])] += 1
    return widths


def folded(text: Text, width: int) -> Text:
    """The text in lines of a width, broken between words and behind the dots of a name; elsewhere only if there is no other way."""
    lines = (line for whole in text.split("\n", allow_blank=True) for line in whole.divide(_ends(whole.plain, max(width, 1))))
    found = []
    for line in lines:
        line.rstrip()
        found.append(line)
    return Text("\n").join(found)


def _ends(line: str, width: int) -> list[int]:
    """Where a line breaks, as numbers of characters."""
    ends, start, end = list[int](), 0, 0
    for piece in _pieces(_BREAK.split(line), width):
        if end > start and cell_len(line[start:end] + piece.rstrip()) > width:
            ends.append(end)
            start = end
        end += len(piece)
    return ends


def _pieces(words: Iterable[str], width: int) -> Iterable[str]:
    """The words; what is longer than a line in parts that are not."""
    for word in words:
        while cell_len(word.rstrip()) > width:
            count = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or cell_len(word[:n]) <= width))
            yield word[:count]
            word = word[count:]
        yield word


def _caption(caption: Any, hidden: Sequence[str]) -> str:
    """The caption of a table and what is hidden of it."""
    gone = [f"hidden at this width: {', '.join(hidden)} (a wider terminal or --json shows all)"] if hidden else []
    return "\n".join([*([str(caption)] if caption else []), *gone])


def _annotation(text: Any, width: int) -> Text | None:
    return folded(_text(text), width) if text else None


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(str(cell)))
