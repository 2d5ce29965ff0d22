"""Wrap a user's own model as a detector in a few lines; every method on features can then use it.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, NoReturn, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, DetectorSpec
from detdistill.detectors.torchvision.images import with_padding
from detdistill.errors import ModelError, nearest
from detdistill.files import folder_damage, write_atomically
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
    Resizing,
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
    """Make a detector from any module that takes images [B, 3, H, W]. The model runs once per step.

    Args:
        model: called as ``model(images)``; kept, not copied.
        taps: names of the submodules that output the feature maps [B, C, h, w] (an output may be a tensor, or a list,
            tuple or dict of tensors). Or a function ``(model, images) -> maps`` that runs the model itself; ``loss`` and
            ``detect`` then receive its result as the model's output.
        strides: strides of the maps in the order of the taps; None: measured by one forward pass on an empty image.
        channels: channels of the maps in the order of the taps; None: measured likewise.
        loss: ``(model output, batch) -> {name: scalar tensor}``, the model's own losses; None: a teacher only.
        detect: ``(model output, batch) -> one Detections for each image``; None: cannot be evaluated.
        classes: names in label order; empty for a model without classes.
        mean: mean by which images in 0..1 are normalised for the model; (0, 0, 0) if the model normalises itself.
        std: standard deviation likewise; (1, 1, 1) if the model normalises itself.
        name: name for messages and tables; None: the name of the model's class.
        probe_hw: height and width of the empty image, for models that do not take every size.

    Raises:
        ModelError: a tap does not exist or outputs no maps, or ``strides`` or ``channels`` contradict the maps.

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
    """Feature maps with the model's output from the same forward pass, so that ``predict`` need not run the model again."""

    output: Any = field(default=None, metadata=SHARED)

    def split(self, count: int) -> list[Features]:  # type: ignore[override]
        """The maps of each image, without the model's output."""
        return Features(self.maps, self.strides, self.padding).split(count)


@dataclass(frozen=True)
class ModelOutput(PerImage):
    """Output of the model. Only the user's own ``loss`` and ``detect`` read it; it is not saved."""

    own: Any = field(default=None, metadata=SHARED)

    def split(self, count: int) -> list[ModelOutput]:
        """``count`` empty outputs: the model's output cannot be split by image."""
        return [ModelOutput()] * count


class Tap:
    """A forward hook that keeps the outputs of one submodule until ``take`` is called."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._outputs: list[Any] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep an output of the tapped module; a module that serves several levels calls this several times in one pass."""
        self._outputs.append(output)

    def clear(self) -> None:
        """Drop all outputs kept from earlier passes."""
        self._outputs = []

    def take(self) -> list[Any]:
        """Return the outputs of the last pass in the order of the calls, and drop them."""
        outputs, self._outputs = self._outputs, []
        return outputs


class WrappedModel(Detector):
    """The detector that ``wrap`` returns."""

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        spec: DetectorSpec,
        loss: LossFunction | None,
        detect: DetectFunction | None,
    ) -> None:
        """Register a forward hook on each tap.

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

    @property
    def lacks(self) -> list[str]:
        """Which of ``loss`` and ``detect`` were not given."""
        return [name for name, function in (("loss", self._loss), ("detect", self._detect)) if function is None]

    def bound_functions(self) -> list[str]:
        """Which of the functions given to ``wrap`` refer to layers of this model in their surroundings.

        In a copy of the detector, such a function would still use the layers of the original.
        """
        layers = {id(module) for module in self.modules()}
        functions = {"taps": self._maps_of, "loss": self._loss, "detect": self._detect}
        return [name for name, function in functions.items() if _refers_to(function, layers)]

    def load_exported(self, folder: Path) -> None:
        """Load the weights that ``save_student`` wrote.

        Raises:
            ModelError: the file is missing or damaged, or its tensors do not fit.
        """
        path = folder / "model.safetensors"
        if wrong := folder_damage(folder):
            raise ModelError(f"{folder}: {wrong}: the file is damaged or was changed after it was saved")
        try:
            load_model(self.model, str(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be loaded into {self.spec.name}: {' '.join(str(error).split())}") from error

    @torch.no_grad()
    def measure(self, probe_hw: tuple[int, int], channels: Sequence[int] | None, strides: Sequence[int] | None) -> None:
        """Measure channels and strides by a forward pass on an empty image, and enter them in ``spec``.

        Args:
            probe_hw: height and width of the empty image.
            channels: expected channels of the maps in the order of the taps; None: not checked.
            strides: expected strides likewise. They are entered in place of the measured ones.

        Raises:
            ModelError: there are no maps, or they differ from ``channels`` or ``strides``.
        """
        like = next(self.model.parameters(), torch.empty(0))
        with evaluating(self.model):
            maps, _ = self._run(torch.zeros(1, 3, *probe_hw, device=like.device, dtype=like.dtype))
        where = f"wrap({self.spec.name})"
        if not maps:
            raise ModelError(f"{where}: the taps output no maps; name submodules that forward() calls")
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
        """Run the model and return the tapped maps, finest first.

        Raises:
            ModelError: the number of maps differs from that of the measuring pass.
        """
        maps, output = self._run(self.normalized(batch))
        assert self._order is not None
        if len(maps) != len(self._order):
            raise ModelError(f"wrap({self.spec.name}): {len(maps)} maps, but the first pass output {len(self._order)}")
        padded = with_padding(tuple(maps[level] for level in self._order), self.spec.strides, batch)
        return WrappedFeatures(padded.maps, padded.strides, padded.padding, output)

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """Return the model's output from the pass that computed ``features``.

        Raises:
            ModelError: ``features`` come from another model; a wrapped model cannot run on given features.
        """
        if not isinstance(features, WrappedFeatures):
            raise ModelError(f"{self.spec.name} is a wrapped model: it cannot predict from the features of another model")
        return cast(Prediction, ModelOutput(features.output))

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the user's own losses.

        Raises:
            ModelError: wrapped without ``loss``, or an ``assignment`` is given, or the result is not a dict of scalars.
        """
        if self._loss is None:
            raise ModelError(f"{self.spec.name} was wrapped without a loss, so it can only teach; give wrap(..., loss=...)")
        if assignment is not None:
            self._refuse("loss under another assignment")
        terms = self._loss(cast(ModelOutput, prediction).own, batch)
        if not isinstance(terms, Mapping) or not all(isinstance(term, Tensor) and term.numel() == 1 for term in terms.values()):
            raise ModelError(f"{self.spec.name}: the loss given to wrap must return a dict of scalar tensors")
        return Losses({key: term.reshape(()) for key, term in terms.items()})

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Decode by the user's own function.

        Raises:
            ModelError: wrapped without ``detect``, or the function does not return one entry for each image.
        """
        if self._detect is None:
            raise ModelError(f"{self.spec.name} was wrapped without decoding; to evaluate it give wrap(..., detect=...)")
        detections = self._detect(cast(ModelOutput, prediction).own, batch)
        if len(detections) != len(batch):
            raise ModelError(f"{self.spec.name}: detect returned {len(detections)} entries for {len(batch)} images")
        return detections

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Not available for a wrapped model.

        Raises:
            ModelError: always.
        """
        self._refuse("assignment")

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Not available for a wrapped model.

        Raises:
            ModelError: always.
        """
        self._refuse("positives")

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Write ``model.safetensors`` under the model's own names, and a README on how to load it."""
        write_atomically(folder / "model.safetensors", lambda path: save_model(self.model, str(path)))
        text = f'Load into your own {type(self.model).__name__}: safetensors.torch.load_model(model, "model.safetensors")\n'
        write_atomically(folder / "README.txt", lambda path: path.write_text(text, encoding="utf-8"))

    def _run(self, images: Tensor) -> tuple[list[Tensor], Any]:
        """Run the model: its maps in the order of the taps, and its output."""
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
            f"{self.spec.name} is a wrapped model, which exposes features only and has no {what}; use a method on features"
        )


def _refers_to(function: Any, layers: Collection[int], depth: int = 3) -> bool:
    """Whether a function uses one of some modules through its closure, its globals or its defaults.

    Methods bound to a module and arguments of ``functools.partial`` do not count, because copying replaces them by the copy.
    """
    function = getattr(function, "func", function)
    code = getattr(function, "__code__", None)
    if code is None or not depth or hasattr(function, "__self__"):
        return False
    around = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    around += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    around += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    owners = [getattr(value, "__self__", value) for value in around]
    return any(id(owner) in layers for owner in owners) or any(
        _refers_to(value, layers, depth - 1) for value in around if isinstance(value, FunctionType)
    )


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _agree(given: Sequence[int], found: Sequence[int]) -> bool:
    """Whether strides agree up to the rounding of odd map sizes."""
    return len(given) == len(found) and all(max(a, b) <= 1.25 * min(a, b) for a, b in zip(given, found, strict=True))
