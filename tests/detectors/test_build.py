import copy

import pytest
import torch
import torchvision
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn

from detdistill.detectors.adapters import read_model
from detdistill.detectors.build import build_detector
from detdistill.detectors.dense.fcos import FCOSDetector
from detdistill.detectors.dense.retinanet import RetinaNetDetector, RetinaNetOptions
from detdistill.detectors.dense.shared.heads import DenseOptions
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import ModelError
from tests.detectors.dense.shared import library_images, library_targets, unequal_batch


def test_every_option_is_read():
    text = (
        "retinanet:resnet10t, neck=64,levels=3-5,width=0.5,channels=1-2-3-4,stem=8,convs=0,pretrained=true,norm=frozen,"
        "score=0.1,topk=9,dets=7,anchors=1.5"
    )
    model, options = read_model(text)
    assert (model.text, model.detector, model.backbone) == (text, "retinanet", "resnet10t")
    assert options == RetinaNetOptions(
        neck=64,
        levels=(3, 5),
        width=0.5,
        channels=(1, 2, 3, 4),
        stem=8,
        convs=0,
        pretrained=True,
        norm="frozen",
        score=0.1,
        topk=9,
        dets=7,
        anchors=1.5,
        name=text,
    )
    assert read_model("fcos:resnet18")[1] == DenseOptions(name="fcos:resnet18")
    assert read_model("torchvision:fcos_resnet50_fpn,weights=COCO_V1")[1].weights == "COCO_V1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "expected detector:backbone"),
        ("fcos:", "expected detector:backbone"),
        ("fcos:resnet18,nek=64", r"^fcos has no option 'nek' \(did you mean 'neck'\?\); it has: levels, neck, width, "),
        ("fcos:resnet18,neck", "option neck needs a value"),
        ("fcos:resnet18,neck=64,neck=32", "given twice"),
        ("fcos:resnet18,neck=wide", "^model 'fcos:resnet18,neck=wide': neck='wide' is not a whole number, 1 or more$"),
        ("fcos:resnet18,neck=-1", "neck='-1' is not a whole number, 1 or more"),
        ("fcos:resnet18,levels=5-3", "levels='5-3' is not a range, each end a whole number from 1 to 11$"),
        ("fcos:resnet18,levels=3-12", "levels='3-12' is not a range"),
        ("fcos:resnet18,levels=0-3", "levels='0-3' is not a range"),
        ("fcos:resnet18,levels=3", "levels='3' is not a range, .*; its parts have '-' between them$"),
        ("fcos:resnet18,width=nan", "width='nan' is not a number above 0"),
        ("fcos:resnet18,width=0", "width='0' is not a number above 0"),
        ("fcos:resnet18,channels=8-0", "channels='8-0' is not a list, each a whole number, 1 or more, or none"),
        ("fcos:resnet18,score=2", "score='2' is not a number from 0 to 1"),
        ("fcos:resnet18,pretrained=maybe", "pretrained=maybe: there is no such file"),
        ("fcos:resnet18,norm=gn", "norm='gn' is not one of bn, frozen"),
        ("fcos:resnet18,convs=-2", "convs='-2' is not a whole number, 0 or more"),
        ("fcso:resnet18", r"unknown detector 'fcso' \(did you mean 'fcos'\?\)"),
        ("fcso:resnet18,neck", "option neck needs a value"),
        ("load_student:resnet18", "unknown detector 'load_student'"),
        ("fcos:resnet18,weights=COCO_V1", "fcos has no option 'weights'"),
        ("rf_detr:dinov2,dim=3", "rf_detr has no option 'dim'; it has: none"),
        ("torchvision:fcos_resnet50", r"no detector 'fcos_resnet50' \(did you mean 'fcos_resnet50_fpn'\?\)"),
        ("torchvision:fcos_resnet50_fpn,neck=64", "^torchvision has no option 'neck'; it has: weights$"),
        ("torchvision:fcos_resnet50_fpn,weights=COCO", r"no weights 'COCO' \(did you mean 'COCO_V1'\?\)"),
    ],
)
def test_mistakes_in_model_strings_are_named(text, message):
    with pytest.raises(ModelError, match=message):
        build_detector(text, ["a"])


@pytest.mark.parametrize("classes", [None, ["a"]])
def test_mistakes_in_names_to_load_are_named(classes):
    with pytest.raises(ModelError, match=r"fcos has no option 'nek' \(did you mean 'neck'\?\)"):
        load_detector("fcos:resnet18,nek=64", classes)
    with pytest.raises(ModelError, match="unknown detector 'fcso'"):
        load_detector("fcso:resnet18", classes)


def test_no_classes():
    with pytest.raises(ModelError, match="no classes given"):
        build_detector("fcos:resnet10t", [])
    with pytest.raises(ModelError, match="no classes of its own"):
        load_detector("torchvision:fcos_resnet50_fpn")


def test_values_reach_the_model():
    detector = build_detector("retinanet:resnet10t,width=0.25,neck=32,score=0.2,topk=50,dets=11,convs=1", ["a", "b"])
    assert (detector.model.score_thresh, detector.model.topk_candidates, detector.model.detections_per_img) == (0.2, 50, 11)
    assert detector.spec.name == "retinanet:resnet10t,width=0.25,neck=32,score=0.2,topk=50,dets=11,convs=1"
    assert detector.spec.strides == (8, 16, 32, 64, 128)
    assert detector.model.anchor_generator.sizes[0] == (32, 40, 50)
    again = build_detector("fcos:resnet10t,width=0.25,neck=32", ["a"])
    assert (again.model.score_thresh, again.model.nms_thresh, again.model.detections_per_img) == (0.05, 0.6, 100)


def test_pretrained_without_network_is_one_line(monkeypatch):
    import timm

    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host\nmore")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("detdistill.detectors.torchvision.pretrained.hub_answers", lambda: True)
    with pytest.raises(
        ModelError, match=r"backbone resnet10t: no pretrained weights: no route to host; leave out pretrained=true$"
    ):
        build_detector("fcos:resnet10t,neck=32,pretrained=true", ["a"])


def test_a_model_of_torchvision_by_name():
    detector = build_detector("torchvision:retinanet_resnet50_fpn_v2", ["a", "b"])
    assert isinstance(detector, RetinaNetDetector)
    assert detector.spec.strides == (8, 16, 32, 64, 128)
    assert detector.spec.channels == (256,) * 5
    assert detector.model.head.classification_head.num_classes == 3
    assert detector.model.head.regression_head._loss_type == "giou"
    assert all(parameter.requires_grad for parameter in detector.parameters())
    batch = unequal_batch()
    prediction = detector.eval()(batch).prediction
    assert torch.equal(prediction.logits, detector.model.head(list(detector.features(batch).maps))["cls_logits"][..., 1:])
    assert detector.backbone_features(batch).channels == (512, 1024, 2048)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub folder that holds FCOS's COCO weights (random ones under their name), so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("hub")
    weights = FCOS_ResNet50_FPN_Weights.COCO_V1
    torch.manual_seed(0)
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    state["head.classification_head.cls_logits.weight"].normal_(std=0.05)
    (folder / "checkpoints").mkdir()
    torch.save(state, folder / "checkpoints" / weights.url.rsplit("/", 1)[-1])
    return folder


def test_pretrained_weights_know_their_classes(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(hub.parent))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    detector = load_detector("torchvision:fcos_resnet50_fpn,weights=COCO_V1")
    assert isinstance(detector, FCOSDetector)
    assert len(detector.spec.classes) == 80
    assert (detector.spec.classes[0], detector.spec.classes[-1]) == ("person", "toothbrush")
    assert not {"N/A", "__background__"} & set(detector.spec.classes)
    assert detector.columns[[0, 10, 11, 79]].tolist() == [1, 11, 13, 90]  # COCO's numbers leave out 12
    batch, losses = unequal_batch(), []
    with torch.no_grad():
        prediction = detector.eval()(batch).prediction
        mine = detector.detect(prediction, batch)[0]
        theirs = detector.model(library_images(batch))[0]
    categories = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    names = [categories[label] for label in theirs["labels"]]
    kept = torch.tensor([name not in ("N/A", "__background__") for name in names])
    assert len(mine) > 5
    assert [detector.spec.classes[label] for label in mine.labels] == [n for n, keep in zip(names, kept, strict=True) if keep]
    assert torch.equal(mine.scores, theirs["scores"][kept])

    original = fcos_resnet50_fpn(weights=FCOS_ResNet50_FPN_Weights.COCO_V1, _skip_resize=True)
    pairs = zip(original.backbone.modules(), detector.model.backbone.modules(), strict=True)
    assert all(isinstance(module, type(other)) for other, module in pairs)  # some are subclasses, for maps of one cell
    for one in (original, copy.deepcopy(detector.model)):
        one.train()
        losses.append(one(library_images(batch), library_targets(batch)))
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-6, atol=1e-6)

    folder = save_student(detector, tmp_path / "student")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "nothing"))  # loading asks for no weights
    again = load_detector(folder)
    assert again.columns.tolist() == detector.columns.tolist()
    with torch.no_grad():
        found = again.eval().detect(again(batch).prediction, batch)[0]
    assert torch.equal(found.boxes_xyxy, mine.boxes_xyxy)
    assert torch.equal(found.labels, mine.labels)


def test_pretrained_weights_with_other_classes_keep_all_but_the_outputs(hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    some = build_detector("torchvision:fcos_resnet50_fpn,weights=COCO_V1", ["dog", "person"])
    assert some.columns.tolist() == [18, 1]
    other = build_detector("torchvision:fcos_resnet50_fpn,weights=COCO_V1", ["cell", "platelet"])
    assert other.model.head.classification_head.num_classes == 3
    state, source = other.model.state_dict(), some.model.state_dict()
    differing = [key for key in state if state[key].shape != source[key].shape]
    assert differing == ["head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"]
    assert all(torch.equal(state[key], source[key]) for key in state if key not in differing)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(ModelError, match=r"weights cannot be downloaded \(<urlopen error no route to host>\); put fcos_resnet50"):
        build_detector("torchvision:fcos_resnet50_fpn,weights=COCO_V1", ["a"])


@pytest.mark.parametrize(("name", "eps"), [("retinanet_resnet50_fpn", 0.0), ("fasterrcnn_resnet50_fpn_v2", None)])
def test_constant_norms_are_rebuilt_as_the_weights_want_them(name, eps, monkeypatch):
    """The weights' state dict (here random) goes to the same names, shapes and epsilons as in torchvision's own model."""
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    plain = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91).state_dict()
    state = {key: value for key, value in plain.items() if eps is None or not key.endswith("num_batches_tracked")}
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *arguments, **options: dict(state))
    detector = load_detector(f"torchvision:{name},weights=COCO_V1")
    original = torchvision.models.get_model(name, weights=weights)
    assert detector.model.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in detector.model.state_dict().items())
    epsilons = {getattr(module, "eps", None) for module in detector.model.backbone.body.modules()} - {None}
    assert epsilons == {getattr(module, "eps", None) for module in original.backbone.body.modules()} - {None}
    assert (eps in epsilons) == (eps is not None)
