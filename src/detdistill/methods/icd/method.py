"""ICD: a decoder learns to find objects in the teacher's features; the student imitates the features where it looks.

Kang, Zhang, Zhang, Sun, Zheng, "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021, arXiv
2110.12724. Defaults follow the authors' PyTorch code.

The decoder is trained together with the student: it gets descriptors of objects (class, a point near the centre, size), real
ones and invented ones, and predicts whether the object is in the image, and where its sides are. Its attention to the real
objects weights the cells in which the student's projected features should equal the teacher's.

Shape letters: B images, N queries of an image, S cells of all levels, M heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.positions import point_descriptors
from detdistill.functional.precision import full_precision
from detdistill.methods.icd.loss import (
    Form,
    ICDQueries,
    Norm,
    icd_auxiliary_losses,
    icd_queries,
    icd_value_loss,
    icd_value_weights,
)
from detdistill.methods.icd.parts import ConditionalDecoder, Tokens, box_prior, cell_positions, heads_of
from detdistill.methods.shared.align import pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Count, Index, Positive, Weight

POINT_NUMBERS = 266
"""Numbers of a descriptor besides the one-hot class."""
RELEASED_STEPS = 90_000


class ICD(Method[Observation]):
    """ICD between the necks' maps; levels are paired by stride.

    ``icd_identification`` and ``icd_localization`` train the decoder only, ``icd_values`` the student and its projection only.

    Differences from the released code: size bins use each image's own size (the code uses the last image's for the whole batch),
    COCO's statistics belong to the right classes (the code sorts their numbers as text), crowd boxes and boxes without area are
    no objects, padded cells are those of the teacher's masks, and all modules have the run's optimizer (the code trains its
    modules by AdamW at 1e-4, with gradients clipped to 0.01). A learned temperature is left out: the code's gets no gradient.
    """

    slug = "icd"
    title = "Instance-Conditional Knowledge Distillation for Object Detection (NeurIPS 2021)"
    bibtex = """@inproceedings{kang2021icd,
  title={Instance-Conditional Knowledge Distillation for Object Detection},
  author={Kang, Zijian and Zhang, Peizhen and Zhang, Xiangyu and Sun, Jian and Zheng, Nanning},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        weight: Weight = 8.0,
        auxiliary_weight: Positive = 1.0,
        max_queries: Count = 300,
        invented: Weight = 5.0,
        prior: Literal["coco", "uniform"] = "coco",
        jitter: Weight = 0.3,
        heads: Count = 8,
        layers: Index = 1,
        width: Count | None = None,
        temperature: Positive = 1.0,
        final_temperature: Positive | None = None,
        form: Form = "mse",
        norm: Norm = "both",
        norm_eps: Positive = 1e-5,
        bypass_steps: Index = 1000,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels and make the decoder. A student map of another size is resized to the teacher's.

        Args:
            teacher: any detector.
            student: any detector.
            weight: factor of the distance of the values; 8 for one-stage students, 3 for two-stage ones.
            auxiliary_weight: factor of the two losses that train the decoder.
            max_queries: largest number of queries of an image, unless it has more objects; 100 for two-stage students.
            invented: number of invented objects for each real one.
            prior: where invented objects are drawn from. ``coco``: classes and sizes as in COCO if the student knows COCO's
                classes only, otherwise as ``uniform``; ``uniform``: all classes equally often, sizes around 0.2.
            jitter: largest movement of a query's point from the centre, as a fraction of the box's sides.
            heads: attention heads. Fewer are used if the channels are not divisible, or a head would have fewer than 8.
            layers: decoder layers; 0: attention only, as in the MegEngine release.
            width: channels of the decoder; None: those of the teacher's finest level. Teacher levels of other channels get a
                linear layer.
            temperature: of the attention that weights the cells.
            final_temperature: temperature at the end of training, reached linearly; None: it stays constant.
            form: distance and division of the values' loss, see ``icd_value_loss``.
            norm: which values are normalised in each head: those of ``both`` sides, of the ``teacher`` only, ``none``.
            norm_eps: added to the variance there; 1e-4 in the MegEngine release.
            bypass_steps: steps at the beginning in which the distance trains only the student's projection. In runs below 90 000
                steps, the released code's length, the steps are reduced in proportion.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or ``weight`` is 0.
            PairError: no common level.
        """
        super().__init__(teacher, student)
        check_some(self.slug, weight=weight)
        self.weight, self.auxiliary_weight = weight, auxiliary_weight
        self.max_queries, self.invented, self.jitter = max_queries, invented, jitter
        self.temperature, self.final_temperature = temperature, final_temperature
        self.form, self.norm, self.norm_eps, self.bypass_steps = form, norm, norm_eps, bypass_steps
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.classes = len(student.spec.classes)
        self.prior = box_prior(student.spec.classes, prior == "coco")
        width = width or self.pairs[0].teacher_channels
        self.inputs = Tokens([pair.teacher_channels for pair in self.pairs], width, always=False)
        self.decoder = ConditionalDecoder(self.classes + POINT_NUMBERS, width, heads_of(width, heads), layers)
        mine = [pair.student_channels for pair in self.pairs]
        self.projections = nn.ModuleList(Tokens(mine, width, always=True) for _ in self.decoder.layers)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``icd_values``, ``icd_identification`` and ``icd_localization``.

        The monitor ``identified`` is the fraction of the queries whose existence the decoder predicts correctly.
        """
        with full_precision(batch.images.device):
            queries = self._queries(batch)
            sizes = batch.sizes.flip(1)[:, None].to(queries.points_xy01)
            descriptors = point_descriptors(queries.points_xy01, queries.sizes01 * sizes, queries.labels, self.classes)
            theirs = [taught.features.maps[pair.teacher].detach() for pair in self.pairs]
            masks = taught.features.padding
            padding = None if masks is None else [masks[pair.teacher] for pair in self.pairs]
            positions, padded = cell_positions(theirs, padding, self.decoder.width)
            mine = [seen.features.maps[pair.student] for pair in self.pairs]
            mine = [resize_like(level, fixed) for level, fixed in zip(mine, theirs, strict=True)]
            if self._bypassed(clock):
                mine = [level.detach() for level in mine]
            temperature = self._temperature(clock)
            identification, localization, values = [], [], []
            for decoded, project in zip(
                self.decoder(descriptors, self.inputs(theirs), positions, padded), self.projections, strict=True
            ):
                found, placed = icd_auxiliary_losses(decoded.outputs, queries)
                identification.append(found)
                localization.append(placed)
                weights = icd_value_weights(decoded.queries, decoded.keys, queries.real, padded, temperature)
                projected = project(mine).view_as(decoded.values)
                values.append(icd_value_loss(projected, decoded.values, weights, self.form, self.norm, self.norm_eps))
            right = ((decoded.outputs[..., 0] > 0) == queries.real)[~queries.padded].float().mean()
            terms = {
                "icd_values": self.weight * torch.stack(values).mean(),
                "icd_identification": self.auxiliary_weight * torch.stack(identification).sum(),
                "icd_localization": self.auxiliary_weight * torch.stack(localization).sum(),
            }
            return Losses(terms, {"identified": right})

    def _queries(self, batch: Batch) -> ICDQueries:
        """The queries of the batch; crowd boxes and boxes without area are no objects."""
        boxes: list[Tensor] = []
        labels: list[Tensor] = []
        for target in batch.targets:
            usable = ~target.crowd & (target.boxes_xyxy[:, 2:] > target.boxes_xyxy[:, :2]).all(dim=1)
            boxes.append(target.boxes_xyxy[usable])
            labels.append(target.labels[usable])
        return icd_queries(boxes, labels, batch.sizes, self.prior, self.invented, self.max_queries, self.jitter)

    def _bypassed(self, clock: Clock) -> bool:
        """Whether the student's features get no gradient at this step yet."""
        return clock.step < self.bypass_steps * min(1.0, clock.total / RELEASED_STEPS)

    def _temperature(self, clock: Clock) -> float:
        if self.final_temperature is None:
            return self.temperature
        return self.temperature + (self.final_temperature - self.temperature) * clock.progress
