import json
from pathlib import Path

import pytest
import torch
import yaml

import detdistill
from detdistill import api, cli
from detdistill.compare import Pair, summarize
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import ClassNameError, DetdistillError, RunError, name_list
from detdistill.evaluation import ERRORS, METRICS, Scores
from detdistill.given import name_or_detector
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.results import Distilled

MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1"
DIGITS = "digits:train=24,val=8,size=64,seed=0"
QUICK = {"size": 64, "batch": 4, "device": "cpu", "threads": 1, "epochs": 1, "report": False, "monitor_every": 0}
CLASSES = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    return save_student(build_detector(MODEL, CLASSES), tmp_path_factory.mktemp("saved") / "student")


def written_by(folder):
    return json.loads((folder / "summary.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())


def test_every_public_name_is_there():
    for name in detdistill.__all__:
        assert getattr(detdistill, name) is not None
    assert set(dir(detdistill)) == set(detdistill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = detdistill.distil


def test_what_needs_no_data_is_said_before_they_are_read():
    nowhere = "/there/is/no/such/data"
    with pytest.raises(RunError, match=r"no setting 'epohs' \(did you mean 'epochs'\?\)"):
        api.train(MODEL, nowhere, epohs=3)
    with pytest.raises(RunError, match="optimizer: 'adam' is not one of adamw, sgd"):
        api.train(MODEL, nowhere, optimizer="adam")
    with pytest.raises(MethodError, match=r"no method 'pdk' \(did you mean 'pkd'\?\)"):
        api.distill(MODEL, MODEL, nowhere, "pdk")
    with pytest.raises(DetdistillError, match=r"fcos has no option 'nek' \(did you mean 'neck'\?\)"):
        api.distill(MODEL, "fcos:resnet10t,nek=4", nowhere)
    with pytest.raises(DetdistillError, match="there is no such file or folder"):
        api.distill(MODEL, MODEL, nowhere)


def test_a_student_folder_is_evaluated_on_any_split(student):
    first, again = (api.evaluate(str(student), DIGITS, size=64, device="cpu") for _ in range(2))
    assert first.metrics == again.metrics
    assert first.images == 8
    assert tuple(first.per_class) == CLASSES
    assert tuple(first.errors) == ERRORS
    assert first.errors["FalseNeg"] > 0
    assert api.evaluate(str(student), DIGITS, split="train", size=64, device="cpu").images == 24
    with pytest.raises(RunError, match=r"no split 'test' in digits.*; there are train, val"):
        api.evaluate(str(student), DIGITS, split="test", size=64)


def test_a_run_is_evaluated_and_predicts_at_its_own_size(tmp_path, student, monkeypatch, capsys):
    from PIL import Image

    import detdistill.evaluation as evaluation
    from detdistill.evaluation import predict

    (tmp_path / "student").symlink_to(student, target_is_directory=True)
    (tmp_path / "config.yaml").write_text("size: 96\nresize: stretch\nmax_size: null\n")
    seen = []
    plain = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: seen.append(a[2]) or plain(*a, **k))
    for model in (tmp_path, tmp_path / "student"):
        api.evaluate(str(model), DIGITS, device="cpu")
    assert "was trained with" not in capsys.readouterr().err
    api.evaluate(str(tmp_path), DIGITS, device="cpu", size=64)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path} was trained with size 96, stretch; it is shown images of size 64, stretch" in said
    assert [(view.size, view.resize) for view in seen] == [(96, "stretch"), (96, "stretch"), (64, "stretch")]
    monkeypatch.setattr(predict, "predict_folder", lambda *a, **k: seen.append(a[3]) or predict.Predicted(a[2], 1, 0))
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    found = api.predict(str(tmp_path), tmp_path / "a.png", tmp_path / "out", device="cpu")
    assert found.folder == tmp_path / "out"
    assert (seen[-1].size, seen[-1].resize) == (96, "stretch")


def test_a_moved_student_is_evaluated_at_its_own_size_and_an_older_one_says_what_is_assumed(tmp_path, student, capsys):
    from detdistill.structures import Resizing

    detector = load_detector(str(student))
    moved = save_student(detector, tmp_path / "moved", Resizing(64, "stretch"))
    found = api.evaluate(str(moved), DIGITS, device="cpu")
    assert "does not say" not in capsys.readouterr().err
    same = api.evaluate(str(student), DIGITS, device="cpu", size=64, resize="stretch")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{student} does not say with which image size it was trained; it is shown images of size 64, stretch" in said
    assert found.metrics == same.metrics
    api.distill(
        str(moved), MODEL, DIGITS, "pkd", **{**QUICK, "size": 96, "steps": 1, "score_teacher": False, "out": tmp_path / "run"}
    )
    assert "the teacher was trained with size 64, resize stretch" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_becomes_a_student_folder(tmp_path, capsys):
    from detdistill.detectors.load import trained_resizing

    run = api.train(MODEL, DIGITS, out=tmp_path / "run", **QUICK).folder
    best = run / "checkpoints" / "best.ckpt"
    cli.main(["student", "--model", str(best), "--out", str(tmp_path / "best")])
    assert capsys.readouterr().out == f"student folder {tmp_path / 'best'}\n"
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == (run / "student" / "model.safetensors").read_bytes()
    assert trained_resizing(tmp_path / "best").size == 64
    (run / "student").rename(tmp_path / "gone")  # as in an unfinished run
    api.export_student(str(best), tmp_path / "early", size=96, resize="stretch")
    assert load_detector(tmp_path / "early").spec.classes == CLASSES
    assert (trained_resizing(tmp_path / "early").size, trained_resizing(tmp_path / "early").resize) == (96, "stretch")
    with pytest.raises(RunError, match=r"early exists; give another --out"):
        api.export_student(str(best), tmp_path / "early")
    with pytest.raises(RunError, match=r"max_size=99 has no effect with resize='letterbox'"):
        api.export_student(str(best), tmp_path / "other", max_size=99)


def test_one_call_leads_from_an_image_to_boxes(tmp_path, student):
    from PIL import Image

    (tmp_path / "images" / "deep").mkdir(parents=True)
    path = tmp_path / "images" / "deep" / "a.png"
    Image.effect_noise((60, 40), 90).convert("RGB").save(path)
    looking = {"size": 64, "device": "cpu", "score": 0.0}
    found = detdistill.detect(str(student), path, **looking)
    assert len(found) == len(found.names) > 0
    assert set(found.names) <= set(CLASSES)
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy[:, 2] <= 60).all()
    assert (found.boxes_xyxy[:, 3] <= 40).all()
    assert repr(found).startswith(
        f"{len(found)} detections (x1, y1, x2, y2 in pixels)\n  {found.names[0]} {found.scores[0]:.2f} at "
    )
    detector = load_detector(student).train()
    for model, images in ((student, path.parent), (detector, [Image.open(path)]), (detdistill.Teacher(detector), [path])):
        several = detdistill.detect(model, images, **looking)
        (same,) = several if isinstance(several, list) else [several[path]]
        assert torch.equal(same.boxes_xyxy, found.boxes_xyxy)
        detector.train()
    assert not len(detdistill.detect(str(student), path, size=64, score=1.0))
    detdistill.detect(detector, path, **looking)
    assert detector.training, "as it was before"
    for model, image, said in (
        (torch.nn.Linear(2, 2), path, r"model: a Linear is no detector yet; wrap it: detdistill\.wrap\(model"),
        (3, path, "model: a int is no model; give a model string, a path"),
        (student, 3, "a int is no image"),
        (student, tmp_path / "no.png", r"no\.png: there is no such file"),
    ):
        with pytest.raises(DetdistillError, match=said):
            detdistill.detect(model, image, **looking)
    with pytest.raises(RunError, match=r"predict: give out.*; detdistill\.detect\(model, images\) returns boxes alone"):
        api.predict(student, path)
    with pytest.raises(RunError, match="reads an image file or a folder, not a Tensor"):
        api.predict(student, torch.zeros(3, 8, 8), tmp_path / "out")


def test_functions_take_what_functions_return_and_results_are_short(tmp_path, student):
    trained = api.train(MODEL, DIGITS, out=tmp_path / "teacher", role="teacher", **QUICK)
    assert repr(trained) == f"Run(teacher {MODEL}: AP {trained.scores.points('AP')}; {tmp_path / 'teacher'})"
    assert f'<td style="text-align:left">{MODEL}</td>' in trained._repr_html_()
    result = api.distill(trained, MODEL, DIGITS, "pkd", out=tmp_path / "run", **QUICK)
    summary, config = written_by(result.folder)
    assert summary["teacher"] == config["teacher"] == str(tmp_path / "teacher")
    assert repr(result) == f"Distilled(1 run in {tmp_path / 'run'})"
    assert "AP of the teacher" in result._repr_html_()
    again = api.evaluate(result, DIGITS, device="cpu")
    assert again.metrics == pytest.approx(summary["metrics"])
    assert api.evaluate(trained.student, DIGITS, size=64, device="cpu").metrics == pytest.approx(trained.scores.metrics)
    assert api.evaluate(tmp_path / "teacher", DIGITS, device="cpu").metrics == pytest.approx(trained.scores.metrics)
    several = Distilled(tmp_path, (tmp_path / "a", tmp_path / "b"), tmp_path / "report.html")
    with pytest.raises(DetdistillError, match=r"this result has 2 runs; give one of its \.runs, e\.g\. .*a$"):
        api.evaluate(several, DIGITS)
    both = Distilled(tmp_path, (tmp_path / "baseline-seed0", tmp_path / "distilled-seed0"), tmp_path / "report.html")
    assert name_or_detector(both) == str(tmp_path / "distilled-seed0"), "the distilled one is meant"
    assert api.report(result) == tmp_path / "run" / "report.html"
    assert api.report([trained, result], out=str(tmp_path / "both.html")).read_text().count(MODEL) >= 2
    for one in (result, [trained, result]):
        with pytest.raises(DetdistillError, match=r"^nothing to compare: 0 baseline and 1 distilled runs in "):
            api.compare(one)
    for wrong, said in ((3, "a int is no run"), ([], "none is given")):
        with pytest.raises(DetdistillError, match=f"^runs: {said}; give run folders, or results of train or distill"):
            api.report(wrong)
    with pytest.raises(DetdistillError, match="teacher: a int is no model"):
        api.distill(3, MODEL, DIGITS)
    with pytest.raises(DetdistillError, match="student: a PosixPath cannot be trained"):
        api.distill(trained, tmp_path, DIGITS)


def test_texts_of_results_are_points_and_their_numbers_fractions():
    scores = Scores({**dict.fromkeys(METRICS, 0.25), "APl": -1.0}, {"<b>": 0.5}, 7)
    assert repr(scores) == "Scores(AP 25.0, AP50 25.0, AP75 25.0; 7 images)"
    assert (scores.points("APl"), scores.points("<b>")) == ("-", "50.0")
    gain = summarize("<pkd>", "t", "s", "AP", [Pair(0, 0.2, 0.3), Pair(1, 0.21, 0.33)])
    assert gain.mean == pytest.approx(0.11)
    assert repr(gain) == "<pkd>: AP +11.0 (-1.7 .. +23.7), no gain shown, 2 seeds"
    assert repr(summarize("pkd", "t", "s", "AP", [Pair(0, 0.2, 0.3)])) == "pkd: AP +10.0, one seed: no verdict, 1 seed"
    page = Distilled(Path("runs"), (Path("runs/a"),), Path("report.html"), (gain,), scores)._repr_html_()
    assert "&lt;pkd&gt;" in page
    assert "<pkd>" not in page
    for text in ("+11.0", "-1.7 .. +23.7", "20.5", "31.5", "no gain shown", "0, 1"):
        assert f">{text}</td>" in page, text


def test_data_are_inspected():
    found = api.inspect_data(DIGITS)
    assert json.loads(found.to_json())


# ------------------------------------------------------------------------------------------ from the command line to runs


def test_a_runs_config_runs_again_as_it_is(tmp_path, capsys):
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in QUICK.items()]
    cli.main(["train", "--model", MODEL, "--data", DIGITS, *words, "--role", "teacher", "--out", str(tmp_path / "a"), "lr=3e-3"])
    assert f"run folder {tmp_path / 'a'}\n" in capsys.readouterr().out
    cli.main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")])
    (first, config), (second, other) = written_by(tmp_path / "a"), written_by(tmp_path / "b")
    assert config["role"] == "teacher"
    assert config["lr"] == 3e-3
    assert {**config, "out": None} == {**other, "out": None}
    assert first["config_fingerprint"] == second["config_fingerprint"]
    assert first["metrics"] == second["metrics"]
    mine, theirs = (load_detector(str(tmp_path / name)).state_dict() for name in "ab")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_distilled_runs_config_runs_again_as_it_is(tmp_path, capsys, student):
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in QUICK.items()]
    line = [
        "distill",
        f"distill_model={student}",
        "--student",
        MODEL,
        "--data",
        DIGITS,
        *words,
        "--recipe",
        "mgd",
        "--accumulate=1",
    ]
    cli.main([*line, "dis=2", "--inherit", "false", "--out", str(tmp_path / "a")])
    said = " ".join(capsys.readouterr().err.split())
    assert "WARNING: the teacher's AP is" in said
    cli.main(["distill", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")])
    (first, config), (second, other) = written_by(tmp_path / "a"), written_by(tmp_path / "b")
    assert (config["method"], config["distill_weight"], config["epochs"]) == ("mgd,weight=2e-05,dropped=0.65", 2.0, 1)
    assert {**config, "out": None} == {**other, "out": None}
    assert first["role"] == "distilled"
    assert first["teacher_metrics"]["AP"] == second["teacher_metrics"]["AP"]
    assert first["metrics"] == second["metrics"]
    assert first["config_fingerprint"] == second["config_fingerprint"]


def test_a_teacher_of_other_classes_serves_a_composition_on_features(tmp_path, capsys):
    teacher = save_student(build_detector(MODEL, ("cell", "platelet")), tmp_path / "teacher")
    quick = {**QUICK, "out": tmp_path / "run"}
    with pytest.raises(ClassNameError, match="--other_classes true"):
        api.distill(str(teacher), MODEL, DIGITS, "fgd+pkd", **quick)
    result = api.distill(str(teacher), MODEL, DIGITS, "fgd+pkd", other_classes=True, **quick)
    assert "does not know 0, 1" in capsys.readouterr().err
    header = (result.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/classification", "train/fgd/fgd_foreground", "train/pkd/pkd"} <= set(header)


def refusal_of_a_teacher(folder, classes, **more):
    save_student(build_detector(MODEL, classes), folder)
    with pytest.raises(ClassNameError) as caught:
        api.distill(str(folder), MODEL, DIGITS, "pkd", **{**QUICK, **more})
    return str(caught.value)


def test_classes_that_differ_in_name_are_refused_with_both_lists(tmp_path):
    folder = tmp_path / "teacher"
    # As many classes as the data has: the number says nothing, the names do.
    line = refusal_of_a_teacher(folder, (*CLASSES[:9], "nine"))
    assert line == (
        f"teacher {folder} has 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, nine), but others are wanted "
        "(0, 1, 2, 3, 4, 5, 6, 7, 8, 9); it does not know 9; --other_classes true lets such a teacher serve methods on features"
    )
    line = refusal_of_a_teacher(tmp_path / "few", ("0", "cell", "1"))
    assert line.startswith(f"teacher {tmp_path / 'few'} has 3 classes (0, cell, 1), but 10 are wanted (0, 1, 2, 3, 4, 5, 6, 7, 8")
    assert "it does not know 2, 3, 4, 5, 6, 7, 8, 9; " in line
    many = tuple(f"thing {number}" for number in range(50))
    line = refusal_of_a_teacher(tmp_path / "many", (*CLASSES[:9], *many))
    assert "has 59 classes (0, 1, 2, 3, 4, 5, ..., thing 0, thing 1, thing 2, thing 3, thing 4, thing 5, ...)" in line


def test_a_class_that_is_only_spelt_otherwise_is_pointed_out(tmp_path):
    line = refusal_of_a_teacher(tmp_path / "teacher", (*CLASSES[:9], "9 "))
    assert "it does not know 9 (it spells '9' as '9 '); --other_classes" in line


def test_long_lists_of_names_show_their_beginning_and_what_differs():
    names = [f"n{number}" for number in range(20)]
    assert name_list(names[:12]) == ", ".join(names[:12])
    assert name_list(names) == "n0, n1, n2, n3, n4, n5, ..."
    assert name_list(names, ["n2", "n15"]) == "n0, n1, n2, n3, n4, n5, ..., n15, ..."
    assert name_list(names, names) == "n0, n1, n2, n3, n4, n5, ..., n6, n7, n8, n9, n10, n11, ..."


def test_a_teacher_may_know_the_classes_in_another_order_and_more(tmp_path, student):
    """Its score is that of its twin in the data's order, and its logits are compared by name."""
    own = load_detector(str(student))
    order = tuple(reversed(range(10)))
    mixed = build_detector(MODEL, (*(CLASSES[index] for index in order), "ten"))
    state = {name: tensor.clone() for name, tensor in mixed.state_dict().items()}
    for name, tensor in own.state_dict().items():
        rows = 1 + torch.tensor(order)  # output 0 is the background's
        if "cls_logits" in name:
            state[name][1:11] = tensor[rows]
        else:
            state[name] = tensor
    mixed.load_state_dict(state)
    teacher = save_student(mixed, tmp_path / "teacher")
    quick = {**QUICK, "out": tmp_path / "run"}
    result = api.distill(str(teacher), MODEL, DIGITS, "cwd,on=logits", **quick)
    twin = api.distill(str(student), MODEL, DIGITS, "cwd,on=logits", **{**quick, "out": tmp_path / "twin"})
    assert result.teacher_scores.per_class == twin.teacher_scores.per_class
    mine, theirs = (load_detector(found.folder).state_dict() for found in (result, twin))
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in mine)


def test_classes_that_are_not_those_of_the_default_data_are_said_so(tmp_path):
    other = save_student(build_detector(MODEL, ("ant", "bee")), tmp_path / "other")
    for action in (lambda: api.evaluate(str(other), device="cpu"), lambda: api.distill(str(other), MODEL, out=tmp_path / "run")):
        with pytest.raises(DetdistillError, match=r"^data: without --data, the built-in digits are used, .* other classes"):
            action()
    with pytest.raises(RunError, match=r"no setting 'imgsz' \(did you mean 'size'\?\)"):
        api.train(MODEL, DIGITS, imgsz=96)


def test_predicting_leaves_a_detector_in_memory_in_its_memory_layout(tmp_path, student):
    from PIL import Image

    from detdistill.detectors.contract import Teacher

    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    detector = load_detector(str(student))
    before = [parameter.stride() for parameter in detector.parameters()]
    for number, model in enumerate((detector, Teacher(detector))):
        api.predict(model, tmp_path / "a.png", tmp_path / f"out{number}", size=64, device="cpu")
        assert [parameter.stride() for parameter in detector.parameters()] == before
