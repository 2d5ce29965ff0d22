"""Base of YOLOX and YOLO9 of libreyolo: features, detections, positives, copies, export.

Shape letters: B images, P predictions of an image, K classes, C outputs of the network for classes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detdistill.detectors.contract import DenseCoding, Detector, DetectorSpec, Parts, Pyramid, dense_positives
from detdistill.detectors.options import ModelOptions
from detdistill.detectors.single_cells import accept_single_cells
from detdistill.detectors.torchvision.images import coarser_padding, image_sizes, with_padding
from detdistill.detectors.yolo.shared.common import DESCRIPTION, detections_at, grey_padded, output_names, points_of, reset
from detdistill.detectors.yolo.shared.libreyolo_networks import save_pt
from detdistill.detectors.yolo.shared.selection import select_clipped
from detdistill.files import write_atomically
from detdistill.functional.modes import evaluating
from detdistill.structures import (
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Losses,
    Positives,
    Prediction,
    Resizing,
)
from detdistill.values import Count, Fraction, Index, Positive


@dataclass(frozen=True, kw_only=True)
class LibreYOLOOptions(ModelOptions):
    """Options of the package's networks."""

    score: Fraction = 0.001
    """Detections score above this."""
    iou: Fraction = 0.6
    """Of two boxes of one class with a larger IoU, the one with the higher score stays."""
    dets: Count = 300
    """Maximum number of detections of an image."""
    width: Positive | None = None
    """Multiplier of YOLOX's channels, instead of the size's own."""
    depth: Positive | None = None
    """Multiplier of YOLOX's repeated blocks, instead of the size's own."""
    l1: Index | None = None
    """Number of epochs at the end in which YOLOX's box outputs have an L1 loss, too; default: 15."""


class LibreNetwork(Detector):
    """Base of both kinds of network. The prediction is one box for each cell."""

    library = "libreyolo"
    columns: Tensor
    """[K] index of the network's output for each class."""
    box_bins = 0
    """Bins of each side of a box; 0: sides are numbers."""
    has_quality = False
    """Whether predictions have an objectness."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    single_label: bool
    """Whether a prediction becomes at most one detection, of its best class."""
    by_level: bool
    """Whether the package computes scores level by level."""

    def __init__(
        self,
        model: Any,
        description: dict[str, Any],
        classes: Sequence[str],
        options: LibreYOLOOptions,
        name: str,
        columns: Sequence[int] | None = None,
    ) -> None:
        """Wrap a network of the package.

        Args:
            model: the network.
            description: what it was built from, for ``export``; see ``libreyolo_networks.build_network``.
            classes: names of the K classes, in label order.
            options: thresholds, and the epochs of the L1 loss.
            name: model string.
            columns: output of each class; None: 0 .. K-1.
        """
        super().__init__()
        accept_single_cells(model)
        self.model, self.description, self.options = model, description, options
        wanted = list(range(len(classes))) if columns is None else list(columns)
        self.register_buffer("columns", torch.tensor(wanted, dtype=torch.int64), persistent=False)
        features, backbone = self._pyramids()
        self.spec = DetectorSpec(
            name=name,
            family="dense",
            classes=tuple(classes),
            channels=features.channels,
            strides=features.strides,
            mean=self.mean,
            std=self.std,
            backbone=backbone,
            anchors=(1,) * len(features.strides),
            box_bins=self.box_bins,
            coding=DenseCoding(quality=self.has_quality),
        )

    @property
    def head(self) -> Any:
        """The package's head."""
        return self.model.head

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of the network's outputs for classes."""

    # --------------------------------------------------------------------------------------------------------- features

    def network_input(self, images: Tensor) -> Tensor:
        """Colours in the order and range of the package, from images [B, 3, H, W] of RGB in 0..1."""
        return images

    @abstractmethod
    def backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of the backbone, from ``network_input``."""

    @abstractmethod
    def pyramid(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The maps that the head reads, from those of the backbone."""

    def normalized(self, batch: Batch) -> Tensor:
        """[B, 3, H, W] the network's input: padding is grey, and there is some to whole cells of each level."""
        return self.network_input(grey_padded(batch, max(self.spec.strides)))

    def features(self, batch: Batch) -> Features:
        """Compute the maps that the head reads."""
        return self.neck(self.backbone_features(batch), batch)

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the maps of the backbone that the neck reads."""
        assert self.spec.backbone is not None
        return with_padding(self.backbone(self.normalized(batch)), self.spec.backbone.strides, batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run the layers between backbone and head."""
        return with_padding(self.pyramid(features.maps), self.spec.strides, batch)

    @torch.no_grad()
    def _pyramids(self) -> tuple[Pyramid, Pyramid]:
        """Channels and strides of the head's maps and of the backbone's, by a run on an empty image."""
        size = 256
        with evaluating(self.model):
            below = self.backbone(next(self.model.parameters()).new_zeros(1, 3, size, size))
            both = self.pyramid(below), below
        features, backbone = (
            Pyramid(tuple(one.shape[1] for one in maps), tuple(size // one.shape[-1] for one in maps)) for maps in both
        )
        return features, backbone

    # ------------------------------------------------------------------------------------------------------- prediction

    def priors(self, levels: Tensor, cells: Tensor, like: Tensor) -> Tensor:
        """[P, 4] square of one stride around the centre of each prediction's cell, in pixels."""
        points, strides = points_of(levels, cells, self.spec.strides, like)
        return torch.cat([points - 0.5, points + 0.5], dim=-1) * strides

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the predictions that ``assignment`` matches to a ground-truth box."""
        return dense_positives(cast(Dense, prediction), assignment, batch)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the losses under an assignment, by default the detector's own (see ``loss_terms``)."""
        dense = cast(Dense, prediction)
        return Losses(self.loss_terms(dense, batch, self.assign(dense, batch) if assignment is None else assignment))

    @abstractmethod
    def loss_terms(self, dense: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute the loss terms with the package's weights."""

    @abstractmethod
    def boxes_and_scores(self, dense: Dense, sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid) -> tuple[Tensor, Tensor]:
        """Boxes [B, P, 4] in pixels, not clipped, and scores [B, P, K], with the arithmetic of the package's inference.

        Args:
            dense: the prediction.
            sigmoid: applied to outputs [B, P, C].
        """

    def sigmoid_of(self, dense: Dense) -> Callable[[Tensor], Tensor]:
        """The sigmoid on tensors of the shapes that the package has: on a CPU its last bit depends on an element's place."""
        counts = dense.levels.bincount().tolist() if self.by_level else [len(dense.levels)]

        def sigmoid(outputs: Tensor) -> Tensor:
            pieces = [piece.transpose(1, 2).contiguous().sigmoid() for piece in outputs.split(counts, dim=1)]
            return torch.cat(pieces, dim=2).transpose(1, 2)

        return sigmoid

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections as the package does: clip to the image, drop empty boxes, NMS within each class."""
        dense, options = cast(Dense, prediction), self.options
        boxes, scores = self.boxes_and_scores(dense, self.sigmoid_of(dense))
        found = []
        for image, size in enumerate(image_sizes(batch)):
            mine, index, labels, score = select_clipped(
                boxes[image],
                scores[image],
                size,
                single_label=self.single_label,
                threshold=options.score,
                iou=options.iou,
                most=options.dets,
            )
            found.append(detections_at(mine, score, labels, index, image, dense, size))
        return found

    # ----------------------------------------------------------------------------------------------------------- copies

    @abstractmethod
    def parts(self) -> Parts:
        """Group the modules; backbone, neck and head are the package's own."""

    @abstractmethod
    def reset_head(self) -> None:
        """Initialise the head anew, with the package's biases."""

    def copy_head(self, fresh: bool = False) -> Self:
        """Copy the head into a detector with parameters of its own; ``fresh``: newly initialised. It cannot compute features."""
        parts = self.parts()
        head = self._without((*parts.backbone, *parts.neck))
        if fresh:
            head.reset_head()
        return head

    def copy_neck(self, fresh: bool = False) -> LibreNeck:
        """Copy the layers between backbone and head into a module; ``fresh``: newly initialised."""
        parts = self.parts()
        neck = LibreNeck(self._without((*parts.backbone, *parts.head)))
        if fresh:
            reset(neck)
        return neck

    def _without(self, modules: Sequence[nn.Module]) -> Self:
        """A trainable copy in which these modules have no parameters."""
        nothing: dict[int, Any] = {id(module): nn.Identity() for module in modules}
        return copy.deepcopy(self, nothing).requires_grad_(True).train()

    # ----------------------------------------------------------------------------------------------------------- export

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Write ``model.safetensors`` (the package's names) and ``network.json`` (its description, all class names)."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))
        options = {key: value for key, value in dataclasses.asdict(self.options).items() if key != "name"}
        content = {"description": self.description, "names": self.output_names(), "options": options}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(folder / DESCRIPTION, lambda path: path.write_text(text, encoding="utf-8"))

    def output_names(self) -> list[str]:
        """Class of each output of the network; a number for outputs that the detector ignores."""
        return output_names(self.outputs, self.columns, self.spec.classes)

    @property
    def save_pt(self) -> Callable[[Path], None] | None:
        """Writes a file that ``libreyolo.LibreYOLO(path)`` opens; None with own width or depth, which such a file cannot hold."""
        if "width" in self.description:
            return None
        return partial(save_pt, self.description, self.model.state_dict(), self.output_names())


class LibreNeck(nn.Module):
    """The layers between backbone and head; maps backbone ``Features`` to neck ``Features``."""

    def __init__(self, network: LibreNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Features) -> Features:
        """Compute the maps that the head reads."""
        strides = self.network.spec.strides
        return Features(self.network.pyramid(features.maps), strides, coarser_padding(features, strides))
