"""Run a detector that is not trained with its batch norms folded into the convolutions before them.

In evaluation mode a batch norm is a scale and a shift of each channel, which the convolution before it can apply: one pass over
the maps less for each norm. ``FoldedNorms`` does so for single passes; the detector's modules, its state dict and all calls
outside stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from detdistill.functional.modes import evaluating
from detdistill.structures import Batch, Dense, Features, Look, Observation, Target, View, map_tensors

SIDE_PX = 128
"""Side of the image of noise on which folded and own norms are compared."""
TOLERANCE = 1e-5
"""Largest difference of an output from that with the own norms, as a share of its largest value."""


class Observing(Protocol):
    """A detector (``detectors.contract.Detector``)."""

    spec: Any

    def observe(self, batch: Batch, look: Look = ...) -> Observation:
        """One forward pass with the parts that ``look`` selects."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """As ``torch.nn.Module``."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As ``torch.nn.Module``."""
        ...


@dataclass
class _Pair:
    """A convolution whose output only a batch norm reads, and the convolution's weights that make the norm superfluous."""

    conv: nn.Conv2d
    norm: Any
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)

    def __post_init__(self) -> None:
        norm = self.norm
        scale = norm.weight * (norm.running_var + getattr(norm, "eps", 1e-5)).rsqrt()
        own = 0 if self.conv.bias is None else self.conv.bias
        self.weight = (self.conv.weight * scale[:, None, None, None]).detach()
        self.bias = ((own - norm.running_mean) * scale + norm.bias).detach()

    def state(self) -> tuple[tuple[int, int], ...]:
        """Memory and version of all tensors that were folded; it changes when they are moved, loaded or trained."""
        norm, conv = self.norm, self.conv
        tensors = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors if tensor is not None)


class FoldedNorms:
    """The folded batch norms of a detector, for passes in evaluation mode without gradients.

    Folded are ``nn.BatchNorm2d``, timm's norms with activation, and the frozen norms of torchvision, timm and transformers,
    where the norm alone reads the output of a convolution that runs once in a pass. They are found and checked by passes on an
    image of noise. If the outputs differ by more than ``TOLERANCE``, or something in the detector does not take the
    channels-last layout, all passes are the detector's own.

    Example:
        folded = FoldedNorms(detector.eval())
        with torch.no_grad(), folded.running(batch) as fast:
            prediction = detector.predict(detector.features(fast), fast)
    """

    def __init__(self, detector: Observing) -> None:
        """Nothing is computed before the first pass; changed weights are folded anew."""
        self.detector = detector
        self.pairs: tuple[_Pair, ...] = ()
        self._state: tuple[Any, ...] | None = None
        self._usable = False

    @contextmanager
    def running(self, batch: Batch) -> Iterator[Batch]:
        """Passes inside the context run with folded norms.

        Args:
            batch: the images.

        Yields:
            The batch for the passes: on a CPU its images are in the channels-last layout, in which convolutions are faster
            (unchanged if the detector's weights are in that layout already).
        """
        if torch.is_grad_enabled() or not self._ready():
            yield batch
            return
        given = any(not pair.weight.is_contiguous() for pair in self.pairs)  # the user chose the layout
        with _folded(self.pairs):
            yield batch if given else _channels_last(batch)

    def _ready(self) -> bool:
        """Whether passes can be folded now."""
        if self._tensors() != self._state:
            self._fold()
            self._state = self._tensors()
        return self._usable and not any(pair.norm.training for pair in self.pairs)

    def _tensors(self) -> tuple[Any, ...]:
        first = next(iter(self.detector.parameters()), None)
        return (None if first is None else (first.data_ptr(), first._version), *(pair.state() for pair in self.pairs))

    def _fold(self) -> None:
        """Find the pairs and compare the outputs with those of the own norms."""
        self.pairs, self._usable = (), False
        parameter = next(iter(self.detector.parameters()), None)
        if parameter is None or parameter.dtype != torch.float32 or not any(map(_is_norm, self.detector.modules())):
            return
        batch = _noise(self.detector, parameter.device)
        with evaluating(self.detector), torch.autocast(parameter.device.type, enabled=False):
            try:
                found, expected = _find(self.detector, lambda: _outputs(self.detector, batch))
                pairs = tuple(_Pair(conv, norm) for conv, norm in found)
                with _folded(pairs):
                    outputs = _outputs(self.detector, _channels_last(batch))
            except Exception:  # a user's model may refuse noise, or views of maps that are not contiguous, with any error
                return
        self._usable = all(
            bool((one - other).abs().max() <= TOLERANCE * other.abs().max()) for one, other in zip(outputs, expected, strict=True)
        )
        self.pairs = pairs if self._usable else ()


@contextmanager
def _folded(pairs: tuple[_Pair, ...]) -> Iterator[None]:
    """Put folded weights into the convolutions, and let the norms pass them on."""
    own = [(pair.conv._parameters["weight"], pair.conv._parameters["bias"]) for pair in pairs]
    try:
        for pair in pairs:
            pair.conv._parameters.update(weight=cast(nn.Parameter, pair.weight), bias=cast(nn.Parameter, pair.bias))
            pair.norm.__dict__["forward"] = _activation(pair.norm)
        yield
    finally:
        for pair, (weight, bias) in zip(pairs, own, strict=True):
            pair.conv._parameters.update(weight=weight, bias=bias)
            pair.norm.__dict__.pop("forward", None)


def _activation(norm: Any) -> Callable[[Tensor], Tensor]:
    """What remains of a folded norm: nothing, or timm's activation."""
    return cast(Callable[[Tensor], Tensor], norm.act) if hasattr(norm, "act") else _same


def _same(maps: Tensor) -> Tensor:
    return maps


def _find(detector: Observing, run: Callable[[], list[Tensor]]) -> tuple[list[tuple[nn.Conv2d, nn.Module]], list[Tensor]]:
    """Pairs of a convolution and the norm that reads its output, each called once in ``run``; and the outputs of ``run``."""
    made: dict[nn.Conv2d, list[Any]] = {}
    read: dict[nn.Module, list[Any]] = {}
    hooks = []
    for module in detector.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            continue
        if isinstance(module, nn.Conv2d) and module._parameters.get("weight") is not None:
            hooks.append(module.register_forward_hook(lambda conv, _, output: made.setdefault(conv, []).append(output)))
        elif _is_norm(module):
            hooks.append(module.register_forward_pre_hook(lambda norm, inputs: read.setdefault(norm, []).append(inputs[0])))
    try:
        outputs = run()
    finally:
        for hook in hooks:
            hook.remove()
    makers = {id(maps): conv for conv, calls in made.items() if len(calls) == 1 for maps in calls}
    readers: dict[int, list[nn.Module]] = {}
    for norm, calls in read.items():
        for maps in calls:
            readers.setdefault(id(maps), []).append(norm)
    pairs = [(makers[key], norms[0]) for key, norms in readers.items() if key in makers and len(norms) == 1]
    return [(conv, norm) for conv, norm in pairs if len(read[norm]) == 1], outputs


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics and factors."""
    if not isinstance(module, nn.BatchNorm2d) and "FrozenBatchNorm" not in type(module).__name__:
        return False
    return all(getattr(module, name, None) is not None for name in ("weight", "bias", "running_mean", "running_var"))


def _outputs(detector: Observing, batch: Batch) -> list[Tensor]:
    """Maps, and the prediction of dense heads; others choose regions or queries, where a rounding error can change the choice."""
    dense = detector.spec.family == "dense"
    seen = detector.observe(batch, Look(prediction=dense))
    found = list(seen.features.maps)
    if isinstance(seen.prediction, Dense):
        found += [seen.prediction.logits, seen.prediction.boxes_xyxy]
    return found


def _noise(detector: Observing, device: torch.device) -> Batch:
    """A batch of one image of noise, of the detector's fixed size if it has one."""
    height, width = detector.spec.fixed_size_hw or (SIDE_PX, SIDE_PX)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    view = View((height, width), (height, width))
    return Batch(image, torch.tensor([[height, width]]), (nothing,), (0,), (view,)).to(device)


def contiguous(seen: Observation) -> Observation:
    """The observation with maps in torch's default layout, in which losses are computed."""

    def plain(features: Features) -> Features:
        return replace(features, maps=tuple(level.contiguous() for level in features.maps))

    below = None if seen.backbone_features is None else plain(seen.backbone_features)
    towers = tuple(map_tensors(tower, Tensor.contiguous) for tower in seen.towers)
    return replace(seen, features=plain(seen.features), backbone_features=below, towers=towers)


def _channels_last(batch: Batch) -> Batch:
    """The batch with images in the channels-last layout, on a CPU."""
    if batch.images.device.type != "cpu":
        return batch
    return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
