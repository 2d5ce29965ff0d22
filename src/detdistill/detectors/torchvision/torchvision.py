"""Load any of torchvision's own detectors by name, e.g. torchvision:fcos_resnet50_fpn,weights=COCO_V1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

from detdistill.detectors.adapters import wrap_torchvision
from detdistill.detectors.contract import Detector
from detdistill.detectors.options import ModelOptions
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.errors import ModelError, nearest

UNNAMED = ("__background__", "N/A")
"""Categories of the COCO weights that are not classes."""


TINY = None
"""None: torchvision's models have a fixed size, so there is no tiny model for ``probe``."""


@dataclass(frozen=True, kw_only=True)
class TorchvisionOptions(ModelOptions):
    """Options of torchvision's own models."""

    weights: str | None = None
    """Name of torchvision's weights, e.g. ``COCO_V1``."""


OPTIONS = TorchvisionOptions


def build(backbone: str, classes: Sequence[str], options: TorchvisionOptions) -> Detector:
    """Build the model like ``load``; without ``weights``, all parameters are random."""
    return load(backbone, classes, options)


def load(backbone: str, classes: Sequence[str] | None, options: TorchvisionOptions) -> Detector:
    """Build torchvision's model and wrap it with the adapter of its class.

    Without ``weights`` all parameters are random. With ``weights``, the model keeps its output layer if ``classes`` are
    classes of these weights (None: all of them), and ignores the outputs of other classes. With new classes the output
    layer is newly initialised. All layers train (torchvision itself freezes the first two). BatchNorm is constant if it is
    constant in the pretrained model.

    Raises:
        ModelError: unknown name or weights, classes are missing, or the weights cannot be downloaded.
    """
    text = options.name or f"torchvision:{backbone}"
    known = torchvision.models.list_models(module=torchvision.models.detection)
    if backbone not in known:
        raise ModelError(f"torchvision has no detector {backbone!r}{nearest(backbone, known)}; known: {', '.join(known)}")
    if options.weights is None:
        if classes is None:
            raise ModelError(f"model {text!r} has no classes of its own; name them, or add weights=COCO_V1")
        return _wrap(text, _describe(backbone, len(classes) + 1, None), classes, None)
    weights = _find_weights(text, backbone, options.weights)
    categories = list(weights.meta["categories"])
    own = [name for name in categories if name not in UNNAMED]
    if classes is None or set(classes) <= set(own):
        names = own if classes is None else classes
        columns = [categories.index(name) for name in names]
        ready = _pretrained(text, backbone, weights)
        frozen = _frozen_eps(ready)
        return _wrap(text, _describe(backbone, len(categories), frozen), names, ready.state_dict(), columns)
    ready = _pretrained(text, backbone, weights)
    return _wrap(text, _describe(backbone, len(classes) + 1, _frozen_eps(ready)), classes, ready.state_dict())


def _find_weights(text: str, backbone: str, wanted: str) -> WeightsEnum:
    available = torchvision.models.get_model_weights(backbone)
    if wanted not in available.__members__:
        names = list(available.__members__)
        raise ModelError(f"model {text!r}: no weights {wanted!r}{nearest(wanted, names)}; known: {', '.join(names)}")
    return available[wanted]


def _pretrained(text: str, backbone: str, weights: WeightsEnum) -> nn.Module:
    try:
        pretrained: nn.Module = torchvision.models.get_model(backbone, weights=weights)
    except OSError as error:  # urllib's errors, time-outs and half-written files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model {text!r}: its weights cannot be downloaded ({reason}); put {weights.url.rsplit('/', 1)[-1]} into torch's "
            f"hub folder, or leave out weights="
        ) from error
    return pretrained


def _frozen_eps(model: nn.Module) -> float | None:
    return next((float(module.eps) for module in model.modules() if isinstance(module, FrozenBatchNorm2d)), None)


def _describe(name: str, outputs: int, frozen_eps: float | None) -> dict[str, object]:
    return {"call": "torchvision_model", "name": name, "num_classes": outputs, "frozen_eps": frozen_eps}


def _wrap(
    text: str,
    description: dict[str, object],
    classes: Sequence[str],
    state: dict[str, Tensor] | None,
    columns: Sequence[int] | None = None,
) -> Detector:
    """Build the model, load the entries of ``state`` with matching names and shapes, and wrap it."""
    built = build_model(description)
    if state is not None:
        own = built.state_dict()
        fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
        built.load_state_dict(fitting, strict=False)
    return wrap_torchvision(built, classes, text, columns, description)
