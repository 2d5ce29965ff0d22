"""DICOD: an image classifier teaches a detector the classes of its objects and the places of their boxes.

Guo, Alvarez, Salzmann, "Distilling Image Classifiers in Object Detectors", NeurIPS 2021.

The classifier is trained on crops of the objects in the training images (stage ``classifier``), or loaded from a file. It is
then frozen. Two kinds of losses train the student's positives. The class scores of a positive should follow the classifier's
distribution over classes for the object. The classifier's features of the predicted box's crop should equal those of the true
box's crop; the gradient moves the predicted box.

Differences from the released code: objects and predicted boxes below one pixel are left out; boxes are clamped to the image
instead of the padded batch; a true box is passed through the classifier once instead of once for each of its positives;
two-stage detectors and DETRs can be students, too.

Shape letters: B images, G objects of an image, M positives of the batch, K classes, S side of a crop, C channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detdistill.detectors.contract import Detector, DetectorSpec, Teacher
from detdistill.errors import name_list
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import share_over_ranks
from detdistill.functional.crops import clamp_boxes
from detdistill.functional.modes import evaluating
from detdistill.functional.precision import full_precision
from detdistill.methods.dicod.loss import Form, dicod_classification_loss, dicod_localization_loss, dicod_pooled, dicod_sample
from detdistill.methods.dicod.parts import CHUNK, Classifier, DICODTaught, as_teacher, jittered, large_enough
from detdistill.methods.shared.contract import Stage, TeacherFree
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Losses, Observation, Positives, Queries, map_tensors
from detdistill.values import Count, Fraction, Index, Positive, Weight


class DICOD(TeacherFree[DICODTaught]):
    """DICOD for any student with predictions; the positives of a DETR are the queries matched to an object.

    There is no teacher detector. The classifier is a submodule. ``teach`` runs it on the true boxes, so its result can come
    from a cache. ``learn`` runs the frozen classifier on the predicted boxes.
    """

    slug = "dicod"
    title = "Distilling Image Classifiers in Object Detectors (NeurIPS 2021)"
    bibtex = """@inproceedings{guo2021dicod,
  title={Distilling Image Classifiers in Object Detectors},
  author={Guo, Shuxuan and Alvarez, Jose M. and Salzmann, Mathieu},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}"""
    teach_settings = (
        *("classifier", "weights", "pretrained", "size", "cells", "layers"),
        *("jitter", "classifier_epochs", "classifier_lr"),
    )

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        classifier: str = "resnet50",
        weights: str | None = None,
        pretrained: bool = False,
        cls_weight: Weight = 0.4,
        temperature: Positive = 2.0,
        sigmoid_form: Literal["binary", "normalized"] = "binary",
        pixel_weight: Weight = 0.15,
        feature_weight: Weight = 0.15,
        size: Count = 112,
        cells: Count = 4,
        layers: Sequence[Index] = (0,),
        decoder_layers: Literal["last", "all"] = "last",
        max_crops: Count = 256,
        jitter: Fraction = 0.1,
        classifier_epochs: Weight = 1.0,
        classifier_lr: Weight = 0.01,
    ) -> None:
        """Build or load the classifier.

        Args:
            teacher: not used (other methods of a composition may use it).
            student: any detector with predictions.
            classifier: name of a timm model.
            weights: .safetensors file of a trained classifier with its class names (written by ``Classifier.save``). None: the
                classifier is trained in a stage before ``distill``.
            pretrained: start the classifier from timm's weights, as in the paper.
            cls_weight: weight of the classification loss (0.1 to 0.4 in the paper).
            temperature: T of the class distributions.
            sigmoid_form: how class scores of sigmoid detectors are compared. ``binary``: the two-way divergence of each class;
                ``normalized``: sigmoids divided by their sum over the classes (only in the released code).
            pixel_weight: weight of the pixel loss. Pixels are normalised as the student's input. An SSD's are in units of 1/255,
                so its loss is 58 times as large as with ImageNet's deviations.
            feature_weight: weight of the loss between the classifier's features; 0 leaves it out.
            size: S, side of a crop in pixels.
            cells: g. Pixels are compared on a grid of g x g, the first layer on 2g x 2g, the next on 4g x 4g.
            layers: indices of the classifier's layers that are compared. ResNet: 0 is the stem, 1 to 4 the stages. Other
                models: timm's feature indices.
            decoder_layers: decoder layers of a DETR whose positives are trained: the last, or all (with one mean over all).
            max_crops: maximum number of predicted boxes that are cropped in a step; of more boxes, a uniform random sample.
            jitter: largest random shift of the boxes on which the classifier is trained, as a fraction of their sides.
            classifier_epochs: length of the classifier's training as a multiple of the run's epochs.
            classifier_lr: learning rate of the classifier's training (SGD, cosine schedule).

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            ModelError: the classifier cannot be built or loaded.
            PairError: the classifier does not know the student's classes, or there is one class only.
        """
        super().__init__(teacher, student)
        self.places: Tensor
        self.pixel_scale: Tensor
        check_some(self.slug, cls_weight=cls_weight, pixel_weight=pixel_weight, feature_weight=feature_weight)
        if not layers or list(layers) != sorted(set(layers)):
            raise MethodError(f"{self.slug}: layers={'/'.join(map(str, layers))} must rise; feature_weight=0 leaves them out")
        self.cls_weight, self.pixel_weight, self.feature_weight = cls_weight, pixel_weight, feature_weight
        self.temperature, self.size, self.cells, self.layers = temperature, size, cells, tuple(layers)
        self.decoder_layers, self.max_crops, self.jitter = decoder_layers, max_crops, jitter
        self.classifier_epochs, self.classifier_lr = classifier_epochs, classifier_lr
        self.form: Form = "softmax" if student.spec.softmax else sigmoid_form
        # Section 4.1: the classifier of SSDs learns by cross-entropy, the one that serves all others by focal loss too.
        self.joint = not (student.spec.softmax and student.spec.family == "dense")
        self._open_classifier(classifier, weights, pretrained, student.spec)
        self.own_stage = weights is None and len(student.spec.classes) > 1 and cls_weight + feature_weight > 0
        settings = (classifier, pretrained, size, jitter, classifier_epochs, classifier_lr, self.joint, student.spec.classes)
        self._settings = repr(settings)

    def _open_classifier(self, name: str, weights: str | None, pretrained: bool, student: DetectorSpec) -> None:
        """Build or load the classifier, and check that it serves the student.

        Raises:
            ModelError: it cannot be built or loaded.
            PairError: it does not know the student's classes, or there is one class only.
        """
        classes = student.classes
        if weights is None:
            self.classifier = Classifier.build(name, classes, pretrained)
        else:
            self.classifier = Classifier.load(weights, name)
        self._check_classes(classes, weights, pretrained)
        self._check_layers()
        known = self.classifier.classes
        places = class_columns(classes, known, softmax=False) if set(classes) <= set(known) else []
        self.register_buffer("places", torch.tensor(places, dtype=torch.int64), persistent=False)
        scale = self.classifier.std / torch.tensor(student.std)[:, None, None]
        self.register_buffer("pixel_scale", scale, persistent=False)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """A student with predictions; no teacher."""
        return Needs(teacher=None, student_families=("dense", "regions", "queries"))

    def _check_classes(self, classes: Sequence[str], weights: str | None, pretrained: bool) -> None:
        known = self.classifier.classes
        if self.cls_weight:
            if not known:
                raise PairError(
                    f"{self.slug}: {weights} does not name its classes; write it with Classifier.save, or set cls_weight=0"
                )
            if unknown := [name for name in classes if name not in known]:
                surplus = [name for name in known if name not in classes]
                raise PairError(
                    f"{self.slug}: the classifier {weights} knows {name_list(known, surplus)}; the student's classes are "
                    f"{name_list(classes, unknown)}; it does not know {name_list(unknown)}: train it on this data (leave out "
                    f"weights=), or set cls_weight=0"
                )
        # Softmax over one class is always 1; and a classifier that has seen nothing else calls everything an object.
        silent = self.cls_weight > 0 and (self.form == "softmax" or len(known) == 1)
        blind = self.feature_weight > 0 and weights is None and not pretrained
        if len(classes) == 1 and (silent or blind):
            raise PairError(
                f"{self.slug}: with one class ({classes[0]}) a classifier has nothing to tell apart, nor to learn; set "
                f"cls_weight=0 and take the features of another (pretrained=true or weights=FILE), or feature_weight=0 too"
            )

    def _check_layers(self) -> None:
        """Run the classifier once to check that it accepts crops of this size and has these layers."""
        name = self.classifier.name
        depth = len(self.classifier.network.feature_info)
        if self.layers[-1] >= depth:
            raise MethodError(f"{self.slug}: classifier {name} has the layers 0 to {depth - 1}; layers={self.layers[-1]} is none")
        try:
            with as_teacher(self.classifier), torch.no_grad():
                self.classifier.describe(torch.zeros(1, 3, self.size, self.size), self.layers)
        except Exception as error:  # a network raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise MethodError(f"{self.slug}: classifier {name} does not take crops of size={self.size}: {reason}") from error

    # ---------------------------------------------------------------------------------------------------------- teach

    @torch.no_grad()
    def teach(self, batch: Batch) -> DICODTaught:
        """Compute class scores, pooled pixels and pooled features of the true boxes in float32; crowds are marked unusable."""
        counts = [len(target) for target in batch.targets]
        boxes, image, usable = self._objects(batch)
        if not len(boxes):  # for the shapes alone: an empty box, described and left out
            boxes, image = boxes.new_zeros(1, 4), image.new_zeros(1)
        described = []
        with as_teacher(self.classifier), full_precision(batch.images.device):
            for part, whose in zip(boxes.split(CHUNK), image.split(CHUNK), strict=True):
                crops = self.classifier.crops(batch, part, whose, self.size)
                logits, maps = self.classifier.describe(crops, self.layers)
                described.append((logits, *dicod_pooled([crops, *maps], self.cells)))
        logits, pixels, *features = (torch.cat(values)[: sum(counts)] for values in zip(*described, strict=True))

        def by_image(flat: Tensor) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(flat.split(counts)), batch_first=True)

        number = torch.tensor(counts, device=batch.images.device)
        return DICODTaught(by_image(logits), by_image(pixels), tuple(map(by_image, features)), by_image(usable), number)

    def _objects(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [M, 4] of all images, clamped to their image; the image index [M]; and whether each is usable [M]."""
        boxes = torch.cat([target.boxes_xyxy.to(self.classifier.mean.dtype) for target in batch.targets])
        counts = torch.tensor([len(target) for target in batch.targets])
        image = torch.repeat_interleave(torch.arange(len(batch)), counts).to(boxes.device)
        inside = clamp_boxes(boxes, image, [view.size_hw for view in batch.views])
        crowd = torch.cat([target.crowd for target in batch.targets])
        return inside, image, large_enough(inside) & ~crowd

    # --------------------------------------------------------------------------------------------- the classifier's stage

    def train_classifier(self, batch: Batch, taught: None, clock: Clock) -> Losses:
        """Section 3.1: train the classifier to predict the class of each object from the crop of its jittered box.

        The images have the run's augmentation. At most 256 crops of a batch are used.
        """
        boxes, image, usable = self._objects(batch)
        labels = torch.cat([target.labels for target in batch.targets])
        boxes = clamp_boxes(jittered(boxes, self.jitter), image, [view.size_hw for view in batch.views])
        chosen = torch.nonzero(usable & large_enough(boxes)).flatten()
        chosen = chosen[dicod_sample(len(chosen), CHUNK).to(chosen.device)]
        share = share_over_ranks(torch.tensor(float(len(chosen)), device=chosen.device))
        if not len(chosen):
            nothing = torch.stack([parameter.sum() for parameter in self.classifier.parameters()]).sum() * 0
            return Losses({"categorical": nothing})
        crops, labels = self.classifier.crops(batch, boxes[chosen], image[chosen], self.size), labels[chosen]
        # BatchNorm cannot compute statistics of a single crop whose last maps have one cell.
        with contextlib.nullcontext() if len(chosen) > 1 else evaluating(self.classifier):
            logits = self.classifier(crops).float()
        terms = {"categorical": F.cross_entropy(logits, labels) * share}
        if self.joint:
            wanted = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
            terms["focal"] = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2, reduction="sum") / len(chosen) * share
        return Losses(terms, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()})

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: DICODTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms ``crop_classes``, ``crop_pixels`` and ``crop_features``: means over positives. Weight 0 leaves one out.

        Monitors: ``classifier_accuracy`` on the batch's objects, and ``cropped``, the fraction of positives that were cropped.
        """
        terms: dict[str, Tensor] = {}
        monitors = self._accuracy(taught, batch)
        with full_precision(batch.images.device):
            positives = self._positives(student, seen, batch)
            seen_by_classifier = taught.usable[positives.image, positives.ground_truth]
            positives = map_tensors(positives, lambda tensor: tensor[seen_by_classifier])
            if self.cls_weight:
                known = taught.logits[positives.image, positives.ground_truth][:, self.places]
                term = dicod_classification_loss(positives.logits, known, self.temperature, self.form)
                terms["crop_classes"] = self.cls_weight * term
            if self.pixel_weight or self.feature_weight:
                pixels, features, cropped = self._localization(positives, taught, batch, clock)
                terms |= {"crop_pixels": pixels} if self.pixel_weight else {}
                terms |= {"crop_features": features} if self.feature_weight else {}
                monitors["cropped"] = pixels.new_tensor(cropped / max(1, len(positives)))
        return Losses(terms, monitors)

    def _positives(self, student: Detector, seen: Observation, batch: Batch) -> Positives:
        assert seen.prediction is not None
        positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
        if isinstance(seen.prediction, Queries) and self.decoder_layers == "last":
            last = positives.layer == len(seen.prediction.logits) - 1
            positives = map_tensors(positives, lambda tensor: tensor[last])
        return positives

    def _localization(self, positives: Positives, taught: DICODTaught, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor, int]:
        """Both localization terms and the number of boxes used. Boxes below a pixel or outside the image are left out."""
        boxes = clamp_boxes(positives.boxes_xyxy, positives.image, [view.size_hw for view in batch.views])
        visible = torch.nonzero(large_enough(boxes.detach())).flatten()
        share = share_over_ranks(boxes.new_tensor(float(min(len(visible), self.max_crops))))
        if not len(visible):
            nothing = positives.boxes_xyxy[:0].sum()
            return nothing, nothing, 0
        drawing = f"{batch.ids}/{[view.key for view in batch.views]}/{clock.epoch}/{clock.step}"
        generator = torch.Generator().manual_seed(zlib.crc32(drawing.encode()))
        chosen = visible[dicod_sample(len(visible), self.max_crops, generator).to(visible.device)]
        image, ground_truth = positives.image[chosen], positives.ground_truth[chosen]
        with as_teacher(self.classifier):
            crops = self.classifier.crops(batch, boxes[chosen], image, self.size)
            maps = self.classifier.maps(crops, self.layers) if self.feature_weight else []
        predicted = dicod_pooled([crops, *maps], self.cells)
        truth = [part[image, ground_truth] for part in (taught.pixels, *taught.features)[: len(predicted)]]
        predicted[0], truth[0] = predicted[0] * self.pixel_scale, truth[0] * self.pixel_scale
        pixels, features = dicod_localization_loss(predicted, truth, self.pixel_weight, self.feature_weight)
        return pixels * share, features * share, len(chosen)

    def _accuracy(self, taught: DICODTaught, batch: Batch) -> dict[str, Tensor]:
        """Accuracy of the classifier on the batch's objects; empty without objects or with a single class."""
        if len(self.places) < 2:
            return {}
        right = []
        for image, target in enumerate(batch.targets):
            known = taught.logits[image, : len(target)][:, self.places].argmax(dim=1)
            right.append((known == target.labels)[taught.usable[image, : len(target)]])
        found = torch.cat(right)
        return {"classifier_accuracy": found.float().mean()} if len(found) else {}

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """Train the classifier, unless it was loaded from a file; then train the student with the frozen classifier."""
        distill = self.distill_stage(student, (student,))
        if not self.own_stage:
            return (distill,)
        first = Stage(
            "classifier",
            step=self.train_classifier,
            trains=lambda clock: (self.classifier,),
            evaluates=None,
            share=self.classifier_epochs,
            depends_on=hashlib.sha256(f"{self.slug} {self._settings}".encode()).hexdigest()[:16],
            overrides={"optimizer": "sgd", "lr": self.classifier_lr, "weight_decay": 1e-4, "schedule": "cosine"},
        )
        return first, distill
