"""Base class of the adapters of transformers' DETR families.

A family's adapter derives from ``TransformersDetector`` and implements encoder and decoder. This file has the rest:
backbones, images and masks, assignment, losses by transformers' own criterion, detections by the rule of its image
processor, copies, export. In this file, *the library* is transformers.

The code below works around these properties of transformers 5:

- A ``TimmBackboneConfig`` cannot hold timm's keyword arguments, so a scaled resnet (``width``, ``channels``, ``stem``) is
  built as transformers' own ResNet of the same depth and widths (``backbone_config``).
- Half of the families replace each BatchNorm of the backbone by constants and freeze parameters of backbones whose type
  contains "resnet". ``fresh_model`` undoes both. Saved models still load into the library's constant norms.
- The matcher fails on a batch without boxes, so ``assign`` does not call it for such a batch.

Boxes of these models are fractions of the VALID image, not of the padded tensor: the library divides the ground-truth boxes
by the size of each image, and its position embeddings count valid cells only.

Shape letters: B images, L decoder layers, N queries, K classes, C = K or K+1 outputs, D width, S cells of all maps.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, generalized_box_iou_loss
from transformers.models.conditional_detr.modeling_conditional_detr import inverse_sigmoid as library_inverse_sigmoid

from detdistill.detectors.contract import Detector, DetectorSpec, Parts, Pyramid, query_positives
from detdistill.detectors.queries.shared.sampling import sample_by_cells
from detdistill.detectors.queries.shared.transformers_models import quiet, saved_state
from detdistill.detectors.single_cells import accept_single_cells
from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.functional.counting import number_of_ranks, share_over_ranks
from detdistill.functional.modes import evaluating
from detdistill.structures import (
    IGNORED,
    NEGATIVE,
    Assignment,
    Batch,
    Detections,
    Features,
    Losses,
    Origin,
    Positives,
    Prediction,
    Queries,
    QuerySeed,
    Resizing,
)

UNLIMITED = 100_000
"""Longest edge in pixels where there is no limit."""

Matches = list[tuple[Tensor, Tensor]]
"""The library's form of a matching: for each image the indices of the matched queries [M] and of their boxes [M]."""


class TransformersDetector(Detector):
    """Base class of all DETR families. ``model`` is the library's ``...ForObjectDetection``.

    A subclass implements ``backbone_maps``, ``encode``, ``seed``, ``decode`` and ``criterion``, and names its modules.
    """

    library = "transformers"
    backbone_modules: tuple[str, ...]
    """Dotted names, inside ``model``, of the modules before the neck."""
    neck_modules: tuple[str, ...]
    """Dotted names of projection and encoder."""
    head_modules: tuple[str, ...]
    """Dotted names of queries, decoder and outputs."""
    class_outputs: tuple[str, ...]
    """Dotted names of the modules with one output (row of weight and bias) per class; for head inheritance."""
    model_class: Any
    """The library's ``...ForObjectDetection`` of the family."""
    softmax = False
    """K+1 softmax outputs with the background last, or K sigmoid outputs."""
    class_term = "loss_ce"
    """Name of the classification loss in the library's criterion."""
    top_k: int | None = 100
    """Number of detections of an image in the library's image processor; None: the number of queries."""
    boxes_in_padding = False
    """The library's boxes are fractions of the padded tensor, not of the valid image."""
    image_processor = "DetrImageProcessor"
    """The library's image processor, which defines the selection of detections; exported with the model."""

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        score: float | None = None,
        dets: int | None = None,
    ) -> None:
        """Wrap a library model; its classes are those of its config.

        Args:
            model: library model; its parameters are named ``model.<the library's name>``.
            name: model string.
            mean: mean of the image normalisation.
            std: standard deviation of the image normalisation.
            score: score threshold of detections; None: no threshold.
            dets: maximum number of detections of an image; None: the family's rule (``top_k``).
        """
        super().__init__()
        accept_single_cells(model)
        sample_by_cells(model)
        self.model = model
        self.score = 0.0 if score is None else score
        self.dets = dets
        below = self.find_backbone_pyramid()
        self.backbone_strides = below.strides
        strides = self.neck_strides()
        self.spec = DetectorSpec(
            name=name,
            family="queries",
            classes=class_names(model.config),
            channels=(self.width,) * len(strides),
            strides=strides,
            softmax=self.softmax,
            mean=cast(tuple[float, float, float], tuple(mean)),
            std=cast(tuple[float, float, float], tuple(std)),
            backbone=below,
        )

    def parts(self) -> Parts:
        """Group the family's modules by name; all modules outside neck and head belong to the backbone."""
        present = dict(self.model.named_modules(remove_duplicate=False))

        def modules(names: Sequence[str]) -> tuple[nn.Module, ...]:
            return tuple(present[name] for name in names if name in present)

        return Parts(modules(self.backbone_modules), modules(self.neck_modules), modules(self.head_modules))

    @property
    def config(self) -> Any:
        """The library model's config."""
        return self.model.config

    @property
    def width(self) -> int:
        """Return the number of channels of each map of ``features``."""
        return int(self.config.d_model)

    def neck_strides(self) -> tuple[int, ...]:
        """Compute the strides of ``features``. Families with additional levels in the neck override this method."""
        return self.backbone_strides

    @torch.no_grad()
    def find_backbone_pyramid(self, size: int = 128) -> Pyramid:
        """Determine channels and strides of the backbone's maps by a run on an empty image; statistics stay unchanged."""
        parameter = next(self.model.parameters())
        image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        with evaluating(self.model):
            maps = self.backbone_maps(image, torch.ones(1, size, size, device=parameter.device, dtype=torch.int64))
        return Pyramid(tuple(level.shape[1] for level, _ in maps), tuple(size // level.shape[-1] for level, _ in maps))

    # --------------------------------------------------------------------------------------------- what a family gives

    @abstractmethod
    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Compute the input maps of the neck, each with its mask, as the library's backbone module returns them.

        Args:
            images: [B, 3, H, W] normalised.
            pixel_mask: [B, H, W] int64, 1 where the pixel is valid.

        Returns:
            For each map, finest first: [B, C_l, H_l, W_l] and bool [B, H_l, W_l], True where valid.
        """

    @abstractmethod
    def encode(self, features: Features) -> Features:
        """Run projection and encoder: convert the backbone's ``Features`` to the detector's."""

    @abstractmethod
    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """Compute the detector's own initial queries."""

    @abstractmethod
    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed, independently of earlier passes of the decoder."""

    @abstractmethod
    def criterion(self) -> Any:
        """Build a new instance of the library's criterion, which takes outputs and labels; the caller may replace ``matcher``."""

    def criterion_outputs(self, prediction: Queries) -> dict[str, Any]:
        """Convert a prediction to the input of the library's criterion; by default the outputs of all decoder layers."""
        layers = [
            {"logits": prediction.logits[layer], "pred_boxes": prediction.boxes_cxcywh01[layer]}
            for layer in layers_of(prediction)
        ]
        return layers[-1] | ({"auxiliary_outputs": layers[:-1]} if len(layers) > 1 else {})

    def term_weights(self) -> Mapping[str, float]:
        """Return the weights of the criterion's losses, by name without layer number. Losses without weight are monitors."""
        config = self.config
        return {"loss_ce": 1.0, "loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}

    def class_loss(self, logits: Tensor, wanted: Tensor, overlap: Tensor) -> Tensor:
        """Compute the family's classification loss [B, N] of each query, not normalised; by default the focal loss.

        Args:
            logits: [B, N, C] class logits.
            wanted: [B, N] target class of each query; K: no class.
            overlap: [B, N] IoU of the predicted and the matched box, no gradient; used by some families.
        """
        onehot = F.one_hot(wanted, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
        probability = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        missing = onehot * (1 - probability) + (1 - onehot) * probability
        alpha = self.config.focal_alpha
        return (entropy * missing**2 * (alpha * onehot + (1 - alpha) * (1 - onehot))).sum(dim=-1)

    def class_normalizer(self, wanted: Tensor, counted: Tensor, boxes: Tensor) -> Tensor:
        """Compute the divisor [] of the classification loss, used if the assignment has no normaliser.

        Args:
            wanted: [B, N] target class of each query; K: no class.
            counted: [B, N] mask, False for queries that the assignment ignores.
            boxes: [] divisor of the box losses.
        """
        return boxes

    # --------------------------------------------------------------------------------------------------------- features

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the input maps of the neck, with masks computed as in the library."""
        pixel_mask = (~batch.padding_mask()).long()
        maps = self.backbone_maps(self.normalized(batch), pixel_mask)
        padding = tuple(~mask for _, mask in maps)
        padded = any(bool(mask.any()) for mask in padding)
        return Features(tuple(level for level, _ in maps), self.backbone_strides, padding if padded else None)

    def features(self, batch: Batch) -> Features:
        """Compute the encoder's maps."""
        return self.neck(self.backbone_features(batch), batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run projection and encoder, with masks computed as in the library. Families with additional levels override this."""
        return self.encode(features)

    # -------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """Run the decoder on the detector's own queries."""
        return self.decode(features, self.seed(features, batch), batch, attention)

    @contextmanager
    def attention_maps(self, wanted: bool) -> Iterator[dict[str, bool]]:
        """Context in which attention layers return their maps, if wanted; gives the keyword argument that requests the maps.

        The library's faster forms of attention return no maps. The results differ by rounding.
        """
        if not wanted:
            yield {}
            return
        before = self.config._attn_implementation
        self.config._attn_implementation = "eager"
        try:
            yield {"output_attentions": True}
        finally:
            self.config._attn_implementation = before

    # ----------------------------------------------------------------------------------------------------------- training

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by the library's Hungarian matching in each decoder layer: [L, B, N]; nothing if a prediction is not finite."""
        queries = cast(Queries, prediction)
        matched = torch.full(queries.logits.shape[:3], NEGATIVE, device=queries.logits.device)
        labels = self.labels(batch)
        if not any(len(entry["boxes"]) for entry in labels):
            return Assignment(matched)  # the library's matcher fails on an empty cost matrix
        if diverged_losses(queries) is not None:
            return Assignment(matched)
        matcher = self.criterion().matcher
        for layer in layers_of(queries):
            outputs = {"logits": queries.logits[layer].detach(), "pred_boxes": queries.boxes_cxcywh01[layer].detach()}
            for image, (query, box) in enumerate(matcher(outputs, labels)):
                matched[layer, image, query.to(matched.device)] = box.to(matched.device)
        for image, target in enumerate(batch.targets):
            matched[:, image] = whole_indices(matched[:, image], target)
        return Assignment(matched)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the library's losses with its weights, for each decoder layer; losses without weight become monitors.

        The library's criterion computes the losses if the assignment contains only matches to trainable boxes. Assignments
        with weights, ignored queries, a normaliser or other matches use the same formulas, computed here: weights multiply
        the losses of each query and do not change the divisors, ignored queries do not count, and a normaliser replaces
        each divisor. The divisors are means over processes.
        """
        queries = cast(Queries, prediction)
        if assignment is None:
            assignment = self.assign(queries, batch)
        shares = self.shares(queries, batch, assignment)  # before anything that depends on values: all processes communicate
        if (diverged := diverged_losses(queries)) is not None:
            return diverged
        if self.is_plain(assignment, batch):
            return self.shared_out(self.criterion_losses(queries, batch, assignment), shares)
        return self.shared_out(self.weighted_losses(queries, batch, assignment), shares)

    def shares(self, queries: Queries, batch: Batch, assignment: Assignment) -> tuple[Tensor | float, Tensor | float]:
        """Factors that make this process's divisors means over processes: of the box losses [], and of the class losses [L]."""
        if assignment.normalizer is not None or number_of_ranks() == 1:
            return 1.0, 1.0
        boxes, divisors = queries.logits.new_tensor(float(sum(len(trainable(target)) for target in batch.targets))), []
        for matched in assignment.matched:
            wanted, counted = torch.full_like(matched, len(self.spec.classes)), matched != IGNORED
            for image, target in enumerate(batch.targets):
                positive = matched[image] >= 0
                wanted[image, positive] = target.labels[matched[image, positive]].to(wanted)
            divisors.append(self.class_normalizer(wanted, counted, boxes))
        share = share_over_ranks(boxes)
        if all(divisor is boxes for divisor in divisors):
            return share, torch.as_tensor(share).expand(len(divisors))
        return share, share_over_ranks(torch.stack(divisors), least=1e-6)

    def shared_out(self, losses: Losses, shares: tuple[Tensor | float, Tensor | float]) -> Losses:
        """Multiply the terms of each layer by the factors of ``shares``."""
        boxes, classes = shares
        if isinstance(classes, float):  # a single process
            return losses
        terms = {}
        for name, term in losses.terms.items():
            layer = int(name.rpartition("_")[2]) if kind_of(name) != name else -1
            terms[name] = term * (classes[layer] if kind_of(name) == self.class_term else boxes)
        return Losses(terms, losses.monitors)

    def is_plain(self, assignment: Assignment, batch: Batch) -> bool:
        """Whether an assignment contains only matches to trainable boxes, so that the library's criterion can use it."""
        if assignment.weights is not None or assignment.normalizer is not None or bool((assignment.matched == IGNORED).any()):
            return False
        for image, target in enumerate(batch.targets):
            used = assignment.matched[:, image]
            if not bool(torch.isin(used[used >= 0], trainable(target)).all()):
                return False
        return True

    def criterion_losses(self, queries: Queries, batch: Batch, assignment: Assignment) -> Losses:
        """Compute the library's criterion under given matches."""
        criterion = self.criterion().to(queries.logits.device)
        layers = list(layers_of(queries))
        criterion.matcher = GivenMatches([self.criterion_matches(assignment.matched[layer], batch) for layer in layers])
        return self.weighed(criterion(self.criterion_outputs(queries), self.labels(batch)))

    def weighed(self, found: Mapping[str, Tensor]) -> Losses:
        """Multiply the criterion's losses by their weights; losses without weight become monitors."""
        weights = self.term_weights()
        terms = {key: value * weights[kind_of(key)] for key, value in found.items() if kind_of(key) in weights}
        monitors = {key: value.detach() for key, value in found.items() if kind_of(key) not in weights}
        return Losses(terms, monitors)

    def criterion_matches(self, matched: Tensor, batch: Batch) -> Matches:
        """Convert matches [B, N] of one layer to the library's form, as indices into ``labels``; queries in ascending order."""
        matches = []
        for row, target in zip(matched, batch.targets, strict=True):
            query = torch.nonzero(row >= 0).flatten()
            number = torch.full((max(1, len(target)),), NEGATIVE, device=row.device)
            kept = trainable(target)
            number[kept] = torch.arange(len(kept), device=row.device)
            matches.append((query, number[row[query]]))
        return matches

    def weighted_losses(self, queries: Queries, batch: Batch, assignment: Assignment) -> Losses:
        """Compute the criterion's formulas with weights, ignored queries and a normaliser."""
        labels = self.labels(batch, only_trainable=False)
        count = sum(len(trainable(target)) for target in batch.targets)
        boxes_divisor = queries.logits.new_tensor(float(max(1, count)))
        weights = torch.ones_like(queries.logits[..., 0]) if assignment.weights is None else assignment.weights
        term_weights, terms = self.term_weights(), {}
        for layer in layers_of(queries):
            matched, weight = assignment.matched[layer], weights[layer]
            counted = matched != IGNORED
            image, query = torch.nonzero(matched >= 0, as_tuple=True)
            index = matched[image, query]
            pairs = list(zip(image.tolist(), index.tolist(), strict=True))
            target = torch.stack([labels[i]["boxes"][j] for i, j in pairs]) if pairs else queries.boxes_cxcywh01.new_zeros(0, 4)
            wanted = torch.full_like(matched, len(self.spec.classes))
            wanted[image, query] = torch.tensor(
                [int(labels[i]["class_labels"][j]) for i, j in pairs], device=matched.device, dtype=wanted.dtype
            )
            predicted = queries.boxes_cxcywh01[layer][image, query]
            corners, target_corners = corners_of(predicted), corners_of(target)
            overlap = torch.zeros_like(weight)
            overlap[image, query] = box_iou(corners.detach(), target_corners).diagonal().to(overlap.dtype)
            divisor = boxes_divisor if assignment.normalizer is None else assignment.normalizer
            class_divisor = divisor if assignment.normalizer is not None else self.class_normalizer(wanted, counted, divisor)
            found = {
                self.class_term: (self.class_loss(queries.logits[layer], wanted, overlap) * weight * counted).sum()
                / class_divisor,
                "loss_bbox": ((predicted - target).abs().sum(dim=-1) * weight[image, query]).sum() / divisor,
                "loss_giou": (generalized_box_iou_loss(corners, target_corners) * weight[image, query]).sum() / divisor,
            }
            suffix = "" if layer == len(queries.logits) - 1 else f"_{layer}"
            terms.update({f"{key}{suffix}": value * term_weights[key] for key, value in found.items()})
        return Losses(terms)

    def labels(self, batch: Batch, only_trainable: bool = True) -> list[dict[str, Tensor]]:
        """Convert targets to the library's form: ``class_labels`` [G], ``boxes`` [G, 4] (cxcywh, fractions of the valid image).

        Args:
            batch: batch with targets.
            only_trainable: True: leave out crowd and empty boxes; False: keep all boxes, so that the indices of an
                ``Assignment`` stay valid.
        """
        found = []
        for target, (height, width) in zip(batch.targets, batch.sizes.tolist(), strict=True):
            keep = trainable(target) if only_trainable else slice(None)
            boxes = target.boxes_xyxy[keep].to(batch.images.dtype)
            boxes = box_convert(boxes, "xyxy", "cxcywh") / boxes.new_tensor([width, height, width, height])
            found.append({"class_labels": target.labels[keep], "boxes": boxes})
        return found

    # ------------------------------------------------------------------------------------------------------------ results

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the last layer's detections as the library's image processor does, best first, clipped to the valid image.

        Softmax: the best class of each query. Sigmoid: the best ``top_k`` pairs of query and class, so a query can give
        several detections. ``origin.anchor`` is the index of the query; level and cell are -1.
        """
        queries = cast(Queries, prediction)
        logits = queries.logits[-1]
        probabilities = logits.softmax(dim=-1)[..., :-1] if self.softmax else logits.sigmoid()
        found = []
        for image, (height, width) in enumerate(batch.sizes.tolist()):
            probability, boxes = probabilities[image], queries.boxes_cxcywh01[-1, image]
            if self.softmax:
                scores, labels = probability.max(dim=-1)
                scores, query = scores.sort(descending=True, stable=True)
                labels = labels[query]
            else:
                limit = self.dets or self.top_k or len(probability)
                scores, place = probability.flatten().topk(min(limit, probability.numel()))
                query, labels = place // probability.shape[1], place % probability.shape[1]
            keep = torch.nonzero(scores > self.score).flatten()[: self.dets]
            scores, labels, query = scores[keep], labels[keep], query[keep]
            corners = corners_of(boxes[query]) * boxes.new_tensor([width, height, width, height])
            nowhere = torch.full_like(query, -1)
            origin = Origin(torch.full_like(query, image), nowhere, nowhere[:, None].repeat(1, 2), query, nowhere)
            found.append(Detections(clip_boxes_to_image(corners, (height, width)), scores, labels, origin))
        return found

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the predictions of all layers that ``assignment`` matches to a ground-truth box."""
        return query_positives(cast(Queries, prediction), assignment, batch)

    # ------------------------------------------------------------------------------------------------------------- copies

    def copy_head(self, fresh: bool = False) -> TransformersDetector:
        """Copy the head into a detector with parameters of its own, without backbone and neck; ``fresh``: newly initialised."""
        return self.without((*self.backbone_modules, *self.neck_modules), fresh)

    def copy_neck(self, fresh: bool = False) -> EncoderNeck:
        """Copy projection and encoder into a module with trainable parameters of its own; ``fresh``: newly initialised."""
        return EncoderNeck(self.without((*self.backbone_modules, *self.head_modules), fresh))

    def without(self, modules: Sequence[str], fresh: bool) -> TransformersDetector:
        """Copy the detector without some of its modules, trainable and in training mode.

        Args:
            modules: dotted names, inside ``model``, of the modules to leave out; missing modules are skipped.
            fresh: initialise the weights randomly, by the library's rules.
        """
        present = dict(self.model.named_modules(remove_duplicate=False))
        gone: dict[int, Any] = {id(present[name]): nn.Identity() for name in modules if name in present}
        other = copy.deepcopy(self, gone).requires_grad_(True).train()
        if fresh:
            parameter = next(self.parameters())
            config = copy.deepcopy(self.config)
            if getattr(config, "backbone_config", None) is not None:
                # The model's choice of attention is handed down to this config, and a convolutional backbone refuses it.
                config.backbone_config._attn_implementation = None
            made = type(self.model)(config).to(parameter)
            state = made.state_dict()
            other.model.load_state_dict({name: state[name] for name in other.model.state_dict()})
        return other

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows of the class outputs of each class; see ``inherit``."""
        if not any(name.startswith(f"model.{part}.") for part in self.class_outputs):
            return None
        return torch.arange(len(self.spec.classes))[:, None]

    # -------------------------------------------------------------------------------------------------------------- files

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Write the library's files: ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

        ``transformers.AutoModelForObjectDetection.from_pretrained(folder)`` loads them without this package. Its image
        processor resizes images itself if ``resizing`` is given.
        """
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
            with quiet():
                self.model.save_pretrained(temporary, state_dict=saved_state(self.model))
            processor = {
                "image_processor_type": self.image_processor,
                **processor_sizes(resizing),
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(self.spec.mean),
                "image_std": list(self.spec.std),
            }
            Path(temporary, "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
            for path in sorted(Path(temporary).iterdir()):
                os.replace(path, folder / path.name)

    def usage(self, resizing: Resizing | None = None) -> str:
        """Explain the use in the library."""
        sizes, notes = "image.shape[-2:]", ["This needs torch, torchvision and transformers."]
        if resizing is None:
            notes.append("The image processor does not resize: resize images as in training.")
        elif resizing.resize == "short_side":
            notes.append(
                "The image processor rounds the longer side down and does not pad to a multiple of 32 as the training did, so "
                "results differ a little; detectors of the RT-DETR kind and LW-DETR refuse some sizes. `detdistill predict` pads."
            )
        else:
            if resizing.resize == "letterbox":
                notes.append("The image processor resizes as the training did, but rounds the shorter side down to whole pixels.")
            padded = padded_side(resizing.size)
            if self.boxes_in_padding and resizing.resize == "letterbox":
                sizes = f"(max(image.shape[-2:]) * {padded} / {resizing.size},) * 2"
            elif self.boxes_in_padding and padded != resizing.size:
                sizes = f"[side * {padded} / {resizing.size} for side in image.shape[-2:]]"
            if sizes != "image.shape[-2:]":
                notes.append("`size` is that of the padded image in pixels of the given image, of which the boxes are fractions.")
        return f"{USAGE.format(size=sizes)}\n\n{' '.join(notes)}"


USAGE = """```python
import torch
from torchvision.io import ImageReadMode, decode_image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
model = AutoModelForObjectDetection.from_pretrained("path/to/this/folder").eval()
image = decode_image("image.jpg", ImageReadMode.RGB)  # [3, H, W] uint8
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
size = torch.tensor({size})
found = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=size[None])[0]
names = [model.config.id2label[int(label)] for label in found["labels"]]
```"""
"""How to use an exported folder with the library."""


class EncoderNeck(nn.Module):
    """Projection and encoder of a detector: maps backbone ``Features`` to the detector's."""

    def __init__(self, detector: TransformersDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, features: Features) -> Features:
        """Compute the detector's features from the backbone's."""
        return self.detector.encode(features)


class GivenMatches(nn.Module):
    """Replacement of the library's matcher with given matches: the last layer first, then the others in order."""

    def __init__(self, layers: Sequence[Matches]) -> None:
        super().__init__()
        self.waiting = [layers[-1], *layers[:-1]]

    def forward(self, outputs: Any, targets: Any) -> Matches:
        """Return the matches of the next layer."""
        return self.waiting.pop(0)


def padded_side(side: int) -> int:
    """Return the next multiple of 32."""
    return -(-side // 32) * 32


def processor_sizes(resizing: Resizing | None) -> dict[str, Any]:
    """Return the settings of the library's image processors for resizing and padding; None: images keep their size.

    The library rounds the shorter side of a letterbox down, and this package to the nearest pixel. With ``short_side`` it pads
    to the largest image of a batch, and this package to a multiple of 32.
    """
    if resizing is None:
        return {"do_resize": False, "do_pad": True}
    side = resizing.size
    padded = padded_side(side)
    sizes: dict[str, dict[str, int]] = {
        "letterbox": {"max_height": side, "max_width": side},
        "stretch": {"height": side, "width": side},
        # The library needs both edges: without a limit, one that no image reaches.
        "short_side": {"shortest_edge": side, "longest_edge": resizing.max_size or UNLIMITED},
    }
    found = {"do_resize": True, "resample": 2, "size": sizes[resizing.resize], "do_pad": True}
    return found if resizing.resize == "short_side" else {**found, "pad_size": {"height": padded, "width": padded}}


def focal_criterion(config: Any, matcher_class: Any, criterion_class: Any) -> Any:
    """Build the criterion of Deformable, Conditional and DAB-DETR from the library's classes that the caller imported."""
    matcher = matcher_class(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
    return criterion_class(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes", "cardinality"])


# ------------------------------------------------------------------------------------------------------------ small parts


def diverged_losses(prediction: Prediction) -> Losses | None:
    """The term ``prediction``, which is NaN, if a logit or a box is not finite; None otherwise.

    The library's matching and box losses fail on such numbers. A loss that is not finite stops training in the usual way.
    """
    queries = cast(Queries, prediction)
    if bool(torch.isfinite(queries.logits).all()) and bool(torch.isfinite(queries.boxes_cxcywh01).all()):
        return None
    return Losses({"prediction": (queries.logits.sum() + queries.boxes_cxcywh01.sum()) * torch.nan})


def layers_of(queries: Queries) -> range:
    """Return the indices of the decoder layers."""
    return range(len(queries.logits))


def kind_of(name: str) -> str:
    """Remove the layer number from the name of a loss: ``loss_ce_2`` -> ``loss_ce``."""
    head, _, tail = name.rpartition("_")
    return head if tail.isdigit() else name


def corners_of(boxes_cxcywh: Tensor) -> Tensor:
    """Convert boxes [..., 4] from cxcywh to xyxy."""
    return box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def class_names(config: Any) -> tuple[str, ...]:
    """Return the class names of a config, in label order."""
    return tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels))


def valid_masks(features: Features) -> tuple[Tensor, ...]:
    """Compute the library's mask [B, H_l, W_l] of each map: True for cells inside the image."""
    if features.padding is not None:
        return tuple(~mask for mask in features.padding)
    return tuple(torch.ones_like(level[:, 0], dtype=torch.bool) for level in features.maps)


def flat_map(level: Tensor) -> Tensor:
    """Convert a map [B, D, H, W] to a sequence [B, H*W, D]."""
    return level.flatten(2).transpose(1, 2)


def as_map(sequence: Tensor, like: Tensor) -> Tensor:
    """Convert a sequence [B, H*W, D] to a map [B, D, H, W] with the size of another map."""
    return sequence.transpose(1, 2).reshape(sequence.shape[0], sequence.shape[2], *like.shape[-2:])


def inverse_sigmoid(value: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the logit of a value in 0..1, clamped by ``eps`` at both ends, with the same rounding as the library's function."""
    return library_inverse_sigmoid(value, eps)


def full_precision(tensor: Tensor) -> Tensor:
    """Convert to float32 under mixed precision, else keep the dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
