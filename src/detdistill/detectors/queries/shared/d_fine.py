"""D-FINE and DEIMv2: each box side is a distribution, which each decoder layer refines.

Peng et al., "D-FINE", ICLR 2025 (FDR: section 4.1, FGL: Eq. 4-5, DDF: section 4.2), with the losses of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_d_fine import bbox2distance
from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function

from detdistill.detectors.queries.shared import deformable
from detdistill.detectors.queries.shared import rt_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared.deformable import Memory, Outputs
from detdistill.structures import Batch, BoxDistributions, Prediction

TEMPERATURE = 5.0
"""Temperature of the distributions in DDF, as in transformers and the authors' code."""


@dataclass(frozen=True)
class FineOutputs(Outputs):
    """Predictions of a set of queries with a distribution for each box side."""

    sides: Tensor
    """[B, N, 4 * (bins + 1)] logits of the distances of left, top, right and bottom."""
    initial: Tensor
    """[B, N, 4] boxes from which the distances are measured, no gradient."""
    teacher: tuple[Tensor, Tensor] | None = None
    """The last layer's ``sides`` and ``logits``, the DDF targets of the earlier layers."""


class FineDetector(family.HybridEncoderDetector):
    """Decoder and losses of the family.

    The losses equal those of transformers, including one oddity. The outputs before refinement (class and box of the first
    layer's embedding) are the first auxiliary set, but the distributions are not shifted. So the class and box of layer i are
    trained together with the distribution of layer i+1, and the second-to-last layer has no loss on class and box.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requires_grad_(True)
        self.spec = replace(self.spec, box_bins=int(self.config.max_num_bins) + 1)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set ``requires_grad`` of the parameters, except the weighting function's two constants (parameters in transformers)."""
        super().requires_grad_(requires_grad)
        for name in ("model.decoder.up", "model.decoder.reg_scale"):
            constant = dict(self.model.named_parameters()).get(name)
            if constant is not None:
                constant.requires_grad_(False)
        return self

    # ----------------------------------------------------------------------------------------------------------- decoder

    def run(self, memory: Memory, content: Tensor, reference: Tensor, mask: Tensor | None) -> family.Run:
        """Run the decoder layers; each layer adds to the distance logits of the previous layer."""
        decoder, hidden = self.model.model.decoder, content
        bins = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        layers, embedding = [], []
        first, previous, sides = None, 0, 0
        for number, layer in enumerate(decoder.layers):
            hidden = layer(
                hidden,
                position_embeddings=decoder.query_pos_head(reference).clamp(min=-10, max=10),
                reference_points=reference.unsqueeze(2),
                spatial_shapes=memory.sizes,
                spatial_shapes_list=list(memory.shapes),
                encoder_hidden_states=memory.tokens,
                encoder_attention_mask=mask,
            )
            scores = decoder.class_embed[number](hidden)
            if first is None:
                boxes = (decoder.pre_bbox_head(hidden) + shared.inverse_sigmoid(reference)).sigmoid()
                first = Outputs(shared.full_precision(scores), boxes)
            sides = decoder.bbox_embed[number](hidden + previous) + sides
            boxes = distance2bbox(first.boxes.detach(), decoder.integral(sides, bins), decoder.reg_scale)
            scores = shared.full_precision(decoder.lqe_layers[number](scores, sides))
            layers.append(FineOutputs(scores, boxes, shared.full_precision(sides), first.boxes.detach()))
            embedding.append(hidden)
            previous, reference = hidden.detach(), boxes.detach()
        return family.Run(tuple(layers), torch.stack(embedding), first)

    def distributions(self, prediction: Prediction, batch: Batch) -> BoxDistributions:
        """Return the distributions of the last layer; a step is ``1 / reg_scale`` of the side of the first layer's box."""
        last = cast(FineOutputs, self.own(prediction).run.layers[-1])
        decoder = self.model.model.decoder
        height, width = self.frame_hw(batch)
        boxes = last.initial * last.initial.new_tensor([width, height, width, height])
        center, side = boxes[..., :2], boxes[..., 2:]
        units = side.repeat(1, 1, 2) / decoder.reg_scale.abs().to(boxes)
        units = units * boxes.new_tensor([-1.0, -1.0, 1.0, 1.0])
        steps = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale).to(boxes)
        origins = torch.cat([center - side / 2, center + side / 2], dim=-1)
        return BoxDistributions(last.sides.unflatten(-1, (4, -1)), origins.detach(), units.detach(), steps.detach())

    # ------------------------------------------------------------------------------------------------------------ training

    def trained(self, outputs: Outputs) -> Outputs:
        """Clip boxes to the frame."""
        return replace(outputs, boxes=outputs.boxes.clamp(min=0, max=1))

    def shifted(self, run: family.Run) -> list[tuple[FineOutputs, int | None]]:
        """List the auxiliary sets with distributions: first boxes, then class and box of each layer, with the next distribution.

        Returns:
            Each set with the decoder layer of its class and box; None for the first boxes.
        """
        layers = cast(tuple[FineOutputs, ...], run.layers)
        teacher = (layers[-1].sides, layers[-1].logits)
        sets = []
        for number, (outputs, next_layer) in enumerate(zip([run.first, *layers], layers, strict=False)):
            assert outputs is not None
            fine = FineOutputs(outputs.logits, outputs.boxes, next_layer.sides, next_layer.initial, teacher)
            sets.append((fine, number - 1 if number else None))
        return sets

    def sets(self, own: family.Own) -> list[tuple[str, Outputs, int | None]]:
        """List the trained sets; auxiliary sets are those of ``shifted`` except the one with the last layer's distribution."""
        *before, last = own.run.layers
        sets: list[tuple[str, Outputs, int | None]] = [("", Outputs(last.logits, last.boxes), len(before))]
        if self.config.auxiliary_loss:
            shifted = self.shifted(own.run)[: len(before)]
            sets += [(f"_aux_{number}", outputs, layer) for number, (outputs, layer) in enumerate(shifted)]
            if own.encoder is not None:
                sets.append((f"_aux_{len(before)}", own.encoder, None))
        return sets

    def noisy_sets(self, noisy: family.Run) -> Sequence[Outputs]:
        """List all sets of ``shifted``."""
        return [outputs for outputs, _ in self.shifted(noisy)]

    def place_losses(self, outputs: Outputs, pairs: deformable.Pairs, normalizer: Any) -> dict[str, Tensor]:
        """Compute the family's losses, and FGL and DDF for sets with distributions."""
        losses = super().place_losses(outputs, pairs, normalizer)
        if isinstance(outputs, FineOutputs):
            losses["loss_fgl"] = self.localization_loss(outputs, pairs) / normalizer * self.config.weight_loss_fgl
            losses["loss_ddf"] = self.foresight_loss(outputs, pairs) * self.config.weight_loss_ddf
        return losses

    def localization_loss(self, outputs: FineOutputs, pairs: deformable.Pairs) -> Tensor:
        """Compute FGL: cross-entropy with the two bins next to the true distance, summed over the sides, times the IoU."""
        config, where = self.config, (pairs.image, pairs.query)
        sides = outputs.sides[where].reshape(-1, config.max_num_bins + 1)
        up = sides.new_tensor([config.up])
        wanted = deformable.corners(pairs.boxes)
        left, right_share, left_share = bbox2distance(outputs.initial[where], wanted, config.max_num_bins, config.reg_scale, up)
        entropy = F.cross_entropy(sides, left.long(), reduction="none") * left_share
        entropy = entropy + F.cross_entropy(sides, left.long() + 1, reduction="none") * right_share
        overlap = deformable.overlaps(outputs.boxes[where].detach(), pairs.boxes)[0] * pairs.weights
        return (entropy * overlap.repeat_interleave(4)).sum()

    def foresight_loss(self, outputs: FineOutputs, pairs: deformable.Pairs) -> Tensor:
        """Compute DDF: KL divergence from the last layer's distributions, averaged separately over matched and unmatched queries.

        Matched queries are weighted by their IoU, unmatched queries by the last layer's score. The two averages are weighted
        by the square roots of their counts. No normaliser divides the result.
        """
        assert outputs.teacher is not None
        teacher_sides, teacher_logits = outputs.teacher
        if torch.equal(outputs.sides, teacher_sides):
            return outputs.sides.sum() * 0
        where = (pairs.image, pairs.query)
        strength = teacher_logits.detach().sigmoid().amax(dim=-1)
        strength[where] = deformable.overlaps(outputs.boxes[where].detach(), pairs.boxes)[0].to(strength.dtype)
        positive = torch.zeros_like(strength, dtype=torch.bool)
        positive[where] = True
        student, teacher = (side.unflatten(-1, (4, -1)) / TEMPERATURE for side in (outputs.sides, teacher_sides.detach()))
        divergence = F.kl_div(student.log_softmax(dim=-1), teacher.softmax(dim=-1), reduction="none").sum(dim=-1)  # [B, N, 4]
        each = divergence * (strength * pairs.counted)[..., None] * TEMPERATURE**2
        total, shares = each.sum() * 0, each.new_zeros(())
        for chosen in (positive, ~positive & (pairs.counted > 0)):
            share = (chosen.sum() * 4 / len(chosen)) ** 0.5
            if bool(chosen.any()):
                total = total + each[chosen].mean() * share
            shares = shares + share
        return total / shares.clamp(min=1e-12)
