"""Stored results of methods' earlier stages (UniKD's extractors, LabelEnc's encoder): trained once and reused by later runs."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from detdistill.cache.identity import digest
from detdistill.cache.knowledge import Readable
from detdistill.cache.storage import Storage
from detdistill.errors import RunError
from detdistill.methods.shared.contract import Method, Stage
from detdistill.settings import TrainSettings, as_plain, names_where
from detdistill.structures import Clock


def stage_length(stage: Stage, settings: TrainSettings) -> tuple[int, int | None]:
    """Length of a stage in epochs and, if the run's length is given in steps, in steps, which then decide."""
    steps = None if settings.steps is None else max(1, round(settings.steps * stage.share))
    return max(1, round(settings.epochs * stage.share)), steps


def stage_file(stage: Stage, settings: TrainSettings, data_fingerprint: str) -> str:
    """File name of the result in the folder ``stages``: a hash of everything the result depends on except the random seed."""
    decisive = names_where(TrainSettings, "stage")
    plain = {name: value for name, value in as_plain(settings).items() if name in decisive}
    epochs, steps = stage_length(stage, settings)
    length = {"epochs": epochs, "steps": steps}
    everything = {"stage": stage.name, "depends_on": stage.depends_on, "data": data_fingerprint, **plain, **length}
    return f"{digest(everything)[:32]}.safetensors"


def cached_stage_file(stage: Stage) -> str:
    """File name of the result in a cache. The name omits data and schedule, because a cache has only one of each."""
    return f"stages/{digest({'stage': stage.name, 'depends_on': stage.depends_on})[:32]}.safetensors"


def save_result(folder: Storage, name: str, stage: Stage) -> None:
    """Write the tensors that a stage has trained.

    Raises:
        OSError: the file cannot be written.
    """
    folder.write(name, packed(stage))


def packed(stage: Stage) -> bytes:
    """The tensors that a stage has trained, as a safetensors file with their checksum."""
    state = state_of(stage)
    return save(state, {"crc32": _checksum(state)})


def _checksum(state: Mapping[str, Tensor]) -> str:
    """crc32 of names, types, shapes and bytes of tensors."""
    crc = 0
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        crc = zlib.crc32(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"


def _noted_checksum(content: bytes | bytearray) -> str | None:
    """The checksum in the header of a safetensors file; None: a file of an earlier version has none."""
    (length,) = struct.unpack_from("<Q", content)
    note = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    return note.get("crc32") if isinstance(note, dict) else None


def state_of(stage: Stage) -> dict[str, Tensor]:
    """The tensors that a stage has trained, by number of the module and name in it."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in _state(stage)}


def load_result(folder: Readable, name: str, stage: Stage) -> bool:
    """Copy a stored result into the modules of a stage; return False if there is no file.

    Raises:
        RunError: the file is damaged, or its tensors do not fit the modules.
    """
    try:
        content = folder.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        kept, noted = load(bytes(content)), _noted_checksum(content)
        if noted not in (None, _checksum(kept)):
            raise SafetensorError("its checksum is wrong")
    except (SafetensorError, ValueError, struct.error) as error:
        raise RunError(
            f"{folder.url}/{name} is damaged ({error}); delete it, then stage {stage.name} is trained again"
        ) from error
    wanted = dict(_state(stage))
    if {key: tensor.shape for key, tensor in kept.items()} != {key: tensor.shape for key, tensor in wanted.items()}:
        raise RunError(f"{folder.url}/{name} does not fit stage {stage.name}; delete it")
    for key, tensor in wanted.items():
        tensor.data.copy_(kept[key])
    return True


def reusable(stage: Stage, method: Method | None) -> bool:
    """Whether a stage's result can be stored and reused: it has ``depends_on``, and trains only modules of the method."""
    if not stage.depends_on or method is None:
        return False
    inside = set(method.modules())
    return all(module in inside for module in _trained(stage))


def _trained(stage: Stage) -> list[nn.Module]:
    moments = (Clock(0, 1000), Clock(500, 1000), Clock(999, 1000))
    return list(dict.fromkeys(module for clock in moments for module in stage.trains(clock)))


def _state(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """The tensors by number of the module, because names in the method change inside a composition."""
    for number, module in enumerate(_trained(stage)):
        for key, tensor in module.state_dict(keep_vars=True).items():
            yield f"{number}.{key}", tensor
