"""What a user sees of the listing commands at 80 columns, in a pipe and on a terminal, and with ``--json``."""

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from dataclasses import asdict, replace

import pytest
import yaml

from detdistill import api, cli, kept
from detdistill.compare import Gain, Pair, summarize
from detdistill.data.inspect import inspect_data
from detdistill.data.records import Defect
from detdistill.detectors import probe
from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.probe import CHECKS
from detdistill.detectors.probed import STAGES, Probed
from detdistill.evaluation.scores import METRICS, Scores
from detdistill.listing import list_methods, list_recipes
from detdistill.methods.shared.compose import method_class, method_slugs
from tests.data.forms import Picture, make_coco, make_yolo

LONG = "runs/a folder with spaces/" + "deeper/" * 10 + "teacher"
"""A path longer than a line."""
STUDENT = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1,score=0.05"


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def see(capsys):
    """The lines a command prints: no colours, nothing cut, none over 80 columns but for a name alone on its line."""

    def seen(line, names=()):
        cli.main(shlex.split(line))
        text = capsys.readouterr().out
        assert "…" not in text
        assert "\x1b" not in text
        for shown in text.splitlines():
            assert len(shown) <= 80 or shown.strip() in names
            assert shown == shown.rstrip()
        return text.splitlines()

    return seen


@pytest.fixture
def document(capsys):
    """What ``--json`` prints, which is one document and nothing else."""

    def read(line):
        cli.main(shlex.split(f"{line} --json"))
        return json.loads(capsys.readouterr().out)

    return read


def joined(lines):
    return " ".join(" ".join(lines).split())


# -------------------------------------------------------------------------------------------------------- detectors

FOUND = [
    Probed(
        "cascade_mask_rcnn",
        "Cascade Mask R-CNN on a feature pyramid: three stages, a mask branch in each, and some words more",
        "regions",
        {check: check not in ("towers", "queries") for check in CHECKS},
        export="one image, fixed size",
    ),
    Probed("hf", "Any DETR of transformers", "as loaded"),
    Probed(
        "rt_detr", "RT-DETR", reasons={STAGES: "rt_detr needs transformers 5.20 or newer; found is 5.1, which is too old by far"}
    ),
    Probed(
        "fcos",
        "FCOS",
        "dense",
        {check: check in (STAGES, "backbone features") for check in CHECKS},
        {"towers": "finish(tower(features, None)) differs from predict(features) by 1.0e-04 (logits)"},
    ),
]


@pytest.fixture
def probed(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "probe_all", lambda follow=None, export=None: FOUND)
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr("detdistill.detectors.probed.SHIPPED", tmp_path / "nothing")


def test_a_new_machine_sees_what_comes_with_the_package(document, monkeypatch, tmp_path):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    shown = document("detectors")
    assert sorted(detector["name"] for detector in shown["detectors"]) == sorted(adapter_names())
    assert shown["probed"].startswith("with torch ")
    assert list(tmp_path.iterdir()) == []


def test_detectors(see, probed):
    lines = see("detectors")
    assert [line.split()[0] for line in lines[: lines.index("")] if line[0] != " "] == [
        "cascade_mask_rcnn",
        "hf",
        "rt_detr",
        "fcos",
    ]
    begin = lines.index("fcos               FCOS")
    assert lines[begin + 1] == "                   predicts dense; has backbone"
    text = joined(lines)
    assert f"{FOUND[0].about} predicts regions; has backbone, regions, copies exports one image, fixed size hf " in text
    assert f"FAILS all stages: {FOUND[2].reasons[STAGES]}" in text
    assert f"FAILS towers: {FOUND[3].reasons['towers']}" in text
    assert "`detector:backbone[,key=value ...]`" in text
    assert " towers (a dense head that can be resumed)" in text


def test_detectors_are_probed_once_for_the_same_versions(see, document, probed, monkeypatch):
    see("detectors")
    shown = document("detectors")
    monkeypatch.setattr(probe, "probe_all", lambda follow, export: FOUND[:1])
    assert document("detectors") == shown  # from the kept file
    assert [each["name"] for each in document("detectors --probe true")["detectors"]] == ["cascade_mask_rcnn"]
    assert [each["name"] for each in document("detectors")["detectors"]] == ["cascade_mask_rcnn"]  # what was kept last


def test_kept_probes_of_other_versions_or_other_files_are_not_trusted(document, probed, monkeypatch):
    document("detectors")
    monkeypatch.setattr(probe, "probe_all", lambda follow, export: FOUND[:1])
    kept.software.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(kept, "version", lambda name: "99.0")
        assert len(document("detectors")["detectors"]) == 1
    kept.software.cache_clear()


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", '{"key": 1}'])
def test_a_kept_file_that_is_broken_is_written_anew(text, document, probed, tmp_path):
    (tmp_path / "detectors.json").write_text(text)
    assert len(document("detectors")["detectors"]) == len(FOUND)
    assert json.loads((tmp_path / "detectors.json").read_text())["content"]["when"]


def test_a_kept_file_of_another_form_is_written_anew(document, probed, tmp_path):
    (tmp_path / "detectors.json").write_text(json.dumps({"key": kept.software(), "content": {"detectors": [{"nam": 1}]}}))
    assert len(document("detectors")["detectors"]) == len(FOUND)


def test_a_cache_folder_that_cannot_be_written_is_passed_over_in_silence(document, probed, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "file" / "below"))
    assert len(document("detectors")["detectors"]) == len(FOUND)
    assert capsys.readouterr().err == ""


def test_kept_probes_are_shown_without_importing_torch(probed, tmp_path):
    probe.survey()
    code = "import sys; from detdistill.cli import main; main(['detectors']); sys.exit('torch' in sys.modules)"
    environment = os.environ | {"DETDISTILL_CACHE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode == 0


def test_detectors_as_json(document, probed):
    shown = document("detectors")["detectors"]
    assert [detector["name"] for detector in shown] == ["cascade_mask_rcnn", "hf", "rt_detr", "fcos"]
    for detector, found in zip(shown, FOUND, strict=True):
        assert (detector["about"], detector["family"], detector["reasons"]) == (found.about, found.family, found.reasons)
    assert shown[0]["results"] == {check: check not in ("towers", "queries") for check in CHECKS}
    assert [detector["export"] for detector in shown] == ["one image, fixed size", "", "", ""]
    assert shown[1]["results"] == dict.fromkeys(CHECKS)


# ------------------------------------------------------------------------------------------------ methods, recipes, cite


def test_methods(see, document):
    lines = see("methods")
    methods = document("methods")
    assert (methods["teacher"], methods["student"]) == (None, None)
    for method in methods["methods"]:
        assert f"{method['name']} {method['title']}" in joined(lines)
        assert any(line.startswith(f"{method['name']} ") for line in lines)
    assert {(method["serves"], method["reason"]) for method in methods["methods"]} == {(None, None)}


def test_reasons_of_a_refusal_wrap_under_their_method(see, document, monkeypatch):
    def reasons(teacher, student):
        why = f"the student {student.spec.name} lacks something; run `detdistill methods --student x` for more"
        return {slug: why if slug == "fkd" else "" for slug in method_slugs()}

    monkeypatch.setattr("detdistill.methods.shared.compose.reasons_against", reasons)
    lines = see(f"methods --student {STUDENT}", names=[STUDENT])
    assert lines[:5] == ["teacher", STUDENT, "student", STUDENT, ""]
    column = " " * (2 + max(map(len, method_slugs())))
    begin = lines.index(f"{column}no: the student")
    assert next(line for line in reversed(lines[:begin]) if line[0] != " ").startswith("fkd ")
    assert lines[begin + 1 : begin + 3] == [
        STUDENT.rjust(80),
        f"{column}lacks something; run `detdistill methods --student x` for more",
    ]
    assert lines.count(f"{column}yes") == len(method_slugs()) - 1
    answers = document(f"methods --student {STUDENT}")
    assert (answers["teacher"], answers["student"]) == (STUDENT, STUDENT)
    serves = {method["name"]: method["serves"] for method in answers["methods"]}
    assert [name for name, served in serves.items() if not served] == ["fkd"]
    reasons = [method["reason"] for method in answers["methods"] if method["reason"]]
    assert reasons == [f"the student {STUDENT} lacks something; run `detdistill methods --student x` for more"]


def test_a_teacher_alone_is_paired_with_a_student_of_its_build():
    found = list_methods(teacher=STUDENT)
    assert (found.teacher, found.student) == (STUDENT, STUDENT)
    serves = {method.name: method.serves for method in found.methods}
    assert (serves["pkd"], serves["kd_detr"]) == (True, False)


def test_a_teacher_with_classes_of_its_own_is_no_obstacle(tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"])
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_queries": 5}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    labels = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
    DetrForObjectDetection(DetrConfig(backbone_config=backbone, **sizes, **heads, **labels)).save_pretrained(tmp_path)
    found = list_methods(teacher=f"hf:{tmp_path}", student=STUDENT)
    assert next(method.serves for method in found.methods if method.name == "unikd")


def test_recipes(see, document):
    lines = see("recipes")
    shown = document("recipes")["recipes"]
    assert shown == [asdict(recipe) for recipe in list_recipes()]
    for recipe in shown:
        assert f"{recipe['name']} {recipe['about']}" in joined(lines)
        assert any(line.startswith(f"{recipe['name']} ") for line in lines)
    pkd = next(recipe for recipe in shown if recipe["name"] == "pkd")
    assert (pkd["settings"]["method"], pkd["settings"]["lr"]) == ("pkd,weight=10", 0.01)


def test_cite_as_json(document):
    shown = document("cite fgd,temperature=0.8+pkd")["methods"]
    assert [(method["name"], method["bibtex"]) for method in shown] == [
        (slug, method_class(slug).bibtex) for slug in ("fgd", "pkd")
    ]


# ------------------------------------------------------------------------------------------------------ eval, compare

VALUES = (1.0, 0.4237, 1.0, 0.001, 0.5, -1.0, 0.3, 1.0, 1.0, 0.2, 0.6, 0.42)
NAMES = ("cell phone", "a class whose name alone is already longer than any terminal of eighty columns can ever be", "[red]")


@pytest.fixture
def scores(monkeypatch):
    errors = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FalsePos", "FalseNeg"), VALUES[1:], strict=False))
    per_class = dict(zip(NAMES, (0.4237, 1.0, -1.0), strict=True))
    found = Scores(dict(zip(METRICS, VALUES, strict=True)), per_class, 1234, 5.25, {**errors, "Bkg": -0.001})

    def evaluate(**given):
        print("Downloading: some weights")
        return found

    monkeypatch.setattr(api, "evaluate", evaluate)
    return found


def test_eval(see, scores):
    lines = see("eval --model x", names=NAMES)[1:]
    assert lines[:9] == [
        "1234 images, 5.2 s; all numbers x 100",
        "",
        "     AP   AP50   AP75    APs    APm    APl",
        "  100.0   42.4  100.0    0.1   50.0      -",
        "    AR1   AR10  AR100    ARs    ARm    ARl",
        "   30.0  100.0  100.0   20.0   60.0   42.0",
        "",
        "class          AP",
        "cell phone   42.4",
    ]
    assert lines[9] == NAMES[1]
    assert [line.split() for line in lines[10:12]] == [["100.0"], ["[red]", "-"]]
    assert lines[13:] == [
        "AP50 lost to",
        "       Cls       Loc      Both      Dupe       Bkg      Miss",
        "      42.4     100.0       0.1      50.0      -0.1      30.0",
        "  FalsePos  FalseNeg",
        "     100.0     100.0",
    ]


def test_eval_as_json_is_what_out_writes(scores, capsys, tmp_path):
    cli.main(["eval", "--model", "x", "--json", "true", "--out", str(tmp_path / "scores.json")])
    shown = capsys.readouterr()
    assert json.loads(shown.out) == asdict(scores)
    assert shown.out == (tmp_path / "scores.json").read_text()
    assert shown.err == "Downloading: some weights\n"


@pytest.fixture
def gains(monkeypatch):
    method = "fgd,profile=anchor_free,foreground_weight=0.0005,temperature=0.8+pkd,weight=2 + inherited head"
    pairs = [Pair(seed, 0.0, 1.0 if seed else 0.5) for seed in range(3)]
    first = summarize(method, LONG, STUDENT, "AP", pairs, ["seed 7: no baseline of the same student and data, " * 3])
    second = summarize("pkd", LONG, STUDENT, "AP", pairs[:1])
    found = [first, second, replace(second, teacher="runs/other")]
    monkeypatch.setattr(api, "compare", lambda **given: found)
    return found


def test_compare(see, gains):
    names = [LONG, STUDENT, gains[0].method]
    lines = see("compare x", names=names)
    assert lines[:7] == ["AP on the validation images (x 100)", "", "teacher", LONG, "student", STUDENT, lines[6]]
    assert lines[6].split() == ["method", "seeds", "baseline", "distilled", "gain", "95", "%", "interval", "verdict"]
    assert lines[7] == f"  {gains[0].method}"
    low, high = (f"{100 * end:+.1f}" for end in (gains[0].low, gains[0].high))
    assert lines[8].split() == ["3", "0.0", "83.3", "+83.3", low, "..", high, "gain"]
    assert lines[9].split() == ["pkd", "1", "0.0", "50.0", "+50.0", "-", "no", "verdict"]
    text = joined(lines)
    assert all(f"{gain.method}: {' '.join(note.split())}" in text for gain in gains for note in gain.notes)
    assert "teacher runs/other" in lines


def test_compare_as_json(document, gains):
    shown = document("compare x")["gains"]
    assert [
        Gain(**{**gain, "pairs": tuple(Pair(**pair) for pair in gain["pairs"]), "notes": tuple(gain["notes"])}) for gain in shown
    ] == gains


# ------------------------------------------------------------------------------------------------------- data inspect


def test_data_inspect(see, document, tmp_path):
    name = "a rather long name of a picture that somebody made up for this purpose alone"
    picture = Picture(name, 64, 48, [("bee", 2, 3, 22, 33)])
    folder = make_yolo(
        tmp_path / ("long-" * 10) / ("folder-" * 5), splits={"train": [picture], "val": [replace(picture, name="v")]}
    )
    (folder / "labels" / "train" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n" + "0 0.5 0.5 0 0.2\n" * 22)
    (folder / "labels" / "val" / "v.txt").write_text("7 0.5 0.5 0.2 0.2\n")
    line = f"data inspect '{folder}' --out '{tmp_path / 'report.json'}'"
    file = f"labels/train/{name}.txt"
    lines = see(line, names=[str(folder), f"{folder}:", file])
    assert lines[:2] == [str(folder), "YOLO, 3 classes"]
    assert [line.split() for line in lines[2:5]] == [[], ["train", "val"], ["images", "1", "0"]]
    begin = lines.index("empty box: 22")
    assert lines[begin + 1 : begin + 5] == [
        "  train",
        file,
        "      row 2: box [32, 19.2, 32, 28.8] (x1, y1, x2, y2) in 64x48 has no area",
        "      (skipped: box)",
    ]
    assert lines.count(file) == 20
    assert "  ... and 2 more" in lines
    assert "  val  labels/val/v.txt  row 1: class 7 is not in 0 .. 2 (skipped: box)" in lines
    assert lines[-1] == "24 defects (headers checked, images not decoded)"
    shown = document(line)
    assert shown == json.loads((tmp_path / "report.json").read_text()) == json.loads(inspect_data(str(folder)).to_json())
    assert len(shown["defects"]["empty box"]) == 22
    assert shown["splits"][0]["box_sizes"] == {"small": 1, "medium": 0, "large": 0}


def test_counts_of_a_large_set_fit(see, tmp_path, monkeypatch):
    splits = {split: [Picture("a", 20, 20, [("ant", 1, 1, 9, 9)])] for split in ("train", "val", "test")}
    report = inspect_data(make_coco(tmp_path, splits))
    sizes = {f"{side}x{side}": 100_000 - side for side in range(1000, 1010)}
    many = {"images": 1_000_000, "boxes": 9_999_999, "box_sizes": dict.fromkeys(("small", "medium", "large"), 9_999_999)}
    large = [
        replace(split, image_sizes=sizes, per_class=dict.fromkeys(report.classes, 9_999_999), **many) for split in report.splits
    ]
    defects = (("train", Defect("kind", "file", "row 1", "message", "box")),)
    monkeypatch.setattr(api, "inspect_data", lambda data, **given: replace(report, splits=tuple(large), defects=defects))
    lines = see("data inspect x")
    assert sum(line.split()[-2:] == ["(100.0", "%)"] for line in lines) == 6
    assert joined(lines).count("9999999 (100.0 %)") == 18
    assert sum("1000x1000: 99000" in line for line in lines) == 1
    assert [line.split() for line in lines if "and 5 more" in line] == [["...", "and", "5", "more"] * 3]


# ---------------------------------------------------------------------------------------------------- real terminals


def on_a_terminal(columns, *words, code=0):
    """What a command writes to a pseudo-terminal before it ends with an exit code."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}, "TERM": "xterm"}
    command = [sys.executable, "-m", "detdistill", *words]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # Linux says so when the last writer has gone
                part = b""
            if not part:
                break
            written += part
    os.close(master)
    assert process.returncode == code
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_has_colours_and_its_own_width_and_a_pipe_has_neither():
    narrow, wide = (on_a_terminal(columns, "recipes") for columns in (80, 200))
    plain = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in (narrow, wide)]
    assert all("\x1b[1m" in text for text in (narrow, wide))
    assert max(map(len, plain[0].splitlines())) <= 80 < max(map(len, plain[1].splitlines()))
    assert len(plain[1].splitlines()) == len(list_recipes()) + 2
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "detdistill", "recipes"]
    piped = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=True)
    assert piped.stdout == plain[0]


def test_an_error_wraps_between_words_on_a_terminal_and_is_one_line_elsewhere():
    words = ("compare", "runs/with/a/long/name/that/does/not/exist")
    shown = on_a_terminal(80, *words, code=2).splitlines()
    assert len(shown) > 1
    assert max(map(len, shown)) <= 80
    command = [sys.executable, "-m", "detdistill", *words]
    piped = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stderr
    assert piped.splitlines()[-1] == " ".join(shown)


def test_a_pipe_that_closes_early_ends_a_listing_quietly():
    command = f"{shlex.quote(sys.executable)} -m detdistill recipes | head -1"
    done = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{min(method_slugs())} ")
    assert done.stderr == ""


def test_json_may_be_asked_for_in_a_file(document, tmp_path, capsys):
    config = tmp_path / "listing.yaml"
    config.write_text(yaml.safe_dump({"json": True}))
    cli.main(["recipes", "--config", str(config)])
    assert json.loads(capsys.readouterr().out) == document("recipes")


@pytest.mark.parametrize(
    "line", ["eval --model x --data nowhere", "compare nowhere", "data inspect nowhere", "cite pdk", "methods --student x"]
)
def test_bad_input_is_one_line_and_no_document(capsys, line):
    with pytest.raises(SystemExit) as ended:
        cli.main([*line.split(), "--json"])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["methods", "detectors", "recipes", "cite", "eval", "compare", "data inspect"])
def test_help_names_the_flag(capsys, verb):
    with pytest.raises(SystemExit):
        cli.main([*verb.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "print one JSON document and nothing else on stdout" in text
    assert ("fractions 0..1" in text) == (verb in ("eval", "compare"))


def test_the_overview_fits(see):
    assert see("--help")
