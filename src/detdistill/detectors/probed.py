"""The abilities of all detectors as probing found them: shipped with the package, or kept in the user's cache folder.

Probing builds and exports every adapter's tiny model, which takes minutes. Reading what was found imports neither torch nor an
adapter. ``tools/tables.py`` writes the shipped results and checks them against the code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detdistill.kept import keep, read_kept, software

STAGES = "all stages"
"""Name of the check that every detector must pass: features, predict, assign, loss, backward, detect, positives."""
KEPT = "detectors"
"""Name of the kept file."""
SHIPPED = Path(__file__).with_name("probed.json")
"""The results with the versions that the package is tested with."""


@dataclass(frozen=True)
class Probed:
    """Results of probing one adapter."""

    name: str
    about: str
    """First line of the adapter's file."""
    family: str = "-"
    """Kind of prediction; ``-``: unknown, the detector could not be built; ``as loaded``: depends on the loaded model."""
    results: Mapping[str, bool] = field(default_factory=dict)
    """Whether each of ``probe.CHECKS`` works, in their order; False also for what is not implemented. Empty: not run."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Reason of each failed check, in one line."""
    export: str = ""
    """What may vary in an exported file, or ``no: `` and the reason; empty: not tried."""

    def cell(self, check: str) -> str:
        """Table cell: ``yes``, ``no`` (not implemented), ``FAILS``, or empty if the detector was not run."""
        if check in self.reasons:
            return "FAILS"
        if not self.results and not self.reasons:
            return ""
        return "yes" if self.results.get(check) else "no"

    @property
    def able(self) -> tuple[str, ...]:
        """Names of the capabilities that work."""
        return tuple(check for check, works in self.results.items() if works and check != STAGES)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each failure."""
        return tuple(f"{self.name}, {check}: {reason}" for check, reason in self.reasons.items())


@dataclass(frozen=True)
class Survey:
    """All adapters as they were probed."""

    detectors: tuple[Probed, ...]
    capabilities: tuple[str, ...]
    """The optional abilities in words, e.g. ``regions (a region head on given boxes)``."""
    checks: tuple[str, ...]
    """Names of all checks, in the order of the tables' columns."""
    when: str
    """Date and time of probing, or the versions with which the shipped results were found."""


def kept_survey() -> Survey | None:
    """The survey that was kept, or None if there is none for exactly the installed versions and the files of this package."""
    return _survey(read_kept(KEPT, software()))


def shipped_survey() -> Survey | None:
    """The survey that comes with the package, or None if it cannot be read."""
    try:
        return _survey(json.loads(SHIPPED.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _survey(content: Any) -> Survey | None:
    try:
        detectors = tuple(Probed(**probed) for probed in content["detectors"])
        return Survey(detectors, tuple(content["capabilities"]), tuple(content["checks"]), content["when"])
    except (TypeError, KeyError):  # nothing, or something that this version would not have written
        return None


def keep_survey(found: Survey) -> None:
    """Keep a survey for ``kept_survey``."""
    keep(KEPT, software(), asdict(found))
