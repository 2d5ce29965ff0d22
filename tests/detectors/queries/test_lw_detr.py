import pytest
import torch
from transformers import AutoModelForObjectDetection, DeformableDetrImageProcessor, RfDetrConfig, RfDetrDinov2Config
from transformers import RfDetrForObjectDetection as LibraryRfDetr
from transformers.loss.loss_lw_detr import LwDetrImageLoss

from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.queries import rf_detr
from detdistill.detectors.queries.shared import lw_detr as family
from detdistill.detectors.queries.shared.deformable import Outputs, Pairs
from detdistill.detectors.save import save_student
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Features
from tests.detectors.dense.shared import unequal_batch
from tests.detectors.queries.deformable import CLASSES, DeformableTests, labels_of, shaken


class GroupTests(DeformableTests):
    """Families with groups of queries; a ViT of their own."""

    processor = DeformableDetrImageProcessor
    unreached = ("backbone.backbone",)
    test_the_backbone_trains = None  # no BatchNorm in it
    test_head_inheritance_by_class_name = None  # one backbone only

    def inputs(self, detector, batch):
        rest = detector.rest(batch)
        pad = torch.nn.functional.pad
        mask = pad((~batch.padding_mask()).long(), rest)
        return {"pixel_values": pad(detector.normalized(batch), rest), "pixel_mask": mask}

    def test_features_alone_are_enough(self, detector):
        batch = unequal_batch()
        detector.eval()
        with torch.no_grad():
            features = detector.features(batch)
            again = Features.stack(features.split(3))
            assert torch.equal(detector.predict(again, batch).logits, detector.predict(features, batch).logits)
        assert features.channels == detector.spec.channels
        assert features.strides == detector.spec.strides
        stride = features.strides[0]
        rows = (~features.padding[0][2]).sum(0)[0]
        assert int(rows) == -(-64 // stride)

    def test_copies(self, detector):
        batch = unequal_batch()
        detector.eval().requires_grad_(False)
        bottom, features = detector.backbone_features(batch), detector.features(batch)
        neck, head = detector.copy_neck().eval(), detector.copy_head().eval()
        assert torch.equal(neck(bottom).maps[0], features.maps[0])
        prediction = head.predict(features, batch)
        assert torch.equal(prediction.logits, detector.predict(features, batch).logits)
        head.loss(prediction, batch).total().backward()
        assert float(head.model.class_embed.weight.grad.abs().sum()) > 0
        assert not torch.allclose(detector.copy_neck(fresh=True).eval()(bottom).maps[0], features.maps[0])

    def test_the_first_group_is_shown_and_all_are_trained(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        groups = detector.config.group_detr
        assert prediction.logits.shape[2] == self.queries
        assert detector.own(prediction).layers[0].logits.shape[1] == groups * self.queries
        features = detector.features(batch)
        alone = detector.decode(features, prediction.seed, batch)
        torch.testing.assert_close(alone.logits, detector.predict(features, batch).logits, rtol=1e-4, atol=1e-5)
        assert detector.config.group_detr == groups

    def layer_terms(self, prediction):
        return {0: "_0", 1: "_1", 2: ""}

    def test_foreign_matches_go_through_the_librarys_formula(self, detector):
        """Of foreign queries: one group, without the encoder."""
        batch = unequal_batch()
        features = detector.features(batch)
        prediction = detector.decode(features, detector.seed(features, batch), batch)
        matched = torch.full(prediction.logits.shape[:3], -1)
        matched[:, 0, [4, 9, 20]] = torch.tensor([2, 0, 0])
        matched[:, 1, 3] = 1
        none = torch.tensor([], dtype=torch.int64)
        indices = [(torch.tensor([4, 9, 20]), torch.tensor([2, 0, 0])), (torch.tensor([3]), torch.tensor([0])), (none, none)]
        criterion, labels = detector.criterion(), labels_of(batch, batch.sizes.tolist())
        mine = detector.loss(prediction, batch, Assignment(matched)).terms
        for layer, suffix in self.layer_terms(prediction).items():
            outputs = {"logits": prediction.logits[layer], "pred_boxes": prediction.boxes_cxcywh01[layer]}
            for kind in ("labels", "boxes"):
                for name, value in criterion.get_loss(kind, outputs, labels, indices, 4).items():
                    torch.testing.assert_close(mine[name + suffix], value * self.weight(detector, name), rtol=1e-5, atol=1e-6)

    def test_weights_ignored_and_normalizer(self, detector):
        batch = unequal_batch()
        features = detector.features(batch)
        prediction = detector.decode(features, detector.seed(features, batch), batch)
        own = detector.assign(prediction, batch)
        plain = detector.loss(prediction, batch, own).terms
        twice = detector.loss(prediction, batch, Assignment(own.matched, weights=torch.full(own.matched.shape, 2.0))).terms
        half = detector.loss(prediction, batch, Assignment(own.matched, normalizer=torch.tensor(8.0))).terms
        ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
        for name, term in plain.items():
            torch.testing.assert_close(twice[name], 2 * term, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(half[name], term / 2, rtol=1e-5, atol=1e-6)
            assert float(ignored[name].detach()) <= float(term.detach()) * 1.0001


class TestLwDetr(GroupTests):
    family = "lw_detr"
    exact = True

    @pytest.fixture(scope="class")
    def name(self):
        return "lw_detr:vit_nano,dim=32,queries=30,decoder=3,heads=4,ffn=64,levels=3-3"

    @pytest.fixture(scope="class")
    def built(self, name):
        torch.manual_seed(0)
        return shaken(build_detector(name, CLASSES), 0.02), torch.get_rng_state()

    def test_dense_attention_is_what_the_decoder_computes(self, detector):
        batch = unequal_batch()
        detector.eval()
        features = detector.features(batch)
        shown = detector.decode(features, detector.seed(features, batch), batch, attention=True)
        assert shown.attention.shape == (3, 3, 8, 30, 256)
        assert float(shown.attention.sum(-1).max()) < 1.001
        assert shown.self_attention.shape == (3, 3, 4, 30, 30)


@pytest.fixture
def student(tmp_path):
    """A tiny RF-DETR as the library saves it."""
    torch.manual_seed(0)
    vit = RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        num_windows=2,
        image_size=64,
        out_features=["stage1", "stage2"],
        window_block_indexes=[0],
    )
    config = RfDetrConfig(
        backbone_config=vit,
        d_model=32,
        decoder_layers=3,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        decoder_ffn_dim=64,
        num_queries=30,
        group_detr=3,
        dropout=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    LibraryRfDetr(config).save_pretrained(tmp_path / "rf")
    return tmp_path / "rf"


def test_rf_detr_equals_the_library(student, tmp_path):
    detector = shaken(load_detector(f"hf:{student}"), 0.02)
    batch = unequal_batch()
    pad = torch.nn.functional.pad
    inputs = {
        "pixel_values": pad(detector.normalized(batch), detector.rest(batch)),
        "pixel_mask": pad((~batch.padding_mask()).long(), detector.rest(batch)),
    }
    assert detector.spec.strides == (16,)
    detector.train()
    torch.manual_seed(1)
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    mine = {name: p.grad.clone() for name, p in detector.model.named_parameters() if p.grad is not None}
    detector.zero_grad()
    torch.manual_seed(1)
    theirs = detector.model(**inputs, labels=labels_of(batch, batch.sizes.tolist()))
    torch.testing.assert_close(losses.total(), theirs.loss, rtol=1e-5, atol=1e-5)
    theirs.loss.backward()
    for name, parameter in detector.model.named_parameters():
        assert (parameter.grad is not None) == (name in mine), name
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    detector.eval()
    with torch.no_grad():
        prediction, outputs = detector(batch).prediction, detector.model(**inputs)
    torch.testing.assert_close(prediction.logits[-1], outputs.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prediction.boxes_cxcywh01[-1], outputs.pred_boxes, rtol=1e-5, atol=1e-6)
    save_student(detector, tmp_path / "again")
    library = AutoModelForObjectDetection.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(library(**inputs).logits, outputs.logits, rtol=1e-4, atol=1e-5)
    assert load_detector(tmp_path / "again").spec.classes == tuple(CLASSES)


def test_what_cannot_be_built():
    with pytest.raises(ModelError, match="take one of its own: vit_nano"):
        build_detector("lw_detr:resnet18", CLASSES)
    with pytest.raises(ModelError, match="must lie within 3-5"):
        build_detector("lw_detr:vit_tiny,levels=3-6", CLASSES)
    with pytest.raises(ModelError, match="RF-DETR needs its pretrained weights"):
        build_detector("rf_detr:dinov2", CLASSES)
    assert rf_detr.TINY is None


def class_loss(logits, matched):
    """Our class loss of logits [N] of one class; the first ``matched`` queries have boxes with which they overlap by half."""
    boxes, queries = half_overlapping(logits.numel())
    index = torch.arange(matched)
    zeros = torch.zeros_like(index)
    pairs = Pairs(zeros, index, zeros, boxes[:matched], torch.ones(matched), torch.ones(1, logits.numel()))
    return family.quality_loss(Outputs(logits.view(1, -1, 1), queries[None]), pairs, 0.25)


def library_class_loss(logits, matched):
    boxes, queries = half_overlapping(logits.numel())
    index = torch.arange(matched)
    loss = LwDetrImageLoss(None, 1, 0.25, ["labels"], 1)
    outputs = {"logits": logits.view(1, -1, 1), "pred_boxes": queries[None]}
    targets = [{"class_labels": torch.zeros_like(index), "boxes": boxes[:matched]}]
    return loss.loss_labels(outputs, targets, [(index, index)], 1)["loss_ce"]


def half_overlapping(count):
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(count, 4)
    return boxes, boxes * torch.tensor([1.0, 1.0, 0.5, 1.0])


def test_class_loss_of_extreme_logits():
    """transformers has inf from logit 17 and NaN from -104 on in float32."""
    extreme = torch.tensor([17.0, 60.0, -104.0, -500.0], requires_grad=True)
    found = class_loss(extreme, 0)
    torch.testing.assert_close(found, torch.tensor(77.0), rtol=1e-5, atol=0)  # log(1 - sigmoid(x)) is -x for a large x
    found.backward()
    assert bool(torch.isfinite(extreme.grad).all())
    assert not bool(torch.isfinite(library_class_loss(extreme, 0)))
    wrong = torch.tensor([-500.0, -104.0, 17.0], requires_grad=True)
    found = class_loss(wrong, 3)
    found.backward()
    assert bool(torch.isfinite(found))
    assert bool((wrong.grad[:2] < 0).all())  # pulled up
    assert bool(torch.isfinite(wrong.grad).all())


@pytest.mark.parametrize("matched", [0, 1])
def test_class_loss_is_the_librarys_where_that_is_finite(matched):
    """Bit by bit for each logit, and so are the gradients where the library's are finite."""
    for logit in torch.cat([torch.linspace(-106, 20, 127), torch.linspace(-104, -86, 91), torch.linspace(16, 17, 21)]):
        mine, theirs = (logit.clone().view(1).requires_grad_() for _ in range(2))
        own, library = class_loss(mine, matched), library_class_loss(theirs, matched)
        own.backward()
        library.backward()
        assert bool(torch.isfinite(own))
        assert bool(torch.isfinite(mine.grad).all())
        if bool(torch.isfinite(library)):
            assert torch.equal(own, library), float(logit)
            if bool(torch.isfinite(theirs.grad).all()):
                assert torch.equal(mine.grad, theirs.grad), float(logit)
