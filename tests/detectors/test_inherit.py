import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.dense import fcos
from detdistill.detectors.inherit import inherit_head
from tests.tiny import TinyDense, TinyQueries, tiny_batch


class Rows(TinyDense):
    """Tells which rows of its output layer are which class."""

    def class_rows(self, name):
        return torch.arange(len(self.spec.classes))[:, None] if name.startswith("head.logits") else None


class SoftmaxRows(Rows):
    """An output layer of two anchors, each with a background row in front."""

    def __init__(self, classes, seed=0):
        super().__init__(classes, seed=seed)
        torch.manual_seed(seed)
        self.head.logits = torch.nn.Conv2d(8, 2 * (len(classes) + 1), 1)

    def class_rows(self, name):
        count = len(self.spec.classes)
        first = torch.arange(1, count + 1)[:, None]
        return torch.cat([first, first + count + 1], dim=1) if name.startswith("head.logits") else None


def state(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def test_neck_and_head_get_the_teachers_values_and_the_backbone_keeps_its_own():
    student, teacher = TinyDense(seed=1), TinyDense(seed=2)
    before = state(student)
    inherited = inherit_head(student, teacher)
    assert inherited.skipped == ()
    for name, value in student.state_dict().items():
        if name.startswith(("levels.", "head.")):
            assert name in inherited.copied
            assert torch.equal(value, teacher.state_dict()[name])
            assert value.data_ptr() != teacher.state_dict()[name].data_ptr()
        else:
            assert torch.equal(value, before[name])
    batch = tiny_batch()
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    assert torch.equal(student(batch).prediction.logits, teacher(batch).prediction.logits)


def test_values_are_not_shared():
    student, teacher = TinyDense(seed=1), TinyDense(seed=2)
    inherit_head(student, teacher)
    before = state(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_other_shapes_and_missing_tensors_are_named():
    student, teacher = TinyDense(channels=(4, 4, 4), strides=(8, 16, 32)), TinyDense(channels=(8, 8))
    inherited = inherit_head(student, teacher)
    reasons = dict(inherited.skipped)
    assert reasons["levels.convs.0.weight"] == "its shape is [4, 6, 1, 1], the other's [8, 6, 1, 1]"
    assert reasons["levels.convs.2.weight"] == "the other detector has no such tensor"
    # The box layer's bias does not depend on the width.
    assert inherited.copied == ("head.logits.bias", "head.deltas.bias")
    assert str(inherited).startswith("2 tensors of neck and head inherited from the teacher; 16 skipped, the first is levels.")


def test_detectors_of_different_kinds_share_nothing():
    student, teacher = TinyDense(seed=1), TinyQueries(seed=2)
    before = state(student)
    inherited = inherit_head(student, teacher)
    assert inherited.copied == ()
    assert str(inherited) == (
        "nothing inherited: the student tinydense:patches and the teacher tinyqueries:patches are different kinds of detector"
    )
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_classes_are_matched_by_name():
    student, teacher = Rows(("cat", "emu", "dog"), seed=1), Rows(("dog", "cow", "cat", "pig"), seed=2)
    before = state(student)
    inherited = inherit_head(student, teacher)
    assert inherited.skipped == ()
    for name in ("head.logits.weight", "head.logits.bias"):
        mine, theirs = student.state_dict()[name], teacher.state_dict()[name]
        assert torch.equal(mine[0], theirs[2])
        assert torch.equal(mine[1], before[name][1])
        assert torch.equal(mine[2], theirs[0])
    assert torch.equal(student.head.deltas.weight, teacher.head.deltas.weight)


def test_same_number_of_classes_in_another_order():
    student, teacher = Rows(("a", "b"), seed=1), Rows(("b", "a"), seed=2)
    inherit_head(student, teacher)
    assert torch.equal(student.head.logits.bias, teacher.head.logits.bias.flip(0))


def test_background_rows_of_every_anchor_are_copied():
    student, teacher = SoftmaxRows(("a", "b"), seed=1), SoftmaxRows(("x", "b", "y"), seed=2)
    before = state(student)["head.logits.bias"]
    inherit_head(student, teacher)
    mine, theirs = student.head.logits.bias, teacher.head.logits.bias
    assert torch.equal(mine, torch.stack([theirs[0], before[1], theirs[2], theirs[4], before[4], theirs[6]]))


def test_no_common_class_leaves_the_outputs_alone():
    student, teacher = Rows(("a", "b"), seed=1), Rows(("c", "d"), seed=2)
    before = state(student)
    inherited = inherit_head(student, teacher)
    reason = "the class lists have no name in common"
    assert inherited.skipped == (("head.logits.weight", reason), ("head.logits.bias", reason))
    assert torch.equal(student.head.logits.bias, before["head.logits.bias"])
    assert torch.equal(student.head.deltas.bias, teacher.head.deltas.bias)


def test_unknown_rows_with_other_classes_share_nothing():
    inherited = inherit_head(TinyDense(("a", "b")), TinyDense(("b", "a")))
    assert inherited.copied == ()
    assert "does not tell which outputs belong to which class" in str(inherited)


def tiny_fcos(classes, seed, **changes):
    torch.manual_seed(seed)
    options = {"channels": (8, 16, 16, 24), "stem": 8, "neck": 32, "levels": (3, 5), "convs": 1} | changes
    return fcos.build("resnet10t", classes, fcos.OPTIONS(**options))


def test_fcos_inherits_the_head_of_a_wider_teacher():
    student = tiny_fcos(("a", "b"), seed=1)
    teacher = tiny_fcos(("a", "b"), seed=2, channels=(16, 32, 32, 48))
    inherited = inherit_head(student, teacher)
    # Only what reads the backbone's maps has another shape.
    assert [name for name, _ in inherited.skipped] == [f"model.backbone.fpn.inner_blocks.{level}.0.weight" for level in range(3)]
    assert not any(name.startswith("model.backbone.body") for name in inherited.copied)
    batch = tiny_batch()
    features = teacher.features(batch)
    mine, theirs = student.predict(features, batch), teacher.predict(features, batch)
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.boxes_xyxy, theirs.boxes_xyxy)
    assert torch.equal(mine.quality, theirs.quality)


def test_fcos_classes_are_matched_by_name():
    student, teacher = tiny_fcos(("b", "x", "a"), seed=1), tiny_fcos(("a", "b"), seed=2)
    own = student.state_dict()["model.head.classification_head.cls_logits.weight"][2].clone()
    assert inherit_head(student, teacher).skipped == ()
    batch = tiny_batch()
    features = teacher.features(batch)
    mine, theirs = student.predict(features, batch).logits, teacher.predict(features, batch).logits
    assert torch.allclose(mine[..., [2, 0]], theirs, atol=1e-6)
    assert torch.equal(student.model.head.classification_head.cls_logits.weight[2], own)


def test_faster_rcnn_boxes_and_scores_are_matched_by_class_name():
    name = "faster_rcnn:resnet10t,channels=8-8-16-16,neck=16,levels=3-4,mlp=16"
    student, teacher = build_detector(name, ("cat", "dog")), build_detector(name, ("dog", "bird", "cat"))
    report = inherit_head(student, teacher)
    mine, theirs = student.model.roi_heads.box_predictor, teacher.model.roi_heads.box_predictor
    assert report.skipped == ()
    torch.testing.assert_close(mine.cls_score.weight[1], theirs.cls_score.weight[3])  # cat
    torch.testing.assert_close(mine.cls_score.bias[2], theirs.cls_score.bias[1])  # dog
    torch.testing.assert_close(mine.cls_score.weight[0], theirs.cls_score.weight[0])  # background
    torch.testing.assert_close(mine.bbox_pred.weight[4:8], theirs.bbox_pred.weight[12:16])
    torch.testing.assert_close(mine.bbox_pred.weight[8:12], theirs.bbox_pred.weight[4:8])


def test_a_teacher_with_unused_outputs_gives_its_rows_by_name():
    name = "fcos:resnet10t,channels=8-8-16-16,neck=32,levels=3-4,convs=1"
    student, wide = build_detector(name, ("cat", "dog")), build_detector(name, ("x", "cat", "y", "dog"))
    wide.spec = type(wide.spec)(**{**vars(wide.spec), "classes": ("cat", "dog")})
    wide.columns = wide.columns[[1, 3]]
    report = inherit_head(student, wide)
    mine, theirs = (d.model.head.classification_head.cls_logits.weight for d in (student, wide))
    assert all("cls_logits" not in name for name, _ in report.skipped)
    torch.testing.assert_close(mine[1:], theirs[[2, 4]])
