"""Model cards: metadata that the hub reads, results with their interval, training, licence, citation."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from detdistill import api
from detdistill.card import Card, Origin, is_own, licence, quoted, replaced, training
from detdistill.compare import Pair as P
from detdistill.compare import over_seeds, summarize
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import revise_origin, save_student
from detdistill.files import folder_damage
from detdistill.structures import Resizing
from detdistill.training.origin import known_origin, origin_of, shortened
from tests.test_compare import make_run

MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1"
CONFIG = {"epochs": 3, "lr": 0.001, "distill_weight": 1.0, "data": "/home/me/secret/data", "out": "/home/me/runs"}
SUMMARY = {
    "role": "distilled",
    "student": MODEL,
    "teacher": "/home/me/runs/teacher",
    "teacher_model": "fcos:resnet18",
    "teacher_parameters": 12_340_000,
    "teacher_metrics": {"AP": 0.4},
    "method": "pkd+cwd,temperature=2",
    "inherit": False,
    "init": None,
    "seed": 1,
    "steps": 500,
    "images_seen": 8000,
    "stopped_early": False,
    "metrics": {"AP": 0.2512, "AP50": 0.481},
    "data": {
        "path": "/home/me/data/cells: `a`",
        "train_images": 300,
        "val_images": 64,
        "fingerprint": "t",
        "val_fingerprint": "v",
    },
}
SEEDS = {"seeds": [0, 1, 2], "AP": [0.25, 0.24, 0.26], "gain": [0.021, 0.008, 0.034], "verdict": "gain"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "student"
    return save_student(build_detector(MODEL, ("a", "b")), folder, Resizing(64, "letterbox"), origin_of(SUMMARY, CONFIG))


def test_the_hub_reads_the_metadata(saved):
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "pytorch"
    assert card.data.pipeline_tag == "object-detection"
    assert card.data.tags == ["object-detection", "detdistill", "knowledge-distillation", "fcos"]
    assert card.data.license is None
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("AP", 25.12, "data/cells: `a`")
    assert is_own(saved / "README.md")


def test_what_a_card_says(saved):
    text = (saved / "README.md").read_text()
    assert "# fcos distilled with pkd and cwd\n" in text
    assert "AP 25.1, AP50 48.1 (COCO, in points of 100) on 64 validation images, seed 1." in text
    assert "One run shows no gain" in text
    assert "- data: `data/cells: 'a'`, 300 training images\n" in text
    assert "- teacher: `runs/teacher` (`fcos:resnet18`, 12.34 M parameters, AP 40.0)\n" in text
    assert "- method: `pkd+cwd,temperature=2`\n- first weights: as the model string says, without --init\n" in text
    assert "- length: 500 steps, 8000 images seen" in text
    assert "The author of these weights writes `license:`" in text
    assert "so has the teacher, `runs/teacher`" in text
    assert text.count("```bibtex\n@") == 2
    assert "cao2022pkd" in text
    assert "shu2021cwd" in text
    assert "home" not in text + (saved / "student.json").read_text()
    assert '    0 "a"\n    1 "b"\n' in text


def test_a_card_says_what_else_shaped_the_weights():
    """A copied head is not what the model string says, and it is a use of the teacher's weights, not of its outputs only."""
    start = {"from": "runs/first", "fingerprint": "f"}
    origin = origin_of(SUMMARY | {"inherit": True}, CONFIG | {"distill_weight": 0.03, "balance": 0.3})
    text = training(origin)
    assert "- method: `pkd+cwd,temperature=2`, --distill_weight 0.03, --balance 0.3\n" in text
    copied = "neck and head copied from the teacher, as far as names and shapes agree (--inherit)"
    assert f"- first weights: as the model string says, without --init; {copied}\n" in text
    assert "- so has the teacher, `runs/teacher`, whose neck and head were copied: look" in licence(origin)
    assert f"- first weights: `runs/first`; {copied}\n" in training(origin_of(SUMMARY | {"inherit": True, "init": start}, CONFIG))


def test_results_of_several_seeds_are_added(saved, tmp_path):
    import shutil

    folder = shutil.copytree(saved, tmp_path / "student")
    before = (folder / "README.md").read_text()
    revise_origin(folder, seeds=SEEDS, teacher_ap=0.5)
    text = (folder / "README.md").read_text()
    assert "Over seeds 0, 1, 2: AP 25.0 (24.0 .. 26.0, 95 % interval)." in text
    assert "Gain over the same student trained alone, paired by seed: +2.1 (+0.8 .. +3.4, 95 % interval); gain." in text
    assert "AP 50.0)" in text
    assert "One run shows no gain" not in text
    assert text.partition("## Licence")[2] == before.partition("## Licence")[2]
    assert text.partition("## Results")[0] == before.partition("## Results")[0]
    assert folder_damage(folder) == ""
    assert known_origin(str(folder)).seeds == SEEDS
    load_detector(folder)


def test_the_interval_is_that_of_the_runs(tmp_path):
    runs = [make_run(tmp_path / f"{role}{seed}", role, seed, ap) for role, seed, ap in RUNS]
    gain = summarize("pkd", "t", "s", "AP", [P(0, 0.20, 0.23), P(1, 0.21, 0.25)])
    found = over_seeds(runs, [gain])
    half = 12.7062047 * 0.01 / 2  # t of one degree of freedom; the deviation of 0.23 and 0.25 is 0.01 * sqrt(2)
    assert found[runs[1]]["AP"] == pytest.approx([0.24, 0.24 - 2 * half, 0.24 + 2 * half], abs=1e-6)
    assert found[runs[1]]["gain"] == [gain.mean, gain.low, gain.high]
    assert "gain" not in found[runs[0]]
    assert found[runs[0]]["seeds"] == [0, 1]
    assert over_seeds(runs[:2], []) == {}


RUNS = (("baseline", 0, 0.20), ("distilled", 0, 0.23), ("baseline", 1, 0.21), ("distilled", 1, 0.25))


def test_origins_of_runs_folders_and_checkpoints(saved, tmp_path):
    assert known_origin(str(saved)) == known_origin(str(saved.parent)) == origin_of(SUMMARY, CONFIG)
    older = make_run(tmp_path / "older", "baseline", 2, 0.3)
    (older / "checkpoints").mkdir()
    (older / "checkpoints" / "best.ckpt").touch()
    found = known_origin(str(older))
    assert (found.run["seed"], found.run["metrics"]["AP"], found.bibtex) == (2, 0.3, ())
    assert known_origin(str(older / "checkpoints" / "best.ckpt")).run["metrics"] == {}
    assert known_origin("fcos:resnet18") is None


def test_a_student_without_a_run(tmp_path):
    folder = save_student(build_detector(MODEL, ("a",)), tmp_path / "student")
    text = (folder / "README.md").read_text()
    assert "these weights come from no run of detdistill" in text
    assert "No distillation method to cite." in text
    assert "model-index" not in text
    assert ModelCard.load(folder / "README.md").data.eval_results is None
    before = text
    revise_origin(folder, teacher_ap=0.5)
    assert (folder / "README.md").read_text() == before


def test_a_copied_student_keeps_its_origin(saved, tmp_path):
    copy = api.export_student(str(saved), tmp_path / "copy")
    assert json.loads((copy / "student.json").read_text())["origin"]["run"]["seed"] == 1


def test_names_cannot_break_the_card():
    assert quoted("a`b\n# c") == "`a'b\\n# c`"
    run = {**origin_of(SUMMARY, CONFIG).run, "data": {"path": "x\n---\n# y"}}
    text = Card("pytorch", "own: model\n# z", "about", "images", ["c\n## Licence"], ["use"], Origin(run)).text()
    assert ModelCard(text).data.eval_results[0].dataset_name == "x\n---\n# y"
    assert "\n# y" not in text.partition("\n---\n")[2]
    assert "# A detector distilled with pkd and cwd\n" in text or "# own distilled" in text
    assert replaced(text, Origin(run)) == text


def test_undefined_scores():
    run = origin_of({**SUMMARY, "metrics": {"AP": -1.0}}, CONFIG)
    text = Card("onnx", "fcos:x", "about", "images", ["a"], ["use"], run).text()
    assert "AP is undefined on 64 validation images." in text
    assert "model-index" not in text
    text = Card("onnx", "fcos:x", "about", "images", ["a"], ["use"], replace(run, run={**run.run, "metrics": {}})).text()
    assert "AP of these weights was not measured in their run." in text


def test_paths_are_shortened():
    assert shortened("/home/me/runs/teacher") == "runs/teacher"
    assert shortened("torchvision:retinanet,weights=DEFAULT") == "torchvision:retinanet,weights=DEFAULT"
    assert shortened("../data/cells") == "data/cells"
    assert shortened(None) is None
