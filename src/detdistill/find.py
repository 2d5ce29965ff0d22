"""A small search over a distillation's settings, on images held out of the training images.

Settings that were chosen by their AP on the validation images flatter the side that was tuned. So a search never sees these
images, and where it tries learning rates, the student alone gets as many trials as the distilled student.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.errors import RunError, nearest
from detdistill.printing import html_table, labelled, line, paragraph, stdout, table
from detdistill.settings import DistillSettings

if TYPE_CHECKING:
    from optuna import Study, Trial

RANGES = {"lr": (0.3, 3.0), "distill_weight": (0.1, 10.0), "balance": (0.05, 0.7)}
"""Smallest and largest value of the settings that can be searched; of ``lr`` and ``distill_weight``, factors on their values."""

NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+"


@dataclass(frozen=True)
class Searched:
    """A number that is searched, and its range."""

    name: str
    """A setting (``lr``, ``distill_weight``, ``balance``), or ``SLUG.NAME``: a hyper-parameter of a method."""
    low: float
    high: float
    whole: bool = False
    """Only whole numbers."""

    def suggest(self, trial: Trial) -> float:
        """The value for a trial: on a logarithmic scale, because factors matter more than differences."""
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.low >= 1)
        return float(f"{trial.suggest_float(self.name, self.low, self.high, log=self.low > 0):.4g}")


@dataclass(frozen=True)
class Tried:
    """A trial: the values, and what came out on the held-out images."""

    number: int
    values: dict[str, float]
    ap: float
    """AP (0..1) of the distilled student, mean over the seeds."""
    alone: float | None
    """AP (0..1) of the student alone, trained with the same settings; None: it was not trained anew, see ``Found.alone``."""
    seconds: float
    """Training time of all runs of this trial."""


@dataclass(frozen=True)
class Found:
    """Result of ``find``."""

    folder: Path
    """The folder with a folder for each trial."""
    method: str
    tried: tuple[Tried, ...]
    held_out: float
    """Share of the training images on which the trials were scored."""
    seeds: tuple[int, ...]
    best: dict[str, Any] = field(default_factory=dict)
    """Settings of the best trial that differ from those given; ``best.yaml`` in the folder holds them for ``--config``."""
    at_once: int = 1
    """Number of trials that were suggested together."""

    @property
    def winner(self) -> Tried:
        """The trial with the highest AP; of equal ones the first."""
        return max(self.tried, key=lambda one: one.ap)

    @property
    def alone(self) -> float:
        """The highest AP (0..1) of the student alone: over the learning rates of all trials, if these were searched."""
        return max(one.alone for one in self.tried if one.alone is not None)

    def __repr__(self) -> str:
        """The best settings and their AP in points of 100."""
        return (
            f"Found({self.method}: {in_words(self.winner.values)}: AP {100 * self.winner.ap:.1f}, alone {100 * self.alone:.1f}, "
            f"{len(self.tried)} trials in {self.folder})"
        )

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = [(f"trial {one.number}: {in_words(one.values)}", f"{100 * one.ap:.1f}") for one in self.tried]
        return html_table([*rows, ("student alone", f"{100 * self.alone:.1f}"), ("best", str(self.folder / "best.yaml"))])


def read_searched(over: Sequence[str], settings: DistillSettings) -> tuple[Searched, ...]:
    """Read what is searched: ``lr``, ``lr=1e-4..1e-2``, ``distill_weight``, ``balance``, ``pkd.weight=1..20``.

    Args:
        over: the texts.
        settings: settings of the run; ranges of ``lr`` and ``distill_weight`` that are left out are factors on their values.

    Raises:
        RunError: no text, an unknown name, a range that is no range, or values that the setting does not allow.
    """
    if not over:
        raise RunError(f"over: nothing to search; give some of {', '.join(RANGES)}, or METHOD.NAME=LOW..HIGH")
    found = []
    for text in over:
        name, _, span = text.partition("=")
        limits = re.fullmatch(rf"({NUMBER})\.\.({NUMBER})", span)
        if span and limits is None:
            raise RunError(f"over: {text}: write {name}=LOW..HIGH, e.g. {name}=0.1..10")
        bounds = (float(limits[1]), float(limits[2])) if limits else None
        if bounds is not None and bounds[0] >= bounds[1]:
            raise RunError(f"over: {text}: the first number must be smaller than the second")
        found.append(_setting(name, bounds, settings) if name in RANGES else _hyper_parameter(name, bounds, settings.method))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise RunError(f"over: {', '.join(over)} names one thing twice")
    if {"balance", "distill_weight"} <= {*names}:
        raise RunError("over: balance holds the share that distill_weight would change; search one of them")
    return tuple(found)


def _setting(name: str, bounds: tuple[float, float] | None, settings: DistillSettings) -> Searched:
    low, high = RANGES[name]
    if name != "balance":
        low, high = low * getattr(settings, name), high * getattr(settings, name)
    low, high = bounds or (low, high)
    if low <= 0 or (name == "balance" and high >= 1):
        raise RunError(f"over: {name}={low:g}..{high:g} must lie above 0{' and below 1' if name == 'balance' else ''}")
    return Searched(name, low, high)


def _hyper_parameter(name: str, bounds: tuple[float, float] | None, methods: str) -> Searched:
    from detdistill.methods.shared.compose import parse_methods
    from detdistill.methods.shared.hyper_parameters import hyper_parameter

    slug, dot, parameter = name.partition(".")
    parsed = {kind.slug: kind for kind, _ in parse_methods(methods)}
    if not dot:
        raise RunError(
            f"over: no setting {name!r} to search{nearest(name, RANGES)}; {', '.join(RANGES)} or METHOD.NAME=LOW..HIGH"
        )
    if slug not in parsed:
        raise RunError(f"over: {name}: {slug} is no method of this run{nearest(slug, parsed)}; it has {', '.join(parsed)}")
    kind = hyper_parameter(slug, parsed[slug], parameter).kind
    if bounds is None:
        raise RunError(f"over: {name}: give its range, {name}=LOW..HIGH")
    whole = "int" in str(kind) and "float" not in str(kind)
    if whole and not all(bound.is_integer() for bound in bounds):
        raise RunError(f"over: {name}: {parameter} is a whole number, but {bounds[0]:g}..{bounds[1]:g} are not")
    searched = Searched(name, *bounds, whole)
    for bound in bounds:  # raises MethodError if the method does not allow the ends of the range
        parse_methods(with_values(methods, {name: int(bound) if whole else bound}))
    return searched


def with_values(methods: str, values: Mapping[str, float]) -> str:
    """Methods as text, with hyper-parameters set to other values.

    Args:
        methods: slugs joined by ``+``, each with ``,key=value`` settings.
        values: by ``SLUG.NAME``; other names are left out.

    Example:
        >>> with_values("pkd,weight=6+fgd", {"pkd.weight": 2.5, "lr": 0.001})
        'pkd,weight=2.5+fgd'
    """
    from detdistill.methods.shared.catalogue import split_methods

    members = []
    for head, *given in split_methods(methods):
        mine = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{head.partition('@')[0]}.")}
        kept = [one for one in given if one.partition("=")[0] not in mine]
        members.append(",".join([head, *kept, *(f"{name}={value:g}" for name, value in mine.items())]))
    return "+".join(members)


def as_settings(methods: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Values of a trial as settings of ``distill``."""
    settings: dict[str, Any] = {name: value for name, value in values.items() if name in RANGES}
    changed = with_values(methods, values)
    return settings if changed == methods else {**settings, "method": changed}


def new_study(searched: Sequence[Searched], settings: DistillSettings, seed: int, at_once: int = 1) -> Study:
    """A study of Optuna whose suggestions depend only on the seed and on the results, so that a search can be resumed.

    Of several trials that are asked for ``at_once``, the later ones count the earlier ones as bad ("constant liar"), so that
    they look elsewhere.

    The first trial has the settings as they are, if they lie in the ranges, so that the best is never worse than these.

    Raises:
        RunError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RunError("find needs the package optuna: pip install 'detdistill[find]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, 2 * len(searched)), constant_liar=at_once > 1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    today = {one.name: _today(one.name, settings) for one in searched}
    if all(value is not None and one.low <= value <= one.high for one, value in zip(searched, today.values(), strict=True)):
        study.enqueue_trial(today)
    return study


def _today(name: str, settings: DistillSettings) -> float | None:
    """The value in the settings as given; None: it is no number there."""
    if name in RANGES:
        value = getattr(settings, name)
    else:
        from detdistill.methods.shared.compose import parse_methods

        slug, _, parameter = name.partition(".")
        value = next(given[parameter] for kind, given in parse_methods(settings.method) if kind.slug == slug)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def show_found(found: Found) -> None:
    """Print what was tried, and what is best."""
    console = stdout()
    line(console, f"AP on held-out training images (x 100), {found.method}")
    head = ("trial", *found.tried[0].values, "AP", "alone", "seconds")
    rows = [
        (
            f"{one.number}{' *' if one is found.winner else ''}",
            *(f"{value:.3g}" for value in one.values.values()),
            f"{100 * one.ap:.1f}",
            "" if one.alone is None else f"{100 * one.alone:.1f}",
            f"{one.seconds:.0f}",
        )
        for one in found.tried
    ]
    table(console, head, rows, indent=2)
    line(console)
    labelled(console, "best", f"trial {found.winner.number}: {in_words(found.winner.values)}")
    labelled(console, "AP", f"{100 * found.winner.ap:.1f}, alone {100 * found.alone:.1f}")
    paragraph(console, what_it_shows(found))


def what_it_shows(found: Found) -> str:
    """The conclusions that the search allows, and those that it does not."""
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    equal = sum(one.alone is not None for one in found.tried)
    care = f"The student alone was trained {equal} time{'s' if equal > 1 else ''}" + (
        ", with every learning rate that was tried. " if equal > 1 else ", since its settings were not searched. "
    )
    return (
        f"{len(found.tried)} trials of {seeds}, scored on {100 * found.held_out:.0f} % of the training images; the validation "
        f"images were not used. {care}The highest of many numbers is too high by chance, so it proves no gain: "
        f"`distill --config {found.folder / 'best.yaml'} --baseline true --seeds 0,1,2` measures it."
    )


def found_json(found: Found) -> dict[str, Any]:
    """The result as plain values for JSON."""
    return {
        "method": found.method,
        "held_out": found.held_out,
        "seeds": list(found.seeds),
        "at_once": found.at_once,
        "tried": [asdict(one) for one in found.tried],
        "best": found.best,
        "best_trial": found.winner.number,
        "alone": found.alone,
        "meaning": what_it_shows(found),
    }


def in_words(values: Mapping[str, float]) -> str:
    """``lr 0.001, distill_weight 2``."""
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
