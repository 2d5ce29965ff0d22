import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, DetrConfig, DetrForObjectDetection, ResNetConfig

from detdistill.detectors.adapters import adapters_with, read_model
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.probe import tiny_name
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.torchvision.options import BackboneOptions
from detdistill.errors import ClassCountError, DetdistillWarning, ModelError
from tests.detectors.dense.shared import unequal_batch
from tests.detectors.queries.shared import SMALL, library_inputs


def library_model(names=("cat", "dog"), **changed):
    """A DETR as somebody else would have made and saved it: constant norms, no auxiliary loss."""
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_queries=7,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        **{**models.label_maps(names), **changed},
    )
    model = DetrForObjectDetection(config).eval()
    generator = torch.Generator().manual_seed(1)
    model.class_labels_classifier.weight.data = torch.randn(len(names) + 1, 32, generator=generator)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "somebody's detr"
    library_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_saved_folder_keeps_its_function_classes_and_norms(saved):
    library = library_model()
    detector = load_detector(f"hf:{saved}").eval()
    assert detector.spec.classes == ("cat", "dog")
    assert detector.spec.name == f"hf:{saved}"
    batch = unequal_batch()
    with torch.no_grad():
        mine = detector(batch).prediction
        theirs = library(**library_inputs(detector, batch))
    assert torch.equal(mine.logits[-1], theirs.logits)
    assert torch.equal(mine.boxes_cxcywh01[-1], theirs.pred_boxes)
    assert not [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(parameter.requires_grad for parameter in detector.parameters())  # the library would freeze the backbone
    library.train()
    detector.train()
    labels = detector.labels(unequal_batch())[:1]  # all of its classes are below 2 once label 2 is gone
    labels[0]["class_labels"] = labels[0]["class_labels"].clamp(max=1)
    batch = build_batch_of_one(labels[0]["class_labels"])
    torch.manual_seed(4)
    losses = detector.loss(detector(batch).prediction, batch)
    torch.manual_seed(4)
    loss = library(**library_inputs(detector, batch), labels=labels).loss
    last = sum(value for name, value in losses.terms.items() if not name[-1].isdigit())
    torch.testing.assert_close(last, loss)  # the library trains the last layer only; the inner ones are added as in the paper
    assert "loss_ce_0" in losses.terms


def build_batch_of_one(labels):
    from dataclasses import replace

    batch = unequal_batch()
    return replace(
        batch,
        images=batch.images[:1],
        sizes=batch.sizes[:1],
        targets=(replace(batch.targets[0], labels=labels),),
        ids=(0,),
        views=batch.views[:1],
    )


def test_a_student_can_start_from_it(saved):
    detector = build_detector(f"hf:{saved},score=0.2,dets=3", ["x", "y"])
    assert detector.spec.classes == ("cat", "dog")
    assert (detector.score, detector.dets) == (0.2, 3)
    with pytest.raises(ClassCountError, match=r"has 2 classes \(cat, dog\), but 3 are wanted \(x, y, z\)"):
        build_detector(f"hf:{saved}", ["x", "y", "z"])


def test_unused_classes_are_taken_out(tmp_path):
    library = library_model(("N/A", "cat", "N/A", "dog"))
    library.save_pretrained(tmp_path / "coco")
    detector = load_detector(f"hf:{tmp_path / 'coco'}", ["a", "b"]).eval()
    assert detector.spec.classes == ("cat", "dog")
    batch = unequal_batch()
    with torch.no_grad():
        mine = detector(batch).prediction
        theirs = library(**library_inputs(detector, batch))
    torch.testing.assert_close(mine.logits[-1], theirs.logits[..., [1, 3, 4]])  # cat, dog, background
    detector.export(tmp_path)
    assert load_detector(f"hf:{tmp_path}").spec.classes == ("cat", "dog")


@pytest.mark.filterwarnings("ignore:.*no preprocessor_config.json")
def test_normalisation_is_read(folder):
    assert load_detector(f"hf:{folder}").spec.mean == (0.485, 0.456, 0.406)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}))
    assert load_detector(f"hf:{folder}").spec.mean == (0.1, 0.2, 0.3)
    assert load_detector(f"hf:{folder}").spec.std == (1, 1, 2)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}))
    assert load_detector(f"hf:{folder}").spec.mean == (0, 0, 0)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config.json: cannot be read as JSON"):
        load_detector(f"hf:{folder}")


SHORT = "resnet10t,channels=16-16-16-16,stem=8,dim=32,queries=10,encoder=1,heads=2,ffn=32"


@pytest.mark.parametrize(
    ("family", "expected"),
    [("detr", (0.485, 0.456, 0.406)), ("rt_detr", (0.0, 0.0, 0.0)), ("rt_detr_v2", (0.0, 0.0, 0.0)), ("d_fine", (0.0, 0.0, 0.0))],
)
def test_without_a_file_of_preprocessing_the_librarys_defaults_apply(family, expected, tmp_path):
    """transformers' own processors: DETR's normalises, RT-DETR's does not."""
    build_detector(f"{family}:{SHORT},decoder=2", ("a", "b")).export(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(DetdistillWarning, match=r"no preprocessor_config.json; assumed the defaults of \w*ImageProcessor, which"):
        detector = load_detector(f"hf:{tmp_path}")
    assert detector.spec.mean == expected


def test_half_precision_is_loaded_as_float32(folder):
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    detector = load_detector(f"hf:{folder}").eval()
    assert {tensor.dtype for tensor in detector.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert bool(torch.isfinite(detector(unequal_batch()).prediction.logits).all())


def test_softmax_classes_of_a_sigmoid_family_are_refused(tmp_path):
    build_detector(f"rt_detr:{SHORT},decoder=2", ("a", "b")).export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_focal_loss": False}))
    assert "use_focal_loss: false (softmax classes), which this adapter does not support" in message(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "family", ["detr", "conditional_detr", "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2"]
)
def test_a_single_decoder_layer_works_or_is_refused_in_one_line(family):
    tiny = re.sub(",decoder=.", "", tiny_name(family).partition(":")[2])
    try:
        detector = build_detector(f"{family}:{tiny},decoder=1", ("a", "b", "c"))
    except ModelError as error:
        expected = r"[\w-]+: decoder=1 cannot be built: transformers shares outputs .* use decoder=2 or more"
        assert re.fullmatch(expected, str(error))  # noqa: PT017
    else:
        batch = unequal_batch()
        assert bool(torch.isfinite(detector.loss(detector(batch).prediction, batch).total()))


def message(name, classes=None):
    with pytest.raises(ModelError) as caught:
        load_detector(name, classes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_messages(folder, tmp_path, monkeypatch):
    assert message(f"hf:{tmp_path}/nothing").endswith("nothing: no such folder")
    assert "no config.json in this folder" in message(f"hf:{tmp_path}")
    BertConfig().save_pretrained(tmp_path / "bert")
    assert "model_type 'bert'; detectors that can be loaded: " in message(f"hf:{tmp_path / 'bert'}")
    assert message(f"hf:{folder},width=0.5") == "hf has no option 'width'; it has: score, dets, stride"
    assert (
        message(f"hf:{folder},scor=0.5,dets=3") == "hf has no option 'scor' (did you mean 'score'?); it has: score, dets, stride"
    )
    assert message(f"hf:{folder},score=3").endswith(",score=3': score='3' is not a number from 0 to 1")
    assert message(f"hf:{folder},other").endswith(",other: no such folder")
    monkeypatch.setattr(files, "is_offline", lambda source: True)
    assert "nobody/nothing: not a folder, and the hub cannot be reached" in message("hf:nobody/nothing")

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")  # a pickle is never read
    assert "safetensors" in message(f"hf:{folder}")
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    assert str(folder) in message(f"hf:{folder}")
    shorter = {key: value for key, value in state.items() if "bbox_predictor" not in key}
    save_file(shorter, folder / "model.safetensors", metadata={"format": "pt"})
    assert "6 tensors of a DetrForObjectDetection are missing or of another shape" in message(f"hf:{folder}")
    wider = state | {"class_labels_classifier.bias": torch.zeros(9)}
    save_file(wider, folder / "model.safetensors", metadata={"format": "pt"})
    assert "class_labels_classifier.bias" in message(f"hf:{folder}")
    (folder / "config.json").write_text("{broken")
    assert str(folder) in message(f"hf:{folder}")


def test_a_missing_package_is_named():
    assert files.reason_of(ImportError("\nDetrX requires the timm library but it was not found.\nYou can")) == (
        "a package is missing: DetrX requires the timm library but it was not found."
    )
    assert files.reason_of(ModuleNotFoundError("No module named 'timm'", name="timm")) == (
        "the package timm is missing; install it"
    )


def test_model_strings():
    model, options = read_model("hf:my folder/run=3,final/student,score=0.3,dets=10")
    assert (model.detector, model.backbone) == ("hf", "my folder/run=3,final/student")
    assert (options.score, options.dets, options.name) == (0.3, 10, model.text)
    model, options = read_model("hf:my folder/score=1,width=2,dets=10")
    assert (model.backbone, options.score, options.dets) == ("my folder/score=1,width=2", 0, 10)
    assert read_model("hf:facebook/detr-resnet-50")[0].backbone == "facebook/detr-resnet-50"


def test_every_family_is_known():
    assert {"detr": "detr", "conditional_detr": "conditional_detr", "dab-detr": "dab_detr"}.items() <= adapters_with(
        "MODEL_TYPE"
    ).items()


# ------------------------------------------------------------------------------------------------------------- backbones


def config_of(backbone, strides=(32,), **options):
    return models.backbone_config(backbone, BackboneOptions(**options), strides)


def test_scaled_resnets_become_the_librarys_own():
    plain = config_of("resnet18", width=0.25)
    assert (plain.model_type, plain.hidden_sizes, plain.depths) == ("resnet", [16, 32, 64, 128], [2, 2, 2, 2])
    assert plain.embedding_size == 16
    deep = config_of("resnet18d", strides=(8, 16, 32), width=0.25)
    assert (deep.model_type, deep.embedding_size, deep.layer_type) == ("rt_detr_resnet", 16, "basic")
    assert deep.out_features == ["stage2", "stage3", "stage4"]
    wide = config_of("resnet50", width=0.5)
    assert (wide.layer_type, wide.hidden_sizes) == ("bottleneck", [128, 256, 512, 1024])
    assert config_of("resnet10t", channels=(8, 16, 32, 64), stem=8).embedding_size == 16


def test_backbones_keep_their_timm_name_otherwise():
    config = config_of("resnet10t", strides=(8, 16, 32))
    assert (config.model_type, config.backbone, config.out_indices) == ("timm_backbone", "resnet10t", [2, 3, 4])


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("vit_tiny_patch16_224", "needs timm's patch, dynamic_img_size"),
        ("resnet19", "unknown backbone 'resnet19'"),
        ("mobilenetv3_small_050", "would replace its norms and lose the activations in them"),
    ],
)
def test_backbones_that_cannot_be(backbone, expected):
    with pytest.raises(ModelError, match=expected):
        build_detector(f"detr:{backbone},dim=32,heads=2,ffn=32,encoder=1,decoder=1", ["a"])


def test_options_that_do_not_fit():
    with pytest.raises(ModelError, match=r"dim=60 must be a multiple of twice heads=4"):
        build_detector(f"detr:{SMALL.replace('dim=64', 'dim=60')}", ["a"])
    with pytest.raises(ModelError, match="detr has no option 'levels'"):
        build_detector(f"detr:{SMALL},levels=3-5", ["a"])


def test_pretrained_weights_are_copied(monkeypatch):
    import timm

    torch.manual_seed(7)
    source = timm.create_model("resnet10t", features_only=True, out_indices=(4,))
    original = timm.create_model

    def create(name, **options):
        return source if options.get("pretrained") else original(name, **options)

    monkeypatch.setattr(models.timm, "create_model", create)
    monkeypatch.setattr("detdistill.detectors.torchvision.pretrained.hub_answers", lambda: True)
    small = "resnet10t,dim=32,heads=2,ffn=32,encoder=1,decoder=1,pretrained=true"
    detector = build_detector(f"detr:{small}", ["a"]).eval()
    batch = unequal_batch()
    with torch.no_grad():
        mine = detector.backbone_features(batch).maps[0]
        theirs = source.eval()(detector.normalized(batch))[-1]
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
