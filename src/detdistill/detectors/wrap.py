"""Somebody's own model as a detector, in five lines: enough for every method that works on features.

student = wrap(
    model,
    taps=["neck.p3", "neck.p4", "neck.p5"],
    loss=lambda output, batch: my_losses(output, batch.targets),
    detect=lambda output, batch: my_decoding(output),
    classes=["cat", "dog"],
)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, DetectorSpec
from detdistill.detectors.torchvision.images import with_padding
from detdistill.errors import ModelError, nearest
from detdistill.files import write_atomically
from detdistill.functional.modes import evaluating
from detdistill.structures import (
    SHARED,
    Assignment,
    Batch,
    Detections,
    Features,
    Losses,
    PerImage,
    Positives,
    Prediction,
)

Taps = str | Sequence[str] | Callable[[nn.Module, Tensor], Any]
LossFunction = Callable[[Any, Batch], Mapping[str, Tensor]]
DetectFunction = Callable[[Any, Batch], list[Detections]]


def wrap(
    model: nn.Module,
    taps: Taps,
    *,
    strides: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    loss: LossFunction | None = None,
    detect: DetectFunction | None = None,
    classes: Sequence[str] = (),
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    name: str | None = None,
    probe_hw: tuple[int, int] = (256, 256),
) -> WrappedModel:
    """Make a detector of any module that takes images [B, 3, H, W]. The model runs once per step.

    Args:
        model: called as ``model(images)``; kept, not copied.
        taps: names of the submodules whose outputs are the maps [B, C, h, w] (an output may be a tensor, or a list,
            tuple or dict of tensors); or a function ``(model, images) -> maps`` that runs the model itself, whose
            result is then the model's output for ``loss`` and ``detect``.
        strides: of the maps in the taps' order; None: found by one forward pass on an empty image.
        channels: likewise.
        loss: ``(model output, batch) -> {name: scalar tensor}``, the model's own losses; None: a teacher only.
        detect: ``(model output, batch) -> one Detections for each image``; None: cannot be evaluated.
        classes: names in label order, where the model has classes.
        mean: the model's own normalisation of images in 0..1; (0, 0, 0) if it does that itself.
        std: likewise; (1, 1, 1).
        name: for messages and tables; None: the class's name.
        probe_hw: size of the empty image, for models that do not take every size.

    Raises:
        ModelError: a tap does not exist or gives no maps, or ``strides`` or ``channels`` contradict the maps.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, stride=2), torch.nn.Conv2d(4, 8, 2, stride=2))
        >>> teacher = wrap(net, taps=["0", "1"])
        >>> teacher.spec.channels, teacher.spec.strides
        ((4, 8), (2, 4))
    """
    name = type(model).__name__ if name is None else name
    spec = DetectorSpec(name, "features", tuple(classes), channels=(), strides=(), mean=mean, std=std)
    detector = WrappedModel(model, taps, spec, loss, detect)
    detector.measure(probe_hw, channels, strides)
    return detector


@dataclass(frozen=True)
class WrappedFeatures(Features):
    """The maps together with the output of the run that made them, so that ``predict`` need not run the model again."""

    output: Any = field(default=None, metadata=SHARED)

    def split(self, count: int) -> list[Features]:  # type: ignore[override]
        """The maps of each image, without the model's output."""
        return Features(self.maps, self.strides, self.padding).split(count)


@dataclass(frozen=True)
class ModelOutput(PerImage):
    """What the model returned. Only the user's own ``loss`` and ``detect`` read it; it is not saved."""

    own: Any = field(default=None, metadata=SHARED)

    def split(self, count: int) -> list[ModelOutput]:
        """Nothing for each image."""
        return [ModelOutput()] * count


class Tap:
    """A forward hook that keeps what one submodule returned until it is taken."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._outputs: list[Any] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Called by the tapped module; more than once in a pass if it serves several levels."""
        self._outputs.append(output)

    def clear(self) -> None:
        """Forget what a run left behind."""
        self._outputs = []

    def take(self) -> list[Any]:
        """The outputs of the last run, in the order of the calls; they are not kept."""
        outputs, self._outputs = self._outputs, []
        return outputs


class WrappedModel(Detector):
    """See ``wrap``."""

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        spec: DetectorSpec,
        loss: LossFunction | None,
        detect: DetectFunction | None,
    ) -> None:
        """Register the hooks, once.

        Raises:
            ModelError: a tap does not exist.
        """
        super().__init__()
        self.model = model
        self.spec = spec
        self._loss, self._detect = loss, detect
        self._order: tuple[int, ...] | None = None
        self._maps_of = taps if callable(taps) else None
        names = [taps] if isinstance(taps, str) else taps
        self._taps = () if callable(names) else tuple(Tap(tap) for tap in names)
        modules = dict(model.named_modules())
        for tap in self._taps:
            if tap.name not in modules:
                raise ModelError(f"wrap({spec.name}): the model has no submodule {tap.name!r}{nearest(tap.name, modules)}")
            modules[tap.name].register_forward_hook(tap)

    @torch.no_grad()
    def measure(self, probe_hw: tuple[int, int], channels: Sequence[int] | None, strides: Sequence[int] | None) -> None:
        """Complete ``spec`` by a forward pass on an empty image, and check it against what was given (in taps' order).

        Raises:
            ModelError: there are no maps, or they are not as given.
        """
        like = next(self.model.parameters(), torch.empty(0))
        with evaluating(self.model):
            maps, _ = self._run(torch.zeros(1, 3, *probe_hw, device=like.device, dtype=like.dtype))
        where = f"wrap({self.spec.name})"
        if not maps:
            raise ModelError(f"{where}: the taps gave no maps; are these submodules used in forward()?")
        found = [max(1, round(math.sqrt(probe_hw[0] / level.shape[-2] * probe_hw[1] / level.shape[-1]))) for level in maps]
        found_channels = [level.shape[1] for level in maps]
        if channels is not None and list(channels) != found_channels:
            raise ModelError(f"{where}: channels={list(channels)}, but the maps have {found_channels}; correct or leave out")
        if strides is not None and not _agree(strides, found):
            raise ModelError(
                f"{where}: strides={list(strides)}, but an image of {probe_hw[0]}x{probe_hw[1]} gives maps of "
                f"{', '.join(f'{m.shape[-2]}x{m.shape[-1]}' for m in maps)}, strides {found}; correct or leave out"
            )
        said = found if strides is None else list(strides)
        self._order = tuple(sorted(range(len(maps)), key=lambda level: said[level]))
        self.spec = replace(
            self.spec,
            channels=tuple(found_channels[level] for level in self._order),
            strides=tuple(said[level] for level in self._order),
        )

    def features(self, batch: Batch) -> WrappedFeatures:
        """The tapped maps, finest first; runs the model."""
        maps, output = self._run(self.normalized(batch))
        assert self._order is not None
        if len(maps) != len(self._order):
            raise ModelError(f"wrap({self.spec.name}): {len(maps)} maps, where the first pass gave {len(self._order)}")
        padded = with_padding(tuple(maps[level] for level in self._order), self.spec.strides, batch)
        return WrappedFeatures(padded.maps, padded.strides, padded.padding, output)

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """The output of the run that gave ``features``.

        Raises:
            ModelError: the features are not this model's own; it cannot be entered behind its neck.
        """
        if not isinstance(features, WrappedFeatures):
            raise ModelError(f"{self.spec.name} is a wrapped model: it cannot predict from somebody else's features")
        return cast(Prediction, ModelOutput(features.output))

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """The user's own losses.

        Raises:
            ModelError: wrapped without ``loss``, or a foreign assignment is given, or the result is no dict of scalars.
        """
        if self._loss is None:
            raise ModelError(f"{self.spec.name} was wrapped without a loss, so it can only teach; give wrap(..., loss=...)")
        if assignment is not None:
            self._refuse("a loss under another assignment")
        terms = self._loss(cast(ModelOutput, prediction).own, batch)
        if not isinstance(terms, Mapping) or not all(isinstance(term, Tensor) and term.numel() == 1 for term in terms.values()):
            raise ModelError(f"{self.spec.name}: the loss given to wrap must return a dict of scalar tensors")
        return Losses({key: term.reshape(()) for key, term in terms.items()})

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """The user's own decoding.

        Raises:
            ModelError: wrapped without ``detect``, or it does not return one entry for each image.
        """
        if self._detect is None:
            raise ModelError(f"{self.spec.name} was wrapped without decoding; to evaluate it give wrap(..., detect=...)")
        detections = self._detect(cast(ModelOutput, prediction).own, batch)
        if len(detections) != len(batch):
            raise ModelError(f"{self.spec.name}: detect gave {len(detections)} entries for {len(batch)} images")
        return detections

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Not known of a wrapped model (ModelError)."""
        self._refuse("an assignment")

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Not known of a wrapped model (ModelError)."""
        self._refuse("positives")

    def export(self, folder: Path) -> None:
        """``model.safetensors`` under the model's own names, and a README that says how to load it."""
        write_atomically(folder / "model.safetensors", lambda path: save_model(self.model, str(path)))
        text = f'Load into your own {type(self.model).__name__}: safetensors.torch.load_model(model, "model.safetensors")\n'
        write_atomically(folder / "README.txt", lambda path: path.write_text(text, encoding="utf-8"))

    def _run(self, images: Tensor) -> tuple[list[Tensor], Any]:
        """Maps in the taps' order, and the model's output."""
        if self._maps_of is not None:
            output = self._maps_of(self.model, images)
            return self._flat(output, "the taps function"), output
        for tap in self._taps:
            tap.clear()
        output = self.model(images)
        return [level for tap in self._taps for level in self._flat(tap.take(), f"tap {tap.name!r}")], output

    def _flat(self, value: Any, source: str) -> list[Tensor]:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [level for item in value for level in self._flat(item, source)]
        if not isinstance(value, Tensor) or value.ndim != 4:
            what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ModelError(f"wrap({self.spec.name}): {source} gives {what}, not maps [B, C, H, W]")
        return [value]

    def _refuse(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self.spec.name} is a wrapped model and shows features only, {what} cannot be had; use a method on features"
        )


def _agree(given: Sequence[int], found: Sequence[int]) -> bool:
    """Whether strides agree up to the rounding of odd map sizes."""
    return len(given) == len(found) and all(max(a, b) <= 1.25 * min(a, b) for a, b in zip(given, found, strict=True))
