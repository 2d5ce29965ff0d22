"""PGD: imitate the towers of a dense head in the regions from which the teacher predicts each object well."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.classes import class_columns
from detdistill.functional.dense_maps import at_cells, to_map
from detdistill.functional.precision import full_precision
from detdistill.methods.pgd.loss import (
    PGDBoxTerms,
    PGDClassTerms,
    pgd_background,
    pgd_box_terms,
    pgd_candidates,
    pgd_class_terms,
    pgd_normalized,
    pgd_weights,
)
from detdistill.methods.shared.align import LevelAdapters, LevelPair, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Dense, Features, Look, Losses, Observation, PerImage, Target, Taught, View
from detdistill.values import Count, Fraction, Positive, Weight


@dataclass(frozen=True)
class PGDCells(PerImage):
    """The cells of the box tower's key regions on one level; images with fewer cells than others are filled up."""

    features: Tensor
    """[B, M, C] the teacher's box tower at the cells."""
    places: Tensor
    """[B, M, 2] int64 row and column."""
    weights: Tensor
    """[B, M] weights of the cells."""
    filled: Tensor
    """[B, M] bool, False for entries that only fill up."""

    @staticmethod
    def of(maps: Tensor, weights: Tensor) -> PGDCells:
        """Collect the cells of maps [B, C, H, W] whose weights [B, H, W] are not 0."""
        where = [torch.nonzero(image != 0) for image in weights]

        def rows(values: Sequence[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)

        found = list(zip(maps, weights, where, strict=True))
        return PGDCells(
            rows([level[:, at[:, 0], at[:, 1]].T for level, _, at in found]),
            rows(where),
            rows([image[at[:, 0], at[:, 1]] for _, image, at in found]),
            rows([torch.ones_like(at[:, 0], dtype=torch.bool) for at in where]),
        )


@dataclass(frozen=True)
class PGDTaught(Taught):
    """The teacher's towers and the weights of the cells. The box tower is kept at the cells of its key regions only."""

    classification: tuple[Tensor, ...]
    """L maps [B, C, H, W] of the class tower; all cells are needed for the background and for the attention."""
    foreground: tuple[Tensor, ...]
    """L maps [B, H, W]: weights of the class tower's key regions, normalised."""
    background: tuple[Tensor, ...]
    """L maps [B, H, W] bool: cells of the background, without padding."""
    regression: tuple[PGDCells, ...]
    """The box tower's cells on each level."""


class PGD(Method[PGDTaught]):
    """PGD between the towers of two dense heads; levels are paired by stride.

    The teacher's predictions select up to ``candidates`` cells for each ground-truth box, over all levels. With several
    anchors in a cell the largest weight counts (not in the paper). Crowd boxes have no key region. The paper's students start
    from the teacher's neck and head (``--inherit``). Departures from the released code: ``per_image``, ``in_box_test``, and
    padding, which has no candidates, no weight and no attention here.
    """

    slug = "pgd"
    title = "Prediction-Guided Distillation for Dense Object Detection (ECCV 2022)"
    bibtex = """@inproceedings{yang2022pgd,
  title={Prediction-Guided Distillation for Dense Object Detection},
  author={Yang, Chenhongyi and Ochal, Mateusz and Storkey, Amos and Crowley, Elliot J.},
  booktitle={European Conference on Computer Vision},
  year={2022}
}"""
    teach_settings = ("candidates", "class_exponent", "box_exponent", "jitter", "in_box_test", "depth")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        foreground_weight: Weight = 0.04,
        background_weight: Weight | None = None,
        box_weight: Weight | None = None,
        attention_weight: Weight = 8e-4,
        level_weights: Sequence[Weight] = (1.0, 1.25, 1.5, 1.75, 2.0),
        temperature: Positive = 0.8,
        candidates: Count = 30,
        class_exponent: Fraction = 0.8,
        box_exponent: Fraction = 0.6,
        jitter: Positive = 0.1,
        per_image: bool = True,
        in_box_test: Literal["fixed", "official"] = "fixed",
        depth: Count = 1,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution for each tower on the student (not in the paper).

        Args:
            teacher: a dense detector with towers that knows the student's classes.
            student: a dense detector with towers.
            foreground_weight: factor of the class tower's key regions (alpha); 0.04 for FCOS and GFL, 0.08 for ATSS with
                ResNet-50 (0.04 with MobileNetV2).
            background_weight: factor of the class tower's background (beta); None: half of ``foreground_weight``.
            box_weight: factor of the box tower's key regions (gamma); None: 1.6 times ``foreground_weight``.
            attention_weight: factor of the attention losses of both towers (delta).
            level_weights: further factors of the class tower's key regions and background, one for each student level, finest
                first; the last value holds for all further levels.
            temperature: of the attentions.
            candidates: cells selected for each box (K); 30, for ATSS 9.
            class_exponent: weight of the IoU in the quality that selects the class tower's candidates; the score has the rest.
            box_exponent: the same for the box tower.
            jitter: range in pixels of the random movement of candidates before the Gaussian is fitted.
            per_image: weight each image by its own regions. False: by those of all images of the batch, as a broadcast in the
                released code does. The published weights were tuned with it at 4 images per GPU; with ``per_image``, factors
                of the class tower that are about 4 times as large have the same effect.
            in_box_test: ``official`` swaps x and y when it tests whether a cell is inside a box, as the released code for FCOS
                and AutoAssign does; most objects then lose their weights.
            depth: number of convolution blocks of each tower before the compared maps.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: a tower has fewer than ``depth`` blocks, or no common level.
        """
        super().__init__(teacher, student)
        self.weights = {
            "foreground": foreground_weight,
            "background": foreground_weight / 2 if background_weight is None else background_weight,
            "attention": attention_weight,
            "box_foreground": 1.6 * foreground_weight if box_weight is None else box_weight,
            "box_attention": attention_weight,
        }
        check_some(self.slug, **self.weights)
        if not level_weights:
            raise MethodError(f"{self.slug}: level_weights is empty; give at least one number, which then serves all levels")
        self.level_weights, self.temperature, self.per_image, self.depth = level_weights, temperature, per_image, depth
        self.candidates, self.exponents, self.jitter = candidates, (class_exponent, box_exponent), jitter
        self.in_box_test = in_box_test
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.class_adapters = LevelAdapters(self.pairs, shared=True)  # the levels of a head share their convolutions, too
        self.box_adapters = LevelAdapters(self.pairs, shared=True)
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=False)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Towers and predictions of a dense teacher, towers of a dense student, and the student's classes in the teacher."""
        towers = (settings["depth"],)
        return Needs(
            teacher=Look(towers=towers, prediction=True),
            student=Look(towers=towers),
            teacher_families=("dense",),
            student_families=("dense",),
            same_classes=True,
        )

    # ---------------------------------------------------------------------------------------------------------- teach

    @torch.no_grad()
    def teach(self, batch: Batch) -> PGDTaught:
        """Compute the towers and the key regions on all levels of the teacher.

        The random movement of candidates is seeded by image and view, so a cached view gets the same weights.
        """
        seen = self.teacher.observe(batch, cast(Look, self.requirements.teacher)).float()
        assert isinstance(seen.prediction, Dense)
        tower = seen.tower(self.depth)
        with full_precision(batch.images.device):
            class_weights, box_weights, background = self._weights(seen.prediction, seen.features, batch)
            levels = range(len(tower.strides))
            regions = [to_map(class_weights, seen.prediction, level).amax(dim=1) for level in levels]
            box_regions = [to_map(box_weights, seen.prediction, level).amax(dim=1) for level in levels]
            return PGDTaught(
                tower.classification,
                tuple(pgd_normalized(region) for region in regions),
                tuple(to_map(background, seen.prediction, level).all(dim=1) for level in levels),
                tuple(map(PGDCells.of, tower.regression, box_regions)),
            )

    def _weights(self, prediction: Dense, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [B, P] for the class and the box tower, and [B, P] bool the background; all are 0 in padding."""
        logits = prediction.logits
        scores = (logits.softmax(dim=-1)[..., :-1] if prediction.softmax else logits.sigmoid())[..., self.columns]
        priors = prediction.priors_xyxy
        centers = (priors[..., :2] + priors[..., 2:]) / 2
        visible = _visible(prediction, features)
        weights, background = scores.new_zeros(2, *scores.shape[:2]), torch.zeros_like(visible)
        for image, (target, keep) in enumerate(zip(batch.targets, visible, strict=True)):
            objects = target.without_crowd()
            boxes = objects.boxes_xyxy.to(centers.dtype)
            own = centers[image, keep]
            selected = pgd_candidates(
                scores[image, keep], prediction.boxes_xyxy[image, keep], boxes, objects.labels, self.exponents, self.candidates
            )
            noise = self._noise(batch.ids[image], batch.views[image], objects).to(own.device)
            for side, candidates in enumerate(selected):
                weights[side, image, keep] = pgd_weights(candidates, own, boxes, noise[side], self.jitter, self.in_box_test)
            background[image, keep] = pgd_background(own, boxes, self.in_box_test)
        return weights[0], weights[1], background

    def _noise(self, number: int, view: View, objects: Target) -> Tensor:
        """[2, G, K, 2] uniform numbers 0..1 for both towers, in float64."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{number}/{view.key}".encode()))
        return torch.rand(2, len(objects), self.candidates, 2, generator=generator, dtype=torch.float64)

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: PGDTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms of the class tower, ``pgd_foreground``, ``pgd_background`` and ``pgd_attention``, and of the box tower.

        The latter are ``pgd_box_foreground`` and ``pgd_box_attention``. Sums over levels; terms with weight 0 are left out.

        Raises:
            DetdistillError: a map of the student differs in size from the teacher's.
        """
        tower = seen.tower(self.depth)
        padding = seen.features.padding
        with full_precision(batch.images.device):
            class_maps = self.class_adapters([tower.classification[pair.student] for pair in self.pairs])
            terms = []
            for index, (pair, mine) in enumerate(zip(self.pairs, class_maps, strict=True)):
                hidden = None if padding is None else padding[pair.student]
                classes = self._class_terms(pair, mine, taught, hidden)
                boxes = self._box_terms(index, tower.regression[pair.student], taught.regression[pair.teacher])
                level = self.level_weights[min(pair.student, len(self.level_weights) - 1)]
                terms.append(torch.stack([level * classes.foreground, level * classes.background, classes.attention, *boxes]))
            sums = torch.stack(terms).sum(dim=0)
            named = zip(self.weights.items(), sums, strict=True)
            return Losses({f"pgd_{name}": weight * value for (name, weight), value in named if weight})

    def _class_terms(self, pair: LevelPair, mine: Tensor, taught: PGDTaught, padding: Tensor | None) -> PGDClassTerms:
        theirs = taught.classification[pair.teacher]
        if mine.shape != theirs.shape:
            raise DetdistillError(
                f"{self.slug}: level {pair.student}: the student's map is {tuple(mine.shape)}, the teacher's "
                f"{tuple(theirs.shape)}, but cells are compared one by one; choose other levels="
            )
        background = pgd_normalized(taught.background[pair.teacher].to(mine.dtype))
        return pgd_class_terms(
            mine, theirs, taught.foreground[pair.teacher], background, self.temperature, self.per_image, padding
        )

    def _box_terms(self, index: int, mine: Tensor, taught: PGDCells) -> PGDBoxTerms:
        image, entry = torch.nonzero(taught.filled, as_tuple=True)
        row, column = taught.places[image, entry].unbind(dim=1)
        cells = mine[image, :, row, column]  # [M, C]
        adapted = self.box_adapters[index](cells[:, :, None, None])[:, :, 0, 0]
        return pgd_box_terms(adapted, taught.features[image, entry], taught.weights[image, entry], self.temperature)


def _visible(prediction: Dense, features: Features) -> Tensor:
    """[B, P] bool, False for predictions of cells that show only padding."""
    visible = torch.ones_like(prediction.boxes_xyxy[..., 0], dtype=torch.bool)
    for level, padding in enumerate(features.padding or ()):
        visible[:, prediction.levels == level] = ~at_cells(padding[:, None], prediction, level)[..., 0]
    return visible
