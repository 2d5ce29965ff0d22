"""UniKD: compare a fixed number of embeddings that are extracted from the features, for any pair of detectors.

Lao, Song, Liu, Liu, Yang, "UniKD: Universal Knowledge Distillation for Mimicking Homogeneous or Heterogeneous Object
Detectors", ICCV 2023. No released code was found. The paper leaves these choices open: no self-attention in the extractors'
layers (the paper's 1.56 M parameters leave no room for it), the distribution of the random boxes, box losses and matching as
in Deformable DETR, means over channels, levels paired by stride.

Two adaptive knowledge extractors (AKE) learn on the frozen teacher to detect the objects: one with learned queries
(content), one with queries made from boxes near and far from the objects (positional). The frozen extractors then read the
teacher's and the student's features with the same queries at the same places. The loss compares the embeddings that they
read.

Shape letters: B images, N queries of each kind, C channels, L levels of the teacher, G boxes of an image, K classes.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, sigmoid_focal_loss

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.boxes import giou_loss
from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.deformable import Cells
from detdistill.functional.matching import focal_class_cost, giou_cost, hungarian, l1_cost
from detdistill.functional.modes import frozen
from detdistill.functional.positions import relative_boxes
from detdistill.functional.precision import full_precision
from detdistill.functional.similarity import mean_cosine
from detdistill.methods.shared.contract import Method, Stage
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.unikd.loss import KINDS, unikd_boxes, unikd_loss
from detdistill.methods.unikd.parts import Adaptor, KnowledgeExtractor, UniKDTaught, pyramid_of
from detdistill.structures import Batch, Clock, Features, Losses, Observation
from detdistill.values import Count, Fraction, Index, Limits, Weight


class UniKD(Method[UniKDTaught]):
    """UniKD for any pair of detectors."""

    slug = "unikd"
    title = "UniKD: Universal Knowledge Distillation for Mimicking Homogeneous or Heterogeneous Object Detectors (ICCV 2023)"
    bibtex = """@inproceedings{lao2023unikd,
  title={UniKD: Universal Knowledge Distillation for Mimicking Homogeneous or Heterogeneous Object Detectors},
  author={Lao, Shanshan and Song, Guanglu and Liu, Boxiao and Liu, Yu and Yang, Yujiu},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""
    teach_settings = (
        *("queries", "extractor_layers", "points", "alpha", "beta", "self_attention", "cls_norm"),
        *("extractor_epochs", "extractor_lr"),
    )
    teaches_parts = True

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        queries: Annotated[int, Limits(2)] = 200,
        content_weight: Weight = 10.0,
        positional_weight: Weight = 10.0,
        extractor_layers: Count = 1,
        adaptor_layers: Index = 2,
        points: Count = 4,
        alpha: Fraction = 0.6,
        beta: Fraction = 0.4,
        self_attention: bool = False,
        cls_norm: Literal["num_gt", "num_queries"] = "num_gt",
        extractor_epochs: Weight = 1.25,
        extractor_lr: Weight = 2e-4,
    ) -> None:
        """Build the extractors and the adaptor.

        Args:
            teacher: any detector.
            student: any detector.
            queries: N, number of content queries and number of positional queries.
            content_weight: weight of the loss on content embeddings; 0 leaves them out (table 6a).
            positional_weight: weight of the loss on positional embeddings; 0 leaves them out.
            extractor_layers: number of decoder layers with which an extractor reads embeddings (table 6e).
            adaptor_layers: number of deformable self-attention layers in the student's adaptor (table 6g).
            points: points that each attention head samples on each level.
            alpha: smallest IoU of a jittered box with its object.
            beta: largest IoU of a background box with any object.
            self_attention: use decoder layers with self-attention, which the paper's parameter count excludes.
            cls_norm: divisor of the extractors' class loss. ``num_gt``: number of objects (Deformable DETR);
                ``num_queries``: number of queries (equation 6).
            extractor_epochs: length of the extractors' training as a multiple of the run's epochs (the paper: 15 epochs
                before a run of 12).
            extractor_lr: learning rate of the extractors' training (AdamW).

        Raises:
            MethodError: a hyper-parameter is out of range, or both weights are 0.
        """
        super().__init__(teacher, student)
        check_some(self.slug, content_weight=content_weight, positional_weight=positional_weight)
        self.weights = {"content": content_weight, "positional": positional_weight}
        self.queries, self.alpha, self.beta, self.cls_norm = queries, alpha, beta, cls_norm
        self.extractor_epochs, self.extractor_lr = extractor_epochs, extractor_lr
        spec = teacher.spec
        self.channels = max(spec.channels)
        self.extractors = nn.ModuleDict()
        # Levels narrower than the widest level (SSD) pass a 1x1 convolution to its width.
        self.extractors["project"] = nn.ModuleList(
            nn.Identity() if width == self.channels else nn.Conv2d(width, self.channels, 1) for width in spec.channels
        )
        for kind in KINDS:
            self.extractors[kind] = KnowledgeExtractor(
                kind,
                self.channels,
                len(spec.strides),
                len(student.spec.classes),
                queries,
                points,
                extractor_layers,
                self_attention,
            )
        self.adaptor = Adaptor(student.spec, spec, self.channels, adaptor_layers, points)
        settings = (queries, extractor_layers, points, alpha, beta, self_attention, cls_norm, extractor_epochs, extractor_lr)
        self._settings = repr((settings, student.spec.classes))

    # ---------------------------------------------------------------------------------------------------------- teach

    @torch.no_grad()
    def teach(self, batch: Batch) -> UniKDTaught:
        """Compute the queries, their embeddings in the teacher's features, and which of them are positive.

        The random boxes are seeded by image and view, so a cached view gets the same boxes.
        """
        features = self.teacher.observe(batch).features
        with full_precision(batch.images.device):
            pyramid = self._pyramid(features, batch)
            boxes, near = self._boxes(batch)
            content, positional = self._extractor("content"), self._extractor("positional")
            content_queries, positional_queries = content.generate(boxes, pyramid), positional.generate(boxes, pyramid)
            knowledge = content.extract(content_queries, boxes, pyramid)
            return UniKDTaught(
                content_queries,
                knowledge,
                self._match(*content.predict(knowledge, boxes), batch) >= 0,
                positional_queries,
                positional.extract(positional_queries, boxes, pyramid),
                near,
                boxes,
            )

    def _extractor(self, kind: str) -> KnowledgeExtractor:
        return cast(KnowledgeExtractor, self.extractors[kind])

    def _pyramid(self, features: Features, batch: Batch) -> Cells:
        """Project the teacher's maps to a common width."""
        layers = cast(nn.ModuleList, self.extractors["project"])
        maps = [layer(level.float()) for layer, level in zip(layers, features.maps, strict=True)]
        return pyramid_of(maps, self.teacher.spec.strides, batch)

    def _boxes(self, batch: Batch, draw: str = "") -> tuple[Tensor, Tensor]:
        """Draw boxes [B, N, 4] for the positional queries; [B, N] bool tells which are jittered objects.

        ``draw`` is part of the random seed.
        """
        boxes, near = [], []
        places = zip(batch.ids, batch.views, batch.sizes.tolist(), batch.targets, strict=True)
        for number, view, (height, width), target in places:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{number}/{view.key}/{draw}".encode()))
            objects = target.without_crowd().boxes_xyxy
            drawn, count = unikd_boxes(objects, (height, width), self.queries, generator, self.alpha, self.beta)
            boxes.append(relative_boxes(drawn, (height, width)))
            near.append(torch.arange(self.queries) < count)
        device = batch.images.device
        return torch.stack(boxes).to(device), torch.stack(near).to(device)

    # --------------------------------------------------------------------------------------------- the extractors' stage

    def pretrain(self, batch: Batch, taught: None, clock: Clock) -> Losses:
        """Detection losses of the extractors on the frozen teacher's features (Eq. 6)."""
        batch = batch if batch.large is None else batch.large
        features = self.teacher.observe(batch).features
        with full_precision(batch.images.device):
            pyramid = self._pyramid(features, batch)
            boxes, near = self._boxes(batch, draw=str(clock.epoch))
            losses: dict[str, Tensor] = {}
            for kind in KINDS:
                extractor = self._extractor(kind)
                embeddings = extractor.extract(extractor.generate(boxes, pyramid), boxes, pyramid)
                logits, found = extractor.predict(embeddings, boxes)
                matched = self._match(logits, found, batch) if kind == "content" else self._known(boxes, near, batch)
                losses |= {f"{kind}_{name}": value for name, value in self._detection(logits, found, matched, batch).items()}
        return Losses(losses)

    @staticmethod
    def _objects(batch: Batch, image: int) -> tuple[Tensor, Tensor]:
        """Boxes [G, 4] (cxcywh, relative to the valid image) and labels [G] of one image, without crowds."""
        target = batch.targets[image].without_crowd()
        return relative_boxes(target.boxes_xyxy.float(), batch.sizes[image]), target.labels

    def _match(self, logits: Tensor, boxes: Tensor, batch: Batch) -> Tensor:
        """Match queries to objects (costs 2 class, 5 L1, 2 GIoU): [B, N] index of the object, -1 for none."""
        rows = []
        for image in range(len(batch)):
            wanted, labels = self._objects(batch, image)
            cost = 2 * focal_class_cost(logits[image], labels) + 5 * l1_cost(boxes[image], wanted)
            cost = cost + 2 * giou_cost(box_convert(boxes[image], "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
            rows.append(hungarian(cost))
        return torch.stack(rows)

    def _known(self, boxes: Tensor, near: Tensor, batch: Batch) -> Tensor:
        """Find the object of each jittered box, by IoU if objects were left out: [B, N] index of the object, -1 for none."""
        rows = []
        for image in range(len(batch)):
            wanted, _ = self._objects(batch, image)
            row = torch.full_like(near[image], -1, dtype=torch.int64)
            count = int(near[image].sum())
            if count == len(wanted):
                row[:count] = torch.arange(count, device=row.device)
            elif count:  # more objects than queries: the largest were kept, in their order
                corners = [box_convert(part, "cxcywh", "xyxy") for part in (boxes[image, :count], wanted)]
                row[:count] = box_iou(corners[0], corners[1]).argmax(dim=1)
            rows.append(row)
        return torch.stack(rows)

    def _detection(self, logits: Tensor, boxes: Tensor, matched: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Focal loss over all queries (x2), L1 (x5) and GIoU (x2) over the positive ones."""
        wanted_logits = torch.zeros_like(logits)
        found, wanted = [boxes[:0, 0]], [boxes[:0, 0]]
        for image in range(len(batch)):
            objects, labels = self._objects(batch, image)
            mine = torch.nonzero(matched[image] >= 0).flatten()
            wanted_logits[image, mine, labels[matched[image, mine]]] = 1
            found.append(boxes[image, mine])
            wanted.append(objects[matched[image, mine]].to(boxes.dtype))
        predicted, target = torch.cat(found), torch.cat(wanted)
        objects_of_batch = divisor_over_ranks(sum(int((~target.crowd).sum()) for target in batch.targets), logits)
        by = objects_of_batch if self.cls_norm == "num_gt" else len(batch) * self.queries
        apart = giou_loss(box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy"))
        return {
            "cls": 2 * sigmoid_focal_loss(logits, wanted_logits, alpha=0.25, gamma=2, reduction="sum") / by,
            "l1": 5 * (predicted - target).abs().sum() / objects_of_batch,
            "giou": 2 * apart.sum() / objects_of_batch,
        }

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: UniKDTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the terms ``content`` and ``positional`` (Eq. 7), and monitor the cosine of the embeddings."""
        strides = self.teacher.spec.strides
        with full_precision(batch.images.device):
            pyramid = self.adaptor(seen.features, strides, batch)
            queries = {"content": taught.content_queries, "positional": taught.positional_queries}
            wanted = {"content": taught.content, "positional": taught.positional}
            positive = {"content": taught.content_positive, "positional": taught.positional_positive}
            terms: dict[str, Tensor] = {}
            monitors: dict[str, Tensor] = {}
            for kind in (kind for kind in KINDS if self.weights[kind] > 0):
                extractor = self._extractor(kind)
                with frozen(extractor):
                    read = extractor.extract(queries[kind], taught.boxes_cxcywh01, pyramid)
                theirs = wanted[kind]
                terms[kind] = self.weights[kind] * unikd_loss(read, theirs, positive[kind])
                monitors[f"{kind}_cosine"] = mean_cosine([read.transpose(1, 2)], [theirs.transpose(1, 2)])
        return Losses(terms, monitors)

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """First train the extractors on the frozen teacher, then the student and its adaptor with frozen extractors."""
        return (
            Stage(
                "extractors",
                step=self.pretrain,
                trains=lambda clock: (self.extractors,),
                evaluates=None,
                share=self.extractor_epochs,
                depends_on=hashlib.sha256(f"{self.slug} {self.teacher.fingerprint} {self._settings}".encode()).hexdigest()[:16],
                overrides={"optimizer": "adamw", "lr": self.extractor_lr, "weight_decay": 1e-4, "clip": 0.1, "schedule": "step"},
            ),
            self.distill_stage(student, (student, self.adaptor)),
        )
