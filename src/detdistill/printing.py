"""Layouts for terminals and pipes: prose wraps between words; names, paths and numbers are never cut or broken.

All functions print to a rich console and use its width: the terminal's, the environment variable ``COLUMNS``, or 80. Rich
omits colours if the output is not a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text


def stdout() -> Console:
    """The console for results of commands; progress and notes go to stderr (``progress.Progress``)."""
    return Console(highlight=False)


def wrap(text: str | Text, width: int) -> list[Text]:
    """Break text between words into lines of at most ``width`` columns; styles are kept.

    A word wider than ``width`` (a path, a model string) gets a line of its own and is not broken. A command in backquotes is
    broken only if it is wider than ``width``, so that it can be copied.

    >>> [str(line) for line in wrap("for runs/fcos/with/a/teacher run `detdistill recipes`", 21)]
    ['for', 'runs/fcos/with/a/teacher', 'run', '`detdistill recipes`']
    """
    text = Text(text.replace("\n", " ")) if isinstance(text, str) else text
    begin, breaks = 0, []
    for first, last in _words(text.plain, width):
        if first > begin and cell_len(text.plain[begin:last]) > width:
            breaks.append(first)
            begin = first
    lines = list(text.divide(breaks))
    for found in lines:
        found.rstrip()
    return lines


def _words(text: str, width: int) -> Iterator[tuple[int, int]]:
    """First and last index of each piece of text that must not be broken."""
    for found in re.finditer(r"(?:`[^`]*`|\S)+", text):
        if cell_len(found[0]) <= width:
            yield found.span()
        else:
            yield from ((found.start() + word.start(), found.start() + word.end()) for word in re.finditer(r"\S+", found[0]))


def line(console: Console, *parts: str | Text) -> None:
    """Print one line without wrapping, however long it is."""
    whole = Text.assemble(*parts)
    whole.rstrip()
    console.print(whole, soft_wrap=True, highlight=False)


def labelled(console: Console, label: str, name: str) -> None:
    """Print a name (a path, a model string) unbroken: beside its label, or below the label if the line is too short."""
    if cell_len(f"{label} {name}") <= console.width:
        line(console, f"{label} {name}")
    else:
        line(console, label)
        line(console, name)


def paragraph(console: Console, text: str | Text, first: str | Text = "", indent: int | None = None) -> None:
    """Print wrapped prose. A word too wide for the indented line is indented less, so that it need not be broken.

    Args:
        console: the console to print to.
        text: the prose.
        first: text before the first line of the prose.
        indent: columns before each further line; None: the width of ``first``.
    """
    taken = cell_len(str(first))
    further = " " * (taken if indent is None else indent)
    begin = first
    for words in wrap(text, console.width - max(taken, len(further))):
        space = max(0, console.width - words.cell_len)
        if cell_len(str(begin)) > space:
            if str(begin).strip():
                line(console, begin)
            begin = " " * min(space, len(further))
        line(console, begin, words)
        begin = further


def entries(console: Console, items: Iterable[tuple[str, Sequence[str | Text]]]) -> None:
    """Print names in one column and paragraphs about each name in a second column.

    A name wider than a third of the line is printed above its paragraphs.
    """
    items = list(items)
    column = 2 + max((cell_len(name) for name, _ in items if cell_len(name) <= console.width // 3), default=0)
    for name, paragraphs in items:
        begin = Text(name, "bold")
        if begin.cell_len + 2 > column or not paragraphs:
            line(console, begin)
            begin = Text()
        for text in paragraphs:
            begin.pad_right(column - begin.cell_len)
            paragraph(console, text, begin)
            begin = Text()


def table(
    console: Console,
    head: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    left: Collection[str] = (),
    indent: int = 0,
) -> None:
    """Print aligned columns; the first column holds names.

    A name too wide for its row is printed on a line above the row.

    Args:
        console: the console to print to.
        head: titles of the columns.
        rows: cells of each row.
        left: titles of columns, beside the first, that are aligned to the left; all others are aligned to the right.
        indent: columns before each line.
    """
    cells = [[Text(title, "bold") for title in head]]
    cells += [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = [max(row[place].cell_len for row in cells) for place in range(1, len(head))]
    room = console.width - indent - sum(2 + width for width in widths)
    column = max((name.cell_len for name, *_ in cells if name.cell_len <= room), default=0)
    for name, *others in cells:
        if name.cell_len > column:
            line(console, " " * indent, name)
            name = Text()
        parts = [Text(" " * indent), name, Text(" " * (column - name.cell_len))]
        for title, width, cell in zip(head[1:], widths, others, strict=True):
            space = Text(" " * (width - cell.cell_len))
            parts += [Text("  "), *((cell, space) if title in left else (space, cell))]
        line(console, *parts)


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """A small HTML table with a name and a value in each row; all text is escaped.

    >>> html_table([("AP", "31.0")])
    '<table><tr><th style="text-align:left">AP</th><td style="text-align:left">31.0</td></tr></table>'
    """
    left = ' style="text-align:left"'
    cells = "".join(f"<tr><th{left}>{escape(name)}</th><td{left}>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def grid(console: Console, values: Mapping[str, str], per_line: int = 6) -> None:
    """Print short values below their names, up to ``per_line`` side by side (fewer if the line is too short)."""
    width = 2 + max(cell_len(text) for pair in values.items() for text in pair)
    per_line = max(1, min(per_line, console.width // width))
    items = list(values.items())
    for start in range(0, len(items), per_line):
        chosen = items[start : start + per_line]
        line(console, *(Text(f"{name:>{width}}", "bold") for name, _ in chosen))
        line(console, *(f"{value:>{width}}" for _, value in chosen))
