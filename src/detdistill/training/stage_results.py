"""Results of methods' own earlier stages (UniKD's extractors, LabelEnc's encoder): trained once, then used again."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from detdistill.cache.identity import digest
from detdistill.cache.storage import Storage
from detdistill.errors import RunError
from detdistill.methods.shared.contract import Method, Stage
from detdistill.settings import TrainSettings, as_plain, names_where
from detdistill.structures import Clock


def stage_length(stage: Stage, settings: TrainSettings) -> tuple[int, int | None]:
    """Epochs of a stage, and its steps where the run counts in steps (then those decide)."""
    steps = None if settings.steps is None else max(1, round(settings.steps * stage.share))
    return max(1, round(settings.epochs * stage.share)), steps


def stage_file(stage: Stage, settings: TrainSettings, data_fingerprint: str) -> str:
    """Name of the result in the folder ``stages``: of all it depends on, except chance."""
    decisive = names_where(TrainSettings, "stage")
    plain = {name: value for name, value in as_plain(settings).items() if name in decisive}
    epochs, steps = stage_length(stage, settings)
    length = {"epochs": epochs, "steps": steps}
    everything = {"stage": stage.name, "depends_on": stage.depends_on, "data": data_fingerprint, **plain, **length}
    return f"{digest(everything)[:32]}.safetensors"


def cached_stage_file(stage: Stage) -> str:
    """Name of the result in a cache of knowledge, which is of one data set and one schedule."""
    return f"stages/{digest({'stage': stage.name, 'depends_on': stage.depends_on})[:32]}.safetensors"


def save_result(folder: Storage, name: str, stage: Stage) -> None:
    """Write what a stage has trained.

    Raises:
        OSError: the disk does not take it.
    """
    folder.write(name, save(state_of(stage)))


def state_of(stage: Stage) -> dict[str, Tensor]:
    """What a stage has trained, as it is written."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in _state(stage)}


def load_result(folder: Storage, name: str, stage: Stage) -> bool:
    """Put a stage's result back into the method; False when there is none.

    Raises:
        RunError: the file is damaged, or not of this method.
    """
    try:
        content = folder.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        kept = load(bytes(content))
    except SafetensorError as error:
        raise RunError(f"{folder.url}/{name} is damaged ({error}); delete it, and stage {stage.name} is trained again") from error
    wanted = dict(_state(stage))
    if {key: tensor.shape for key, tensor in kept.items()} != {key: tensor.shape for key, tensor in wanted.items()}:
        raise RunError(f"{folder.url}/{name} does not fit stage {stage.name}; delete it")
    for key, tensor in wanted.items():
        tensor.data.copy_(kept[key])
    return True


def reusable(stage: Stage, method: Method | None) -> bool:
    """Whether a stage's result can be kept: it says what it depends on, and trains modules of the method only."""
    if not stage.depends_on or method is None:
        return False
    inside = set(method.modules())
    return all(module in inside for module in _trained(stage))


def _trained(stage: Stage) -> list[nn.Module]:
    moments = (Clock(0, 1000), Clock(500, 1000), Clock(999, 1000))
    return list(dict.fromkeys(module for clock in moments for module in stage.trains(clock)))


def _state(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """Numbered, not by their names in the method: those change inside a composition."""
    for number, module in enumerate(_trained(stage)):
        for key, tensor in module.state_dict(keep_vars=True).items():
            yield f"{number}.{key}", tensor
