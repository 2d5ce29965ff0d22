"""Results of probing the detectors, kept in the user's cache folder; reading them imports neither torch nor an adapter.

Probing builds every adapter's tiny model and takes about a minute, so it is done once for each set of installed versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from detdistill.kept import keep, read_kept, software

STAGES = "all stages"
"""Name of the check that every detector must pass: features, predict, assign, loss, backward, detect, positives."""
KEPT = "detectors"
"""Name of the kept file."""


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
    """Date and time of probing."""


def kept_survey() -> Survey | None:
    """The survey that was kept, or None if there is none for exactly the installed versions and the files of this package."""
    kept: Any = read_kept(KEPT, software())
    try:
        detectors = tuple(Probed(**probed) for probed in kept["detectors"])
        return Survey(detectors, tuple(kept["capabilities"]), tuple(kept["checks"]), kept["when"])
    except (TypeError, KeyError):  # nothing is kept, or something that this version would not have written
        return None


def keep_survey(found: Survey) -> None:
    """Keep a survey for ``kept_survey``."""
    keep(KEPT, software(), asdict(found))
