"""Checkpoints of MMDetection: results equal mmdet 3.3.0's (golden files), and what files say and do not say.

The golden files were made by ``benchmarks/mmdet_parity.py``; weights are a formula of their number and shape, so that the
files hold results only.
"""

import sys
from pathlib import Path

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.mmdet.shared.config import UNREADABLE, Section, parse_config
from detdistill.detectors.save import save_student
from detdistill.detectors.student_files import load_student
from detdistill.errors import ClassCountError, DetdistillWarning, ModelError
from detdistill.export.probe import probe_export
from tests.detectors.dense.shared import unequal_batch
from tests.detectors.mmdet.checkpoints import PARITY, checkpoint, weights
from tests.golden import Golden


def small(name="mmdet_gfl"):
    """A golden file, for tests that need a checkpoint of any kind."""
    return Golden(name)


def compare(golden, folder, kind):
    path = checkpoint(golden, folder / "model.pth")
    detector, ours = PARITY["run_ours"](f"mmdet:{path}", golden.meta["image_hw"], golden.arrays)
    assert type(detector).__name__ == kind
    assert set(ours) == set(golden.arrays)
    mine, yours = PARITY["paired"](ours, {name: golden[name] for name in PARITY["RESULTS"]})
    assert len(mine) == len(yours) == len(ours["scores"]) == len(golden["scores"]) >= 50
    found = {name: ours[name][mine] for name in PARITY["RESULTS"]}
    for name in golden.arrays:
        # a second stage pools at its own proposals, and a pixel of them is many times the size of a step of the weights
        tolerance = 5e-5 if name in found and detector.spec.family == "regions" else 1e-5
        one, other = (found[name], golden[name][yours]) if name in found else (PARITY["sampled"](ours[name]), golden[name])
        assert PARITY["difference"](one.float(), other.float()) < tolerance, name
    return detector


# ------------------------------------------------------------------------------------------------- the same results as mmdet


def test_gfl_equals_the_golden_file(tmp_path):
    detector = compare(Golden("mmdet_gfl"), tmp_path, "GFLDetector")
    assert detector.model.reg_max == 4


def test_atss_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_atss"), tmp_path, "ATSSDetector")


def test_retinanet_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_retinanet"), tmp_path, "RetinaNetDetector")


def test_retinanet_on_caffes_backbone_equals_the_golden_file(tmp_path):
    detector = compare(Golden("mmdet_retinanet_caffe"), tmp_path, "RetinaNetDetector")
    assert detector.description["backbone"]["caffe"] is True
    assert detector.spec.std == (1 / 255,) * 3
    assert [round(255 * value, 3) for value in detector.spec.mean] == [123.675, 116.28, 103.53]


def test_fcos_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_fcos_caffe"), tmp_path, "FCOSScalesDetector")


def test_the_later_fcos_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_fcos_caffe_later"), tmp_path, "FCOSScalesDetector")


def test_reppoints_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_reppoints"), tmp_path, "RepPointsDetector")


def test_reppoints_with_group_norm_equals_the_golden_file(tmp_path):
    detector = compare(Golden("mmdet_reppoints_gn"), tmp_path, "RepPointsDetector")
    assert detector.description["backbone"]["neck_norm"] == "gn"


def test_faster_rcnn_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_faster_rcnn"), tmp_path, "FasterRCNNDetector")


def test_mask_rcnn_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_mask_rcnn"), tmp_path, "MaskRCNNDetector")


def test_cascade_rcnn_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_cascade_rcnn"), tmp_path, "CascadeRCNNDetector")


def test_cascade_mask_rcnn_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_cascade_mask_rcnn"), tmp_path, "CascadeMaskRCNNDetector")


def test_deformable_detr_equals_the_golden_file(tmp_path):
    detector = compare(Golden("mmdet_deformable_detr"), tmp_path, "DeformableDetrDetector")
    assert (detector.config.with_box_refine, detector.config.two_stage) == (False, False)


def test_deformable_detr_with_refinement_equals_the_golden_file(tmp_path):
    detector = compare(Golden("mmdet_deformable_detr_refine"), tmp_path, "DeformableDetrDetector")
    assert (detector.config.with_box_refine, detector.config.two_stage) == (True, False)


def test_deformable_detr_in_two_stages_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_deformable_detr_two_stage"), tmp_path, "DeformableDetrDetector")


def test_conditional_detr_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_conditional_detr"), tmp_path, "ConditionalDetrDetector")


def test_dab_detr_equals_the_golden_file(tmp_path):
    compare(Golden("mmdet_dab_detr"), tmp_path, "DabDetrDetector")


# -------------------------------------------------------------------------------------------------------- ordinary detectors

KINDS = ("gfl", "retinanet_caffe", "fcos_caffe", "reppoints_gn", "mask_rcnn", "cascade_rcnn")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_student_detects_the_same_with_and_without_this_package(kind, tmp_path):
    path = checkpoint(small(f"mmdet_{kind}"), tmp_path / "model.pth")
    detector = load_detector(f"mmdet:{path}").eval()
    batch = unequal_batch()
    folder = save_student(detector, tmp_path / "student")
    again = load_detector(folder).eval()
    with torch.no_grad():
        wanted, found = (one.detect(one(batch).prediction, batch) for one in (detector, again))
        alone = load_student.load(folder, resize=False)
        plain = alone([image[:, :height, :width] for image, (height, width) in zip(batch.images, batch.sizes, strict=True)])
    for one, other, dictionary in zip(wanted, found, plain, strict=True):
        assert len(one) > 0
        assert torch.equal(one.boxes_xyxy, other.boxes_xyxy)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)
        assert set(dictionary) >= {"boxes", "scores", "labels"}
    assert alone.classes[-3:] == ["class 0", "class 1", "class 2"]
    names = [alone.classes[label] for label in plain[0]["labels"]]
    assert names[:5] == [again.spec.classes[label] for label in wanted[0].labels][:5]


def test_a_detr_is_saved_with_its_selection(tmp_path):
    path = checkpoint(small("mmdet_dab_detr"), tmp_path / "model.pth")
    detector = load_detector(f"mmdet:{path},score=0.4").eval()
    assert detector.spec.name.startswith("dab_detr:resnet18,dim=32,encoder=2,decoder=2,ffn=48,heads=4,queries=30")
    again = load_detector(save_student(detector, tmp_path / "student")).eval()
    assert (again.score, again.dets) == (0.4, 60)
    batch = unequal_batch()
    with torch.no_grad():
        wanted, found = (one.detect(one(batch).prediction, batch)[0] for one in (detector, again))
    assert torch.equal(wanted.boxes_xyxy, found.boxes_xyxy)
    assert float(found.scores.min()) >= 0.4


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "deformable_detr"])
def test_a_loaded_detector_trains(kind, tmp_path):
    path = checkpoint(small(f"mmdet_{kind}"), tmp_path / "model.pth")
    detector = load_detector(f"mmdet:{path},norm=bn").train()
    torch.manual_seed(0)
    batch = unequal_batch()
    losses = detector.loss(detector(batch).prediction, batch)
    losses.total().backward()
    assert torch.isfinite(losses.total())
    first = next(parameter for name, parameter in detector.named_parameters() if name.endswith("conv1.weight"))
    assert float(first.grad.abs().sum()) > 0


def test_batchnorm_is_constant_unless_the_file_or_an_option_says_otherwise(tmp_path):
    golden = small()
    path = checkpoint(golden, tmp_path / "model.pth")
    evaluating = checkpoint(
        golden, tmp_path / "eval.pth", cfg=golden.meta["config"].replace("depth=18", "depth=18, norm_eval=False")
    )
    norms = [load_detector(name).description["backbone"]["norm"] for name in (f"mmdet:{path}", f"mmdet:{evaluating}")]
    assert [*norms, load_detector(f"mmdet:{path},norm=bn").description["backbone"]["norm"]] == ["frozen", "bn", "bn"]


# ------------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("kind", ["retinanet", "deformable_detr"])
def test_wanted_classes_are_picked_by_name(kind, tmp_path):
    path = checkpoint(small(f"mmdet_{kind}"), tmp_path / "model.pth")
    whole, part = load_detector(f"mmdet:{path}").eval(), load_detector(f"mmdet:{path}", ["class 2", "class 0"]).eval()
    batch = unequal_batch()
    with torch.no_grad():
        logits, picked = (one(batch).prediction.logits for one in (whole, part))
    assert part.spec.classes == ("class 2", "class 0")
    torch.testing.assert_close(picked, logits[..., [2, 0]], rtol=1e-5, atol=1e-5)


def test_other_classes_of_two_stages_count_as_background(tmp_path):
    path = checkpoint(small("mmdet_faster_rcnn"), tmp_path / "model.pth")
    whole, part = load_detector(f"mmdet:{path}").eval(), load_detector(f"mmdet:{path}", ["class 2", "class 0"]).eval()
    batch = unequal_batch()
    with torch.no_grad():
        scores, picked = (one(batch).prediction.logits.softmax(dim=-1) for one in (whole, part))
    torch.testing.assert_close(picked[:, :2], scores[:, [2, 0]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(picked[:, 2], scores[:, 1] + scores[:, 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gfl", "mask_rcnn", "deformable_detr"])
def test_new_classes_get_new_outputs_and_keep_the_rest(kind, tmp_path):
    golden = small(f"mmdet_{kind}")
    path = checkpoint(golden, tmp_path / "model.pth")
    with pytest.raises(ClassCountError, match=r"has 3 classes \(class 0, class 1, class 2\), but not kite"):
        load_detector(f"mmdet:{path}", ["class 0", "kite"])
    whole, other = load_detector(f"mmdet:{path}"), build_detector(f"mmdet:{path}", ["class 0", "kite"])
    assert other.spec.classes == ("class 0", "kite")
    mine, theirs = other.state_dict(), whole.state_dict()
    kept = [name for name in mine if mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name])]
    changed = set(mine) - set(kept)
    assert changed
    assert all(any(part in name for part in ("cls", "class_embed", "bbox_pred", "mask_fcn")) for name in changed), changed


def test_a_file_without_names_takes_those_that_are_wanted_or_given(tmp_path):
    golden = small()
    path = checkpoint(golden, tmp_path / "model.pth", dataset_meta=None)
    assert load_detector(f"mmdet:{path}", ["a", "b", "c"]).spec.classes == ("a", "b", "c")
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    assert load_detector(f"mmdet:{path},names={names}").spec.classes == ("x", "y", "z")
    with pytest.raises(ModelError, match=r"has 3 classes but not their names; add names=FILE"):
        load_detector(f"mmdet:{path}")
    names.write_text("x\ny\n")
    with pytest.raises(ModelError, match=r"has outputs of 3 classes, but .*names.txt names 2"):
        load_detector(f"mmdet:{path},names={names}")


def test_names_as_version_2_writes_them(tmp_path):
    golden = small()
    path = checkpoint(
        golden, tmp_path / "model.pth", cfg=None, config=golden.meta["config"], dataset_meta=None, CLASSES=("p", "q", "r")
    )
    assert load_detector(f"mmdet:{path}").spec.classes == ("p", "q", "r")


# ------------------------------------------------------------------------------------------------------- what a file says


def test_what_a_file_without_configuration_lacks_is_asked_for_by_name(tmp_path):
    golden = small()
    path = checkpoint(golden, tmp_path / "model.pth", cfg=None)
    with pytest.raises(ModelError, match=r"add detector=gfl"):
        load_detector(f"mmdet:{path}")
    with pytest.raises(ModelError, match=r"add style=pytorch .* or style=caffe"):
        load_detector(f"mmdet:{path},detector=gfl")
    detector = load_detector(f"mmdet:{path},detector=gfl,style=pytorch")
    said = load_detector(f"mmdet:{checkpoint(golden, tmp_path / 'said.pth')}")
    assert detector.description == said.description


def test_options_go_before_the_file(tmp_path):
    path = checkpoint(small("mmdet_retinanet_caffe"), tmp_path / "model.pth")
    detector = load_detector(f"mmdet:{path},style=pytorch,mean=1-2-3,std=10-20-30,bgr=false,score=0.2,dets=7")
    assert "caffe" not in detector.description["backbone"]
    assert detector.spec.mean == (1 / 255, 2 / 255, 3 / 255)
    assert (detector.model.score_thresh, detector.model.detections_per_img) == (0.2, 7)
    turned = load_detector(f"mmdet:{path}").model.backbone.body.conv1.weight
    assert torch.equal(detector.model.backbone.body.conv1.weight, turned.flip(1))


def test_pixels_as_version_2_says_them(tmp_path):
    golden = small()
    config = golden.meta["config"].replace("data_preprocessor=", "ignored=")
    config += "\nimg_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
    detector = load_detector(f"mmdet:{checkpoint(golden, tmp_path / 'model.pth', cfg=config)}")
    assert [round(255 * value, 4) for value in detector.spec.mean] == [122.7717, 115.9465, 102.9801]


def test_a_configuration_is_parsed_and_never_run(tmp_path):
    text = f"""
home = __import__('pathlib').Path({str(tmp_path / "ran")!r}).write_text('x')
_base_ = ['other.py']
strides = [8, -16]
model = dict(type='GFL', head=dict(strides=strides, size=home, path=open('x')), test=(1, None, True), **more)
model['type'] = 'Other'
"""
    found = parse_config(f"/a path/that is no Python.py\n{text}")
    assert found["model"] == {
        "type": "GFL",
        "head": {"strides": [8, -16], "size": UNREADABLE, "path": UNREADABLE},
        "test": (1, None, True),
    }
    assert not (tmp_path / "ran").exists()
    assert parse_config("no Python at all (") == {}
    section = Section(found).at("model", "head")
    assert (section.place, section.get("size", 3), section.get("strides")) == ("model.head", 3, [8, -16])


def test_nothing_in_a_file_is_imported_or_run(tmp_path, monkeypatch):
    """The file names a class of a module that notes when it is imported, and a function that would write a file."""
    (tmp_path / "marker_of_a_checkpoint.py").write_text("class HistoryBuffer:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import marker_of_a_checkpoint as marker

    class Writing:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "ran", "x")

    golden = small()
    meta = {"cfg": golden.meta["config"], "dataset_meta": {"classes": golden.meta["classes"]}}
    state = weights(golden)
    content = {"meta": meta, "state_dict": state, "message_hub": [marker.HistoryBuffer(), Writing()]}
    torch.save(content, tmp_path / "model.pth")
    del sys.modules["marker_of_a_checkpoint"]
    (tmp_path / "ran").unlink(missing_ok=True)
    assert len(load_detector(f"mmdet:{tmp_path / 'model.pth'}").spec.classes) == 3
    assert "marker_of_a_checkpoint" not in sys.modules
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------------ bad input


def broken(golden, folder, change, **meta):
    """A checkpoint whose state dict was changed."""
    path = checkpoint(golden, folder / "model.pth", **meta)
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    return f"mmdet:{path}"


def test_a_file_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="there is no such file"):
        load_detector(f"mmdet:{tmp_path / 'none.pth'}")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ModelError, match="cannot be read as a checkpoint of torch"):
        load_detector(f"mmdet:{tmp_path / 'text.pth'}")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds no state dict of tensors"):
        load_detector(f"mmdet:{tmp_path / 'list.pth'}")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(ModelError, match=r"none of its names begins with backbone\. \(it has conv1\.weight"):
        load_detector(f"mmdet:{tmp_path / 'plain.pth'}")


def test_a_checkpoint_that_matches_few_names_says_how_many(tmp_path):
    golden = small()

    def drop(state):
        for name in [name for name in state if name.startswith("bbox_head.reg_convs")]:
            del state[name]

    with pytest.raises(
        ModelError, match=r"fits \d+ of \d+ tensors of gfl \(head\.regression_head\.conv\.0\.0\.weight is missing\)"
    ):
        load_detector(broken(golden, tmp_path, drop))

    def add(state):
        state["bbox_head.extra.weight"] = torch.zeros(1)

    count = len(golden.meta["names"])
    with pytest.raises(ModelError, match=r"of its \d+ tensors have a place in gfl; the first that has none is bbox_head\.extra"):
        load_detector(broken(golden, tmp_path, add))
    assert count > 100

    def widen(state):
        state["bbox_head.gfl_reg.bias"] = torch.zeros(5)

    with pytest.raises(ModelError, match=r"bbox_reg\.bias is \[5\], not \[20\]"):
        load_detector(broken(golden, tmp_path, widen))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("type='GFLHead'", "type='VFNetHead'", r"holds a GFL with VFNetHead, which cannot be loaded; known: gfl, atss"),
        ("type='ResNet'", "type='SwinTransformer'", "its backbone is SwinTransformer; ResNet and ResNeXt can be loaded"),
        ("octave_base_scale=8", "octave_base_scale=4", r"anchor_generator\.octave_base_scale is 4; only 8 can be loaded"),
        ("type='FPN'", "type='PAFPN'", "its neck is PAFPN; FPN can be loaded"),
        ("add_extra_convs='on_output'", "add_extra_convs='on_lateral'", "its FPN adds levels on_lateral"),
    ],
)
def test_an_architecture_that_cannot_be_loaded_is_named(before, after, message, tmp_path):
    golden = small()
    assert before in golden.meta["config"]
    path = checkpoint(golden, tmp_path / "model.pth", cfg=golden.meta["config"].replace(before, after))
    with pytest.raises(ModelError, match=message):
        load_detector(f"mmdet:{path}")


def test_more_that_cannot_be_loaded(tmp_path):
    golden = small()

    def deformable(state):
        state["backbone.layer2.0.conv2_offset.weight"] = torch.zeros(1)

    with pytest.raises(ModelError, match="deformable convolutions"):
        load_detector(broken(golden, tmp_path, deformable))
    path = checkpoint(golden, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"its configuration says gfl, not detector=atss"):
        load_detector(f"mmdet:{path},detector=atss")
    with pytest.raises(ModelError, match=r"mean=\[1\.0\] of its pixels are no three numbers"):
        load_detector(f"mmdet:{path},mean=1")
    with pytest.raises(ModelError, match=r"has outputs of 3 classes, but it names 2 different ones"):
        load_detector(f"mmdet:{checkpoint(golden, tmp_path / 'two.pth', dataset_meta={'classes': ['a', 'b']})}")


def test_another_selection_than_nms_is_said(tmp_path):
    golden = small()
    config = golden.meta["config"].replace("type='nms'", "type='soft_nms'")
    with pytest.warns(DetdistillWarning, match="selects detections by soft_nms; here by NMS"):
        load_detector(f"mmdet:{checkpoint(golden, tmp_path / 'model.pth', cfg=config)}")


@pytest.mark.parametrize("kind", ["retinanet", "cascade_rcnn"])
def test_a_loaded_detector_is_exported(kind, tmp_path):
    """``probe_export`` compares the ONNX file with the detector on other images; their numbers of regions differ."""
    pytest.importorskip("onnxruntime")
    detector = load_detector(f"mmdet:{checkpoint(small(f'mmdet_{kind}'), tmp_path / 'model.pth')}").eval()
    expected = {"retinanet": "any number and size of images", "cascade_rcnn": "one image, fixed size"}
    assert probe_export(detector) == expected[kind]
