"""Progress display: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn
    from rich.text import Text


QUIET = 8.0
"""Seconds without a line, after which a task says how far it is; only where bars cannot be drawn."""


ROOMY = 120
"""Columns of a terminal from which on the bars have their full width."""
NUMBERS = 46
"""Columns beside a title that a short bar, its numbers and its times need."""


def _one_line_column() -> TextColumn:
    """The column of a task's text, which is cut at the end of the line instead of taking a second one."""
    from rich.progress import Task, TextColumn
    from rich.table import Column

    class OneLine(TextColumn):
        def render(self, task: Task) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    return OneLine("{task.fields[text]}", table_column=Column())


class Progress:
    """Progress bars on a terminal; elsewhere a plain line every few seconds for each task.

    Example:
        with Progress() as progress:
            bar = progress.bar("teacher", total=100)
            bar.update(10, "AP 12.3")
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        """Create the display; nothing is drawn before ``with``.

        Args:
            console: the console to draw on; None: stderr.
            quiet: show nothing.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self.console = console or Console(stderr=True, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        # Where a line is too narrow, the text at its end gives way, then a long title; numbers and times stay whole.
        whole = Column(no_wrap=True)
        title = Column(no_wrap=True, overflow="ellipsis", max_width=max(16, self.console.width - NUMBERS))
        columns = (
            TextColumn("[bold]{task.description}", table_column=title),
            BarColumn(bar_width=12 if self.console.width < ROOMY else 24, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            _one_line_column(),
        )
        self._depth = 0
        self.rich = RichProgress(*columns, console=self.console, disable=not self.live)

    def __enter__(self) -> Self:
        """Start drawing; may be nested."""
        self._depth += 1
        if self._depth == 1:
            self.rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing; finished bars stay."""
        self._depth -= 1
        if self._depth == 0:
            self.rich.stop()

    def bar(self, title: str, total: int) -> Bar:
        """Add a bar for ``total`` steps."""
        return Bar(self, title, total)

    def say(self, text: str | Text, style: str = "") -> None:
        """Print a line above the bars; on a terminal it wraps between words, so that paths are not broken.

        Args:
            text: the line; brackets in it are no markup, because paths and names may hold them.
            style: style of the whole line, e.g. ``yellow``.
        """
        from rich.text import Text

        from detdistill import printing

        words = Text(text, style) if isinstance(text, str) else text
        if self.live:
            printing.paragraph(self.rich.console, words)
        else:
            printing.line(self.rich.console, words)


class Bar:
    """Progress of one task."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        """Made by ``Progress.bar``."""
        self.progress, self.title, self.total = progress, title, total
        self.task = progress.rich.add_task(_escaped(title), total=total, text="")
        self._said = time.monotonic()

    def update(self, done: int, text: str | None = None) -> None:
        """Show the number of steps done; without a terminal, print a plain line every ``QUIET`` seconds."""
        if text is None:
            self.progress.rich.update(self.task, completed=done)
        else:
            self.progress.rich.update(self.task, completed=done, text=_escaped(text))
        if not self.progress.live and time.monotonic() - self._said > QUIET:
            self.say(f"{done}/{self.total} {text or ''}")

    def follow(self, done: int, total: int) -> None:
        """Show both numbers, done and total; for use as a callback."""
        self.resize(total)
        self.update(done)

    def resize(self, total: int) -> None:
        """Change the total number of steps."""
        if total != self.total:
            self.total = total
            self.progress.rich.update(self.task, total=total)

    def say(self, text: str) -> None:
        """Print a line about this task, beginning with its title."""
        from rich.text import Text

        self._said = time.monotonic()
        self.progress.say(Text.assemble((self.title, "bold"), f"  {text}"))


def _escaped(text: str) -> str:
    """The text for a column of rich's bars, which would read brackets as markup."""
    from rich.markup import escape

    return escape(text)
