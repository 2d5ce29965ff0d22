"""Detectors that are told by text what to find: tiny random models of transformers, against the library's own decoding."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

from detdistill.detectors.open_vocabulary import is_open_vocabulary, load_open_vocabulary, prompt_of  # noqa: E402
from detdistill.errors import ModelError  # noqa: E402

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "helmet", "person", "safety")


def grounding_dino(folder):
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(**swin, out_features=["stage2", "stage3", "stage4"]),
        text_config=transformers.BertConfig(vocab_size=len(WORDS), **text).to_dict(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
    )
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor = transformers.GroundingDinoProcessor(images, transformers.BertTokenizer(str(folder / "vocab.txt")))
    return save(transformers.GroundingDinoForObjectDetection(config), processor, folder / "grounding")


def owlv2(folder):
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: index for index, token in enumerate([*letters, *(f"{one}</w>" for one in letters)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Owlv2Config(
        text_config={
            **common,
            "vocab_size": len(vocab),
            "max_position_embeddings": 32,
            "bos_token_id": 52,
            "eos_token_id": 53,
            "pad_token_id": 0,
        },
        vision_config={**common, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    processor = transformers.Owlv2Processor(transformers.Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    return save(transformers.Owlv2ForObjectDetection(config), processor, folder / "owl")


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def grounding(folder):
    return load_open_vocabulary(grounding_dino(folder))


@pytest.fixture(scope="module")
def owl(folder):
    return load_open_vocabulary(owlv2(folder))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))


def in_order(boxes):
    return boxes[np.lexsort(boxes.T)]


def test_boxes_of_grounding_dino_equal_the_librarys(grounding, image):
    found = grounding.detect(image, ["safety helmet", "person"], nms=1.0)
    inputs = grounding.processor(images=image, text="safety helmet. person.", return_tensors="pt")
    with torch.no_grad():
        outputs = grounding.model(**inputs)
    (theirs,) = grounding.processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=0.0, target_sizes=[(48, 80)]
    )
    assert len(found) == 12
    np.testing.assert_allclose(in_order(found.boxes_xyxy.numpy()), in_order(theirs["boxes"].numpy()), atol=1e-4)
    # Tokens: start, safety, helmet, full stop, person, full stop, end.
    tokens = outputs.logits[0].sigmoid()
    expected = torch.stack([tokens[:, 1:3].mean(dim=1), tokens[:, 4]], dim=1)
    assert found.scores.tolist() == pytest.approx(sorted(expected.amax(dim=1).tolist(), reverse=True))
    assert sorted(found.labels.tolist()) == sorted(expected.argmax(dim=1).tolist())


def test_boxes_and_scores_of_owlv2_equal_the_librarys(owl, image):
    found = owl.detect(image, ["helmet", "person"], nms=1.0)
    inputs = owl.processor(images=image, text=[["a photo of a helmet", "a photo of a person"]], return_tensors="pt")
    with torch.no_grad():
        outputs = owl.model(**inputs)
    (theirs,) = owl.processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=[(48, 80)])
    boxes = theirs["boxes"].clone()
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, 80), boxes[:, 1::2].clamp(0, 48)  # ours are clipped to the image
    sized = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    assert len(found) == int(sized.sum())
    np.testing.assert_allclose(in_order(found.boxes_xyxy.numpy()), in_order(boxes[sized].numpy()), atol=1e-3)
    assert found.scores.tolist() == pytest.approx(sorted(theirs["scores"][sized].tolist(), reverse=True), abs=1e-6)


def test_low_scores_and_twins_are_left_out_and_boxes_clipped(grounding, image, monkeypatch):
    scores = torch.tensor([[0.2, 0.9], [0.1, 0.8], [0.7, 0.6], [0.1, 0.2]])
    boxes = torch.tensor([[20.0, 20, 20, 20], [21, 20, 20, 20], [20, 20, 20, 20], [75, 40, 20, 20]])  # centre and size
    monkeypatch.setattr(grounding, "_by_token", lambda image, classes: (scores, boxes))
    found = grounding.detect(image, ["helmet", "person"], least=0.2)
    assert found.scores.tolist() == pytest.approx(
        [0.9, 0.7, 0.2]
    )  # the second is a twin of the first, the third of another class
    assert found.labels.tolist() == [1, 0, 1]
    assert found.boxes_xyxy[2].tolist() == [65, 30, 80, 48]
    assert len(grounding.detect(image, ["helmet", "person"], least=0.3, nms=1.0)) == 3


@pytest.mark.parametrize("name", ["...", "", "helmet. person"])
def test_classes_that_are_no_words(name):
    with pytest.raises(ModelError, match="write it in words, without a full stop"):
        prompt_of([name])


def test_too_many_classes(grounding, image):
    with pytest.raises(ModelError, match=r"200 classes take 402 tokens, but it reads 256; give fewer"):
        grounding.detect(image, ["person"] * 200)


def test_other_models_and_names_without_network(folder, monkeypatch):
    config = {"model_type": "detr"}
    (folder / "detr").mkdir()
    (folder / "detr" / "config.json").write_text(json.dumps(config))
    assert not is_open_vocabulary(str(folder / "detr"))
    with pytest.raises(ModelError, match="a detr takes no class names; models that do: grounding-dino, mm-grounding-dino, owl"):
        load_open_vocabulary(str(folder / "detr"))
    monkeypatch.setattr("detdistill.detectors.queries.shared.transformers_files.hub_answers", lambda: False)
    with pytest.raises(ModelError, match="not a folder, and the hub cannot be reached"):
        load_open_vocabulary("nobody/no-such-model")
