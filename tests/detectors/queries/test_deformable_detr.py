from dataclasses import replace

import pytest
import torch
from transformers import DeformableDetrImageProcessor

from detdistill.detectors.build import build_detector
from detdistill.errors import ModelError
from detdistill.structures import Batch
from tests.detectors.dense.shared import unequal_batch
from tests.detectors.queries.deformable import CLASSES, SMALL, DeformableTests, LearnsByHeart, doubled, labels_of


class TestPlain(DeformableTests):
    family = "deformable_detr"
    processor = DeformableDetrImageProcessor

    def test_an_image_alone_on_the_same_canvas_is_the_image_in_the_batch(self, detector):
        batch = unequal_batch()
        detector.eval()
        with torch.no_grad():
            together = detector(batch).prediction
            for index in range(3):
                own = slice(index, index + 1)
                alone = Batch(batch.images[own], batch.sizes[own], batch.targets[own], (index,), (batch.views[index],))
                single = detector(alone).prediction
                torch.testing.assert_close(single.logits, together.logits[:, own], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(single.boxes_cxcywh01, together.boxes_cxcywh01[:, own], rtol=1e-4, atol=1e-5)


class TestRefined(LearnsByHeart, DeformableTests):
    family = "deformable_detr"
    options = ",refine=true"
    processor = DeformableDetrImageProcessor

    def test_points_are_made_of_positions_when_there_are_none(self, detector):
        batch = unequal_batch()
        detector.eval()
        features = detector.features(batch)
        seed = detector.seed(features, batch)
        bare = detector.decode(features, replace(seed, reference=None), batch)
        assert torch.equal(bare.logits, detector.decode(features, seed, batch).logits)
        boxes = torch.cat([seed.reference, torch.full_like(seed.reference, 0.2)], dim=-1)
        assert detector.decode(features, replace(seed, reference=boxes), batch).boxes_cxcywh01.shape == (3, 3, 30, 4)
        with pytest.raises(ValueError, match="queries need a reference"):
            detector.decode(features, replace(seed, reference=None, position=None), batch)


class TestTwoStage(LearnsByHeart, DeformableTests):
    family = "deformable_detr"
    options = ",two_stage=true"
    processor = DeformableDetrImageProcessor
    not_compared = ("_enc",)
    steps, rate, tolerance = 80, 2e-3, 16.0  # the queries change while the encoder learns to choose them

    def test_the_encoders_loss_is_the_librarys_on_all_cells(self, detector):
        detector, batch = detector.double(), doubled(unequal_batch())
        prediction = detector(batch).prediction
        criterion = detector.criterion()
        labels = labels_of(batch, batch.sizes.tolist())
        for label in labels:
            label["class_labels"] = torch.zeros_like(label["class_labels"])
        theirs = criterion({"logits": prediction.own.logits, "pred_boxes": prediction.own.boxes}, labels)
        mine = detector.loss(prediction, batch).terms
        for name, weight in detector.term_weights().items():
            torch.testing.assert_close(mine[f"{name}_enc"], theirs[name] * weight)

    def test_too_few_cells_for_the_queries(self, name):
        detector = build_detector(name.replace("queries=30", "queries=400"), CLASSES)
        with pytest.raises(ModelError, match="give 280 encoder cells, fewer than the 400 queries"):
            detector(unequal_batch())


def test_levels_above_the_backbone_equal_the_library():
    torch.manual_seed(0)
    detector = build_detector(f"deformable_detr:{SMALL.replace('levels=3-5', 'levels=4-7')}", CLASSES).eval()
    batch = unequal_batch()
    assert detector.spec.strides == (16, 32, 64, 128)
    with torch.no_grad():
        features = detector.features(batch)
        prediction = detector.predict(features, batch)
        outputs = detector.model(detector.normalized(batch), pixel_mask=(~batch.padding_mask()).long())
    assert [tuple(level.shape[-2:]) for level in features.maps] == [(7, 8), (4, 4), (2, 2), (1, 1)]
    assert torch.equal(prediction.logits[-1], outputs.logits)
    assert torch.equal(prediction.boxes_cxcywh01[-1], outputs.pred_boxes)
    assert torch.equal(detector.copy_neck().eval()(detector.backbone_features(batch)).maps[0], features.maps[0])


def test_scores_start_low_and_boxes_at_their_reference():
    for options in ("", ",refine=true", ",two_stage=true"):
        torch.manual_seed(0)
        detector = build_detector(f"deformable_detr:{SMALL}{options}", CLASSES).eval()
        batch = unequal_batch()
        with torch.no_grad():
            prediction = detector(batch).prediction
        assert 0.001 < float(prediction.logits.sigmoid().median()) < 0.05
        width = prediction.seed.reference.shape[-1]
        torch.testing.assert_close(prediction.boxes_cxcywh01[0][..., :width], prediction.seed.reference, rtol=1e-3, atol=1e-4)


def test_options_that_do_not_fit():
    with pytest.raises(ModelError, match="dim=48 must be a multiple of heads=8 and of 32"):
        build_detector("deformable_detr:resnet10t,dim=48", CLASSES)
    with pytest.raises(ModelError, match="levels=6-7 must begin at 5 or below"):
        build_detector("deformable_detr:resnet10t,levels=6-7", CLASSES)
