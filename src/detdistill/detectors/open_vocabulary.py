"""Detectors that are told by text what to find: Grounding DINO, MM-Grounding-DINO, OWL-ViT and OWLv2 of transformers.

They label images; they are no teachers with stages, because their classes are words of a prompt. Weights have their own licences:
those of Grounding DINO and OWL are published under Apache-2.0, as their model cards say.

Shape letters: N queries of an image, T tokens of the prompt, K classes, D detections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.ops import batched_nms, box_convert
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from detdistill.detectors.queries.shared.transformers_files import is_offline, read_config, reason_of
from detdistill.detectors.queries.shared.transformers_models import quiet
from detdistill.errors import ModelError
from detdistill.structures import Detections

BY_TOKEN = ("grounding-dino", "mm-grounding-dino")
"""Model types that score each token of one prompt with all classes."""
BY_TEXT = ("owlvit", "owlv2")
"""Model types that score each of several texts."""
TEXT = "a photo of a {}"
"""Text of a class for models that score texts, as their authors use it."""


def is_open_vocabulary(source: str) -> bool:
    """Whether a folder or a name on the hub is a detector of one of these types.

    Raises:
        ModelError: it has no readable config.
    """
    return read_config(source).model_type in (*BY_TOKEN, *BY_TEXT)


def load_open_vocabulary(source: str) -> OpenVocabulary:
    """Load a detector with its processor from a ``save_pretrained`` folder or the hub (safetensors only).

    Raises:
        ModelError: files are missing or broken, or hold another kind of model.
    """
    config = read_config(source)
    if config.model_type not in (*BY_TOKEN, *BY_TEXT):
        known = ", ".join((*BY_TOKEN, *BY_TEXT))
        raise ModelError(f"{source}: a {config.model_type} takes no class names; models that do: {known}")
    offline = is_offline(source)
    with quiet():
        try:
            processor = AutoProcessor.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
            model = AutoModelForZeroShotObjectDetection.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=offline
            )
        except Exception as error:  # the library raises OSError, ImportError, SafetensorError, RuntimeError, ValueError
            raise ModelError(f"{source}: {reason_of(error)}") from error
    return OpenVocabulary(model, processor, source)


class OpenVocabulary:
    """A detector of transformers that is told by text what to find."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        """Take a model with its processor; ``name`` is for messages."""
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        self.by_token = model.config.model_type in BY_TOKEN

    def to(self, device: torch.device | str) -> OpenVocabulary:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def detect(self, image: Image, classes: Sequence[str], least: float = 0.0, nms: float = 0.7) -> Detections:
        """Find the objects of some classes in one image.

        A box has the class of its highest score. The score of a class of several tokens is the mean over its tokens, as in
        MMDetection's Grounding DINO.

        Args:
            image: RGB.
            classes: K names, in words ("safety helmet").
            least: boxes with a lower score are left out.
            nms: of two boxes of a class with a higher IoU, the one with the lower score is left out.

        Returns:
            Boxes in pixels of the image, clipped to it, best first.

        Raises:
            ModelError: a class has no letter or digit, or the prompt is too long for the model.
        """
        scores, boxes = self._by_token(image, classes) if self.by_token else self._by_text(image, classes)
        best, labels = scores.max(dim=1)
        corners = box_convert(boxes, "cxcywh", "xyxy")
        corners[:, 0::2] = corners[:, 0::2].clamp(0, image.width)
        corners[:, 1::2] = corners[:, 1::2].clamp(0, image.height)
        sized = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        keep = torch.nonzero((best >= least) & sized).flatten()
        keep = keep[batched_nms(corners[keep], best[keep], labels[keep], nms)]
        return Detections(corners[keep].cpu(), best[keep].cpu(), labels[keep].cpu())

    def _by_token(self, image: Image, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores [N, K] and boxes [N, 4] (centre and size in pixels) of a model that scores the tokens of one prompt."""
        prompt, spans = prompt_of(classes)
        offsets = self.processor.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        most = int(self.model.config.max_text_len if hasattr(self.model.config, "max_text_len") else 256)
        if len(offsets) > most:
            raise ModelError(f"{self.name}: {len(classes)} classes take {len(offsets)} tokens, but it reads {most}; give fewer")
        inputs = self.processor(images=image, text=prompt, return_tensors="pt").to(self.model.device)
        found = self.model(**inputs)
        tokens = found.logits[0].float().sigmoid()
        columns = []
        for name, (first, last) in zip(classes, spans, strict=True):
            mine = [index for index, (begin, end) in enumerate(offsets) if begin < end and begin >= first and end <= last]
            if not mine:
                raise ModelError(f"class {name!r}: {self.name} reads no word in it; write it in words")
            columns.append(tokens[:, mine].mean(dim=1))
        size = torch.tensor([image.width, image.height] * 2, device=tokens.device, dtype=torch.float32)
        return torch.stack(columns, dim=1), found.pred_boxes[0].float() * size

    def _by_text(self, image: Image, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores and boxes as ``_by_token``, of a model that scores one text for each class."""
        prompt_of(classes)  # checks the names
        texts = [[TEXT.format(name) for name in classes]]
        inputs = self.processor(images=image, text=texts, return_tensors="pt", truncation=True).to(self.model.device)
        found = self.model(**inputs)
        # OWLv2 pads the image to a square on the right and at the bottom; OWL-ViT stretches it.
        square = self.model.config.model_type == "owlv2"
        sides = [max(image.size)] * 4 if square else [image.width, image.height] * 2
        size = torch.tensor(sides, device=found.logits.device, dtype=torch.float32)
        return found.logits[0].float().sigmoid(), found.pred_boxes[0].float() * size


def prompt_of(classes: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The prompt of Grounding DINO for some classes, and the place of each class in it (first and last character).

    Raises:
        ModelError: a class has no letter or digit, or a full stop, which ends a class in the prompt.

    Example:
        >>> prompt_of(["Safety helmet", "person"])
        ('safety helmet. person.', [(0, 13), (15, 21)])
    """
    prompt, spans = "", []
    for name in classes:
        words = " ".join(name.lower().split())
        if not re.search(r"\w", words) or "." in words:
            raise ModelError(f"class {name!r}: write it in words, without a full stop")
        first = len(prompt) + (1 if prompt else 0)
        prompt += f"{' ' if prompt else ''}{words}."
        spans.append((first, first + len(words)))
    return prompt, spans
