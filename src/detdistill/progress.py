"""One progress display for everything that takes time; plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """A stack of bars on a terminal; elsewhere a line now and then.

    Example:
        with Progress() as progress:
            bar = progress.bar("teacher", total=100)
            bar.update(10, "AP 12.3")
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        """``quiet`` shows nothing at all."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.console = console or Console(stderr=True, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._depth = 0
        self.rich = RichProgress(*columns, console=self.console, disable=not self.live)

    def __enter__(self) -> Self:
        """Start drawing; entering again inside is harmless."""
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
        """A new bar."""
        return Bar(self, title, total)

    def say(self, text: str) -> None:
        """A line above the bars; on a terminal it wraps between words, so that paths stay whole."""
        from rich.text import Text

        from detdistill import printing

        words = Text.from_markup(text, emoji=False)
        if self.live:
            printing.paragraph(self.rich.console, words)
        else:
            printing.line(self.rich.console, words)


class Bar:
    """One task."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        """Made by ``Progress.bar``."""
        self.progress, self.title, self.total = progress, title, total
        self.task = progress.rich.add_task(title, total=total, text="")
        self._said = time.monotonic()

    def update(self, done: int, text: str | None = None) -> None:
        """Show how much is done; a plain line at most every 15 seconds where there is no terminal."""
        if text is None:
            self.progress.rich.update(self.task, completed=done)
        else:
            self.progress.rich.update(self.task, completed=done, text=text)
        if not self.progress.live and time.monotonic() - self._said > 15:
            self.say(f"{done}/{self.total} {text or ''}")

    def follow(self, done: int, total: int) -> None:
        """Show how much of how much is done: a callback for whoever counts for itself."""
        self.resize(total)
        self.update(done)

    def resize(self, total: int) -> None:
        """Correct how much there is to do."""
        if total != self.total:
            self.total = total
            self.progress.rich.update(self.task, total=total)

    def say(self, text: str) -> None:
        """A line about this task."""
        self._said = time.monotonic()
        self.progress.say(f"[bold]{self.title}[/bold]  {text}")
