"""What the adapters of transformers' DETR families share.

A family's adapter derives from ``TransformersDetector`` and says how its library model encodes and decodes; everything
else is here: backbones and their traps, images and masks, matching as a value, losses by the library's own criterion,
detections by its image processor's rule, copies, files.

Facts of transformers 5 that the code below answers:

- A ``TimmBackboneConfig`` cannot hold timm's keyword arguments, so a scaled resnet (``width``, ``channels``, ``stem``) is
  built as transformers' own ResNet of the same depth and widths (``backbone_config``).
- Half of the families turn every BatchNorm of the backbone into constants and freeze parameters of backbones whose type
  contains "resnet": ``fresh_model`` undoes both. What is saved still loads into the library's constants.
- The matcher fails on a batch without any box; ``assign`` does not ask it then.

Boxes of these models are parts of the VALID image, not of the padded tensor: the library trains them on boxes divided by
each image's own size, and its position embeddings count valid cells only.

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
from detdistill.detectors.queries.shared.transformers_models import quiet, saved_state
from detdistill.detectors.torchvision.targets import trainable, whole_indices
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
)

Matches = list[tuple[Tensor, Tensor]]
"""The library's form of a matching: for each image the queries [M] and the boxes [M] they answer for."""


class TransformersDetector(Detector):
    """The parts that are the same for all DETR families. ``model`` is the library's ``...ForObjectDetection``.

    A family gives ``backbone_maps``, ``encode``, ``seed``, ``decode`` and ``criterion``, and the names of its modules.
    """

    backbone_modules: tuple[str, ...]
    """Dotted names, inside ``model``, of what runs before the neck."""
    neck_modules: tuple[str, ...]
    """Dotted names of projection and encoder."""
    head_modules: tuple[str, ...]
    """Dotted names of queries, decoder and outputs."""
    class_outputs: tuple[str, ...]
    """Dotted names of the modules whose outputs (rows of weight and bias) are classes; for head inheritance."""
    model_class: Any
    """The library's ``...ForObjectDetection`` of the family."""
    softmax = False
    """K+1 softmax outputs with the background last, or K sigmoid outputs."""
    class_term = "loss_ce"
    """The name of the classification loss in the library's criterion."""
    top_k: int | None = 100
    """Detections of an image by the library's image processor; None: as many as queries."""
    image_processor = "DetrImageProcessor"
    """The library's image processor, whose rule for detections is the family's; exported beside the model."""

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
            model: its parameters keep their names below ``model.``.
            name: as the command line writes it.
            mean: of the normalisation.
            std: of the normalisation.
            score: detections must score above this; None: any.
            dets: detections of an image at most; None: the family's rule (``top_k``).
        """
        super().__init__()
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
        """The family's modules by name; what is neither neck nor head is the backbone's."""
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
        """Channels of every map of ``features``."""
        return int(self.config.d_model)

    def neck_strides(self) -> tuple[int, ...]:
        """Strides of ``features``; families whose neck adds levels override it."""
        return self.backbone_strides

    @torch.no_grad()
    def find_backbone_pyramid(self, size: int = 128) -> Pyramid:
        """Channels and strides of the backbone's maps, found out by an empty image (statistics stay untouched)."""
        parameter = next(self.model.parameters())
        image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        with evaluating(self.model):
            maps = self.backbone_maps(image, torch.ones(1, size, size, device=parameter.device, dtype=torch.int64))
        return Pyramid(tuple(level.shape[1] for level, _ in maps), tuple(size // level.shape[-1] for level, _ in maps))

    # --------------------------------------------------------------------------------------------- what a family gives

    @abstractmethod
    def backbone_maps(self, images: Tensor, pixel_mask: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The maps that enter the neck, each with its mask, as the library's backbone module returns them.

        Args:
            images: [B, 3, H, W] normalised.
            pixel_mask: [B, H, W] int64, 1 where the pixel is valid.

        Returns:
            For each map, finest first: [B, C_l, H_l, W_l] and bool [B, H_l, W_l], True where valid.
        """

    @abstractmethod
    def encode(self, features: Features) -> Features:
        """Projection and encoder: backbone ``Features`` to the detector's. Needs nothing but them."""

    @abstractmethod
    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """The detector's own initial queries."""

    @abstractmethod
    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed; a second pass of the decoder, which knows nothing of an earlier one."""

    @abstractmethod
    def criterion(self) -> Any:
        """The library's criterion, fresh: called with outputs and labels, its ``matcher`` may be replaced."""

    def criterion_outputs(self, prediction: Queries) -> dict[str, Any]:
        """What the library's criterion reads; the default has all decoder layers and nothing else."""
        layers = [
            {"logits": prediction.logits[layer], "pred_boxes": prediction.boxes_cxcywh01[layer]}
            for layer in layers_of(prediction)
        ]
        return layers[-1] | ({"auxiliary_outputs": layers[:-1]} if len(layers) > 1 else {})

    def term_weights(self) -> Mapping[str, float]:
        """Weight of each of the criterion's losses, by its name without the layer's number; others are monitors."""
        config = self.config
        return {"loss_ce": 1.0, "loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}

    def class_loss(self, logits: Tensor, wanted: Tensor, overlap: Tensor) -> Tensor:
        """[B, N] the family's classification loss of each query, not normalised; the default is the focal loss.

        Args:
            logits: [B, N, C].
            wanted: [B, N] the class, or K for none.
            overlap: [B, N] IoU of the predicted with the matched box, no gradient; for families that need it.
        """
        onehot = F.one_hot(wanted, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
        probability = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        missing = onehot * (1 - probability) + (1 - onehot) * probability
        alpha = self.config.focal_alpha
        return (entropy * missing**2 * (alpha * onehot + (1 - alpha) * (1 - onehot))).sum(dim=-1)

    def class_normalizer(self, wanted: Tensor, counted: Tensor, boxes: Tensor) -> Tensor:
        """[] what the classification loss is divided by, unless the assignment says.

        Args:
            wanted: [B, N] the class, or K for none.
            counted: [B, N] bool, False where the assignment ignores a query.
            boxes: [] the divisor of the box losses.
        """
        return boxes

    # --------------------------------------------------------------------------------------------------------- features

    def backbone_features(self, batch: Batch) -> Features:
        """The backbone's maps that enter the neck; masks as the library makes them."""
        pixel_mask = (~batch.padding_mask()).long()
        maps = self.backbone_maps(self.normalized(batch), pixel_mask)
        padding = tuple(~mask for _, mask in maps)
        padded = any(bool(mask.any()) for mask in padding)
        return Features(tuple(level for level, _ in maps), self.backbone_strides, padding if padded else None)

    def features(self, batch: Batch) -> Features:
        """The encoder's maps."""
        return self.neck(self.backbone_features(batch), batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Projection and encoder, with masks as the library makes them; families whose neck adds levels override it."""
        return self.encode(features)

    # -------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """The decoder on the detector's own queries."""
        return self.decode(features, self.seed(features, batch), batch, attention)

    @contextmanager
    def attention_maps(self, wanted: bool) -> Iterator[dict[str, bool]]:
        """Inside, attention runs in the form that yields its maps, if wanted; gives the argument that asks for them.

        The library's faster forms yield none. Values differ by rounding.
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
        """The library's Hungarian matching of every layer: [L, B, N]."""
        queries = cast(Queries, prediction)
        matched = torch.full(queries.logits.shape[:3], NEGATIVE, device=queries.logits.device)
        labels = self.labels(batch)
        if not any(len(entry["boxes"]) for entry in labels):
            return Assignment(matched)  # the library's matcher cannot reshape an empty cost matrix
        matcher = self.criterion().matcher
        for layer in layers_of(queries):
            outputs = {"logits": queries.logits[layer].detach(), "pred_boxes": queries.boxes_cxcywh01[layer].detach()}
            for image, (query, box) in enumerate(matcher(outputs, labels)):
                matched[layer, image, query.to(matched.device)] = box.to(matched.device)
        for image, target in enumerate(batch.targets):
            matched[:, image] = whole_indices(matched[:, image], target)
        return Assignment(matched)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """The library's losses with its weights, for every decoder layer; the others of its criterion as monitors.

        A plain assignment (matches only) goes through the library's criterion, whoever made it. With weights, ignored
        queries, a normalizer, or matches to boxes that training leaves out, the same formulas are computed here: weights
        multiply each query's losses and leave the divisors alone, ignored queries count nowhere, and a normalizer takes the
        place of every divisor.
        """
        queries = cast(Queries, prediction)
        if assignment is None:
            assignment = self.assign(queries, batch)
        if self.is_plain(assignment, batch):
            return self.criterion_losses(queries, batch, assignment)
        return self.weighted_losses(queries, batch, assignment)

    def is_plain(self, assignment: Assignment, batch: Batch) -> bool:
        """True when the library's criterion can express an assignment: matches to trainable boxes, and nothing else."""
        if assignment.weights is not None or assignment.normalizer is not None or bool((assignment.matched == IGNORED).any()):
            return False
        for image, target in enumerate(batch.targets):
            used = assignment.matched[:, image]
            if not bool(torch.isin(used[used >= 0], trainable(target)).all()):
                return False
        return True

    def criterion_losses(self, queries: Queries, batch: Batch, assignment: Assignment) -> Losses:
        """The library's criterion under given matches."""
        criterion = self.criterion().to(queries.logits.device)
        layers = list(layers_of(queries))
        criterion.matcher = GivenMatches([self.criterion_matches(assignment.matched[layer], batch) for layer in layers])
        return self.weighed(criterion(self.criterion_outputs(queries), self.labels(batch)))

    def weighed(self, found: Mapping[str, Tensor]) -> Losses:
        """A criterion's losses times their weights; those without weight as monitors."""
        weights = self.term_weights()
        terms = {key: value * weights[kind_of(key)] for key, value in found.items() if kind_of(key) in weights}
        monitors = {key: value.detach() for key, value in found.items() if kind_of(key) not in weights}
        return Losses(terms, monitors)

    def criterion_matches(self, matched: Tensor, batch: Batch) -> Matches:
        """[B, N] matches of one layer in the library's form, as indices into ``labels``; queries in ascending order."""
        matches = []
        for row, target in zip(matched, batch.targets, strict=True):
            query = torch.nonzero(row >= 0).flatten()
            number = torch.full((max(1, len(target)),), NEGATIVE, device=row.device)
            kept = trainable(target)
            number[kept] = torch.arange(len(kept), device=row.device)
            matches.append((query, number[row[query]]))
        return matches

    def weighted_losses(self, queries: Queries, batch: Batch, assignment: Assignment) -> Losses:
        """The same formulas with weights, ignored queries and a normalizer."""
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
        """Targets in the library's form: ``class_labels`` [G], ``boxes`` [G, 4] as cxcywh as fractions of the valid image.

        Args:
            batch: its targets are read.
            only_trainable: leave out crowd and empty boxes; False keeps the indices that an ``Assignment`` speaks of.
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
        """The last layer by the rule of the library's image processor, best first, clipped to the valid image.

        Softmax: each query's best class. Sigmoid: the best ``top_k`` pairs of query and class, so a query may be found
        twice. ``origin.anchor`` is the query; level and cell are -1.
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
        """By the assignment, of all layers."""
        return query_positives(cast(Queries, prediction), assignment, batch)

    # ------------------------------------------------------------------------------------------------------------- copies

    def copy_head(self, fresh: bool = False) -> TransformersDetector:
        """A copy that decodes, assigns and computes losses on anybody's features, on its own trainable parameters."""
        return self.without((*self.backbone_modules, *self.neck_modules), fresh)

    def copy_neck(self, fresh: bool = False) -> EncoderNeck:
        """Projection and encoder alone, on their own trainable parameters."""
        return EncoderNeck(self.without((*self.backbone_modules, *self.head_modules), fresh))

    def without(self, modules: Sequence[str], fresh: bool) -> TransformersDetector:
        """A copy of the detector without some of its modules, trainable and in training mode.

        Args:
            modules: dotted names inside ``model``; those that this variant of the family lacks are passed over.
            fresh: random weights, drawn as the library draws them.
        """
        present = dict(self.model.named_modules(remove_duplicate=False))
        gone: dict[int, Any] = {id(present[name]): nn.Identity() for name in modules if name in present}
        other = copy.deepcopy(self, gone).requires_grad_(True).train()
        if fresh:
            parameter = next(self.parameters())
            made = type(self.model)(copy.deepcopy(self.config)).to(parameter)
            state = made.state_dict()
            other.model.load_state_dict({name: state[name] for name in other.model.state_dict()})
        return other

    def class_rows(self, name: str) -> Tensor | None:
        """Rows of the class outputs; see ``inherit``."""
        if not any(name.startswith(f"model.{part}.") for part in self.class_outputs):
            return None
        return torch.arange(len(self.spec.classes))[:, None]

    # -------------------------------------------------------------------------------------------------------------- files

    def export(self, folder: Path) -> None:
        """Write the library's files: ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

        ``transformers.AutoModelForObjectDetection.from_pretrained(folder)`` loads them without this package.
        """
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
            with quiet():
                self.model.save_pretrained(temporary, state_dict=saved_state(self.model))
            processor = {
                "image_processor_type": self.image_processor,
                "do_resize": False,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(self.spec.mean),
                "image_std": list(self.spec.std),
                "do_pad": True,
            }
            Path(temporary, "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
            for path in sorted(Path(temporary).iterdir()):
                os.replace(path, folder / path.name)


class EncoderNeck(nn.Module):
    """A detector's projection and encoder: maps backbone ``Features`` to its own."""

    def __init__(self, detector: TransformersDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, features: Features) -> Features:
        """As ``Detector.features`` after the backbone."""
        return self.detector.encode(features)


class GivenMatches(nn.Module):
    """Stands in for the library's matcher: the criterion asks for the last layer first, then for the others in order."""

    def __init__(self, layers: Sequence[Matches]) -> None:
        super().__init__()
        self.waiting = [layers[-1], *layers[:-1]]

    def forward(self, outputs: Any, targets: Any) -> Matches:
        """The next layer's."""
        return self.waiting.pop(0)


def focal_criterion(config: Any, matcher_class: Any, criterion_class: Any) -> Any:
    """The criterion of Deformable, Conditional and DAB-DETR, whose classes the caller imports from the library."""
    matcher = matcher_class(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
    return criterion_class(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes", "cardinality"])


# ------------------------------------------------------------------------------------------------------------ small parts


def layers_of(queries: Queries) -> range:
    """Numbers of the decoder layers."""
    return range(len(queries.logits))


def kind_of(name: str) -> str:
    """A criterion's loss without the number of its layer: ``loss_ce`` of ``loss_ce_2``."""
    head, _, tail = name.rpartition("_")
    return head if tail.isdigit() else name


def corners_of(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] as xyxy."""
    return box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def class_names(config: Any) -> tuple[str, ...]:
    """Names of a config's classes, in label order."""
    return tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels))


def valid_masks(features: Features) -> tuple[Tensor, ...]:
    """[B, H_l, W_l] bool for each map, True where a cell shows the image: the library's masks."""
    if features.padding is not None:
        return tuple(~mask for mask in features.padding)
    return tuple(torch.ones_like(level[:, 0], dtype=torch.bool) for level in features.maps)


def flat_map(level: Tensor) -> Tensor:
    """A map [B, D, H, W] as a sequence [B, H*W, D]."""
    return level.flatten(2).transpose(1, 2)


def as_map(sequence: Tensor, like: Tensor) -> Tensor:
    """A sequence [B, H*W, D] as a map [B, D, H, W] of the size of another."""
    return sequence.transpose(1, 2).unflatten(2, like.shape[-2:])


def inverse_sigmoid(value: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of a value in 0..1, kept away from the ends by ``eps``, with the rounding of the library's own function."""
    return library_inverse_sigmoid(value, eps)


def full_precision(tensor: Tensor) -> Tensor:
    """float32 under mixed precision, else as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
