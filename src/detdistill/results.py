"""Results of the Python functions, with the short texts and tables that notebooks show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detdistill.printing import html_table

if TYPE_CHECKING:
    from detdistill.compare import Gain
    from detdistill.evaluation import Scores


@dataclass(frozen=True, repr=False)
class Distilled:
    """Result of ``distill``."""

    folder: Path
    """The run folder; with ``baseline`` or ``seeds``, the folder that contains the run folders."""
    runs: tuple[Path, ...]
    """The run folders."""
    report: Path
    """Path of the HTML report; with ``report=False`` the file is not written."""
    gains: tuple[Gain, ...] = ()
    """Gains of the distilled runs over their baselines; empty without ``baseline``."""
    teacher_scores: Scores | None = None
    """Scores of the teacher on the validation images; None: not evaluated."""

    def __repr__(self) -> str:
        """The gains and the folder."""
        gains = "; ".join(map(str, self.gains))
        count = f"{len(self.runs)} run{'s' if len(self.runs) != 1 else ''}"
        return f"Distilled({gains + '; ' if gains else ''}{count} in {self.folder})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = [row for gain in self.gains for row in gain.rows()]
        if self.teacher_scores is not None:
            rows.append(("AP of the teacher", self.teacher_scores.points("AP")))
        return html_table([*rows, ("runs", str(len(self.runs))), ("folder", str(self.folder)), ("report", str(self.report))])
