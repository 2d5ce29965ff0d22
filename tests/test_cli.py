import io
import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

import detdistill
from detdistill import cli
from detdistill.cli import starting
from detdistill.cli.arguments import Parser, plain
from detdistill.detectors import probe
from detdistill.errors import DetdistillWarning
from tests.test_compare import make_pairs

RECIPES = sorted((Path(detdistill.__file__).parent / "recipes").glob("*.yaml"))
DISTILL = "distill --teacher t --student s "
HEAVY = ("torch", "torchvision", "timm", "lightning", "sklearn", "skimage", "matplotlib", "scipy")


@pytest.fixture
def parse(monkeypatch):
    """What a verb would be called with."""

    def parsed(line):
        words = shlex.split(line)
        verb = "data-inspect" if words[0] == "data" else words[0]
        calls = []
        describe, _, summary = cli.VERBS[verb]
        monkeypatch.setitem(cli.VERBS, verb, (describe, lambda chosen: calls.append(plain(chosen)), summary))
        cli.main(words)
        return calls[0]

    return parsed


def refused(capsys, line):
    """The one line on stderr of a call that ends with 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(line))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1
    return shown.err.strip()


# --------------------------------------------------------------------------------------------------------------- help


def test_overview_names_every_verb(capsys):
    for given in ([], ["--help"], ["-h"]):
        cli.main(given)
        text = capsys.readouterr().out
        for verb, (_, _, summary) in cli.VERBS.items():
            assert verb.replace("-", " ") in text
            assert summary in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split("-"), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert cli.VERBS[verb][2].split()[0] in text
    assert f"usage: detdistill {verb.replace('-', ' ')}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_help_of_distill_explains_each_setting(capsys):
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--teacher", "--student", "--data", "--recipe", "--method", "--dis", "--seeds", "--lr", "--epochs", "--out"):
        assert flag in text
    assert "factor on all distillation losses together" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_flag_is_explained(verb):
    parser = Parser(prog=verb)
    cli.VERBS[verb][0](parser)
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert unexplained == []


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"detdistill {detdistill.__version__}\n"


@pytest.mark.parametrize("arguments", ["--help", "distill --help"])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom detdistill import cli\n"
        f"try:\n    cli.main({arguments.split()!r})\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(repr([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout
    assert done.stderr == "[]"


def test_parsing_and_comparing_import_nothing_heavy():
    code = (
        "import sys\nfrom detdistill import cli, api, errors\n"
        "for verb in ('train --model m --lr 1e-3', 'distill --teacher t --student s --recipe pkd', 'eval --model m'):\n"
        "    word = verb.split()[0]\n    cli.VERBS[word] = (cli.VERBS[word][0], lambda chosen: None, '')\n"
        "    cli.main(verb.split())\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "[]\n"


def test_comparing_runs_imports_no_torch(tmp_path):
    """It reads a few files: seconds of imports would be most of its time."""
    make_pairs(tmp_path, (0.02, 0.03))
    code = (
        f"import sys\nfrom detdistill import cli\ncli.main(['compare', {str(tmp_path)!r}])\n"
        "print([name for name in ('torch', 'timm', 'scipy.stats') if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "2      20.0       22.5  +2.5" in out
    assert out.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("eval --model runs/typo", "'runs/typo' is no folder, no file and no model string"),
        ("bench --model runs/typo", "'runs/typo' is no folder, no file and no model string"),
        ("distill --teacher runs/typo --student fcos:resnet18", "'runs/typo' is no folder, no file and no model string"),
        ("predict --model fcos:resnet18 --images imagse --out drawn", "imagse: there is no such file or folder"),
    ],
)
def test_a_mistyped_path_is_told_before_torch_is_loaded(line, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verb = line.split()[0]
    monkeypatch.setitem(cli.VERBS, verb, (cli.VERBS[verb][0], lambda chosen: pytest.fail("it began"), ""))
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("elsewhere", ["--cache knowledge", "--served http://host:1", "--on ray"])
def test_a_teacher_may_be_elsewhere(elsewhere, monkeypatch):
    begun = []
    monkeypatch.setitem(cli.VERBS, "distill", (cli.VERBS["distill"][0], begun.append, ""))
    cli.main(["distill", "--teacher", "runs/elsewhere", "--student", "fcos:resnet18", *elsewhere.split()])
    assert len(begun) == 1


def test_a_terminal_is_told_that_torch_is_loaded(monkeypatch):
    """Its import takes seconds, and much longer on a busy machine; the line is gone afterwards."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(starting.importlib, "import_module", lambda name: None)
    for name in ("torch", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    starting.load_torch("compare")
    assert terminal.getvalue() == ""
    starting.load_torch("eval")
    assert terminal.getvalue() == "loading PyTorch ...\r\x1b[K"


# ------------------------------------------------------------------------------------------------ what people may type


@pytest.mark.parametrize("line", ["--lr 0.1", "--lr=0.1", "lr=0.1", "--lr 1e-1"])
def test_values_may_be_written_in_four_ways(parse, line):
    assert parse(DISTILL + line)["lr"] == 0.1


def test_short_forms(parse):
    assert parse(DISTILL + "--seeds 0,1,2")["seeds"] == (0, 1, 2)
    assert parse(DISTILL + "seeds=4")["seeds"] == (4,)
    assert parse(DISTILL + "--seeds 0-2,7")["seeds"] == (0, 1, 2, 7)
    assert parse(DISTILL + "--baseline --jobs 2")["baseline"] is True
    assert parse(DISTILL + "--baseline false")["baseline"] is False
    assert parse(DISTILL)["baseline"] is False
    assert parse(DISTILL + "--score-teacher false")["score_teacher"] is False
    assert parse(DISTILL + "--scale_jitter 0.5,1.5")["scale_jitter"] == (0.5, 1.5)
    assert parse(DISTILL + "--scale_jitter none --max-size none --out none") | {"x": 1} == parse(DISTILL) | {"x": 1}
    assert parse(DISTILL + "--precision 32")["precision"] == "32"
    assert parse(DISTILL + "--out runs/a")["out"] == Path("runs/a")
    assert parse(DISTILL + "--method fgd,temperature=0.8+pkd")["method"] == "fgd,temperature=0.8+pkd"
    assert parse("compare a b --allow-unequal")["runs"] == ["a", "b"]
    given = {"runs": ["a", "b"], "metric": "AP", "allow_unequal": True, "data": None, "out": None}
    assert parse("compare --allow_unequal a b") == given
    assert parse("data inspect folder --deep")["deep"] is True
    assert parse("demo --seeds 0,1")["seeds"] == (0, 1)
    assert parse("train --model m --role teacher")["role"] == "teacher"


def test_names_of_other_tools(parse):
    for line in ("distill distill_model=t student=s dis=2", "distill --distill-model t --student s --dis 2"):
        chosen = parse(line)
        assert (chosen["teacher"], chosen["student"], chosen["distill_weight"]) == ("t", "s", 2.0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_says_what_it_says(parse, recipe):
    chosen = parse(f"{DISTILL} --recipe {recipe.stem}")
    written = yaml.safe_load(recipe.read_text())
    assert written["method"].split(",")[0] == recipe.stem.split("-")[0]
    listed = {key: tuple(value) if isinstance(value, list) else value for key, value in written.items()}
    assert {key: chosen[key] for key in written} == listed
    assert recipe.read_text().startswith("# ")


def test_what_is_typed_wins_over_files_wherever_it_stands(parse, tmp_path):
    assert parse(f"{DISTILL} --epochs 3 --recipe pkd")["epochs"] == 3
    assert parse(f"{DISTILL} --recipe pkd --epochs 3")["epochs"] == 3
    config = tmp_path / "config.yaml"
    config.write_text("teacher: a\nstudent: b\nlr: 1e-3\nseeds: [0, 1]\nscale_jitter: [0.5, 1.5]\nepochs: 7\n")
    chosen = parse(f"distill --teacher c --config {config}")
    assert (chosen["teacher"], chosen["student"], chosen["lr"]) == ("c", "b", 1e-3)
    assert (chosen["seeds"], chosen["scale_jitter"], chosen["epochs"]) == ((0, 1), (0.5, 1.5), 7)
    assert parse(f"distill --recipe pkd --config {config}")["epochs"] == 7


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distil", "detdistill: no command 'distil' (did you mean 'distill'?); commands: demo, train"),
        ("validate --model m", "detdistill: no command 'validate' (did you mean 'eval'?)"),
        ("data inspct x", "detdistill: no command 'data inspct' (did you mean 'data inspect'?)"),
        ("data", "detdistill: no command 'data'"),
        ("distill --techer t", "detdistill distill: no flag or key 'techer' (did you mean 'teacher'?)"),
        ("distill --teacher t", "detdistill distill: missing, but required: student"),
        (DISTILL + "--batch-size 4", "detdistill distill: no flag or key 'batch_size' (did you mean 'batch'?)"),
        (DISTILL + "--imgsz 640", "detdistill distill: no flag or key 'imgsz' (did you mean 'size'?)"),
        (DISTILL + "--lr0 0.01", "detdistill distill: no flag or key 'lr0' (did you mean 'lr'?)"),
        ("predict --conf 0.5", "detdistill predict: no flag or key 'conf' (did you mean 'score'?)"),
        ("export --half true", "detdistill export: no flag or key 'half'; "),
        ("eval --weights x", "detdistill eval: no flag or key 'weights' (did you mean 'model'?)"),
        (
            DISTILL + "--device cuda:0",
            "detdistill distill: device: 'cuda:0' is not one of auto, cpu, cuda (did you mean 'cuda'? the",
        ),
        ("eval runs/teacher", "detdistill eval: 'runs/teacher' stands without a flag (did you mean --model runs/teacher?)"),
        ("data inspect --data imgs", "detdistill data inspect: data is given without --data; write `detdistill data"),
        ("train --model x --weights y.pt", "detdistill train: no flag or key 'weights' (did you mean 'init'?)"),
        (DISTILL + "--epohs 3", "detdistill distill: no flag or key 'epohs' (did you mean 'epochs'?)"),
        (DISTILL + "epohs=3", "detdistill distill: no flag or key 'epohs' (did you mean 'epochs'?)"),
        (DISTILL + "--epochs three", "detdistill distill: epochs: 'three' is not a whole number"),
        (DISTILL + "--epochs 2.5", "detdistill distill: epochs: '2.5' is not a whole number"),
        (DISTILL + "--epochs", "detdistill distill: argument --epochs: expected one argument"),
        (DISTILL + "--lr fast", "detdistill distill: lr: 'fast' is not a number"),
        (DISTILL + "--dis nan", "detdistill distill: distill_weight: 'nan' is not a number"),
        (DISTILL + "--baseline maybe", "detdistill distill: baseline: 'maybe' is not true or false"),
        (DISTILL + "--seeds 0,x", "detdistill distill: seeds: 'x' is not a whole number"),
        (DISTILL + "--seeds 2-0", "detdistill distill: seeds: '2-0' is not a whole number"),
        (DISTILL + "--optimizer adam", "detdistill distill: optimizer: 'adam' is not one of adamw, sgd (did you mean 'adamw'?)"),
        (DISTILL + "--track wandbb", "detdistill distill: track: 'wandbb' is not one of wandb, mlflow (did you mean 'wandb'?)"),
        (DISTILL + "--recipe pdk", "detdistill: no recipe 'pdk' (did you mean 'pkd'?); recipes: "),
        (DISTILL + "--recipe", "detdistill: recipe: needs a name; recipes: "),
        (
            "train --model m --role techer",
            "detdistill train: role: 'techer' is not one of train, teacher, baseline (did you mean",
        ),
        (
            "eval --model m --resize leterbox",
            "detdistill eval: resize: 'leterbox' is not one of letterbox, stretch, short_side, or none (did you mean",
        ),
        (DISTILL + "--steps many", "detdistill distill: steps: 'many' is not a whole number or none"),
        (DISTILL + "--scale_jitter 1", "detdistill distill: scale_jitter: '1' is not two numbers or none"),
        ("eval --model m --split vall", "detdistill eval: split: 'vall' is not one of val, test, train (did you mean 'val'?)"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(capsys, line, expected):
    assert refused(capsys, line).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("epohs: 3\n", "no key 'epohs' (did you mean 'epochs'?)"),
        ("off: features\n", "no key False"),
        ("epochs: [3\n", "is not valid YAML: while parsing a flow sequence"),
        ("- 1\n", "holds no settings; write lines such as `epochs: 12`"),
        ("", "holds no settings"),
        (None, "No such file or directory"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(capsys, tmp_path, content, expected):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    line = refused(capsys, f"{DISTILL} --config {path}")
    assert "mine.yaml" in line
    assert expected in line


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    def broken(chosen):
        raise KeyError("a bug")

    describe, _, summary = cli.VERBS["recipes"]
    monkeypatch.setitem(cli.VERBS, "recipes", (describe, broken, summary))
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["recipes"])


def test_a_full_disk_and_an_interruption_are_no_bugs(monkeypatch, capsys):
    def full(chosen):
        raise OSError(28, "No space left on device", "runs/a/metrics.csv")

    def interrupted(chosen):
        raise KeyboardInterrupt

    describe, _, summary = cli.VERBS["recipes"]
    monkeypatch.setitem(cli.VERBS, "recipes", (describe, full, summary))
    expected = "detdistill: cannot write runs/a/metrics.csv: No space left on device; make space or write elsewhere"
    assert refused(capsys, "recipes") == expected
    monkeypatch.setitem(cli.VERBS, "recipes", (describe, interrupted, summary))
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes"])
    assert ended.value.code == 130


def test_a_pipe_that_closes_early_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m detdistill --help | head -1"
    done = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: detdistill COMMAND")
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------- listings


def test_listings_show_every_file(capsys, monkeypatch):
    def names(verb, *more):
        cli.main([verb, "--json", *more])
        return [entry["name"] for entry in json.loads(capsys.readouterr().out)[verb]]

    package = Path(detdistill.__file__).parent
    assert names("recipes") == [recipe.stem for recipe in RECIPES]
    methods = [path.stem for path in (package / "methods").glob("*.py") if path.stem != "__init__"]
    methods += [path.parent.name for path in (package / "methods").glob("*/method.py")]
    assert len(methods) >= 11
    assert names("methods") == sorted(methods)
    monkeypatch.setattr(probe, "probe_adapter", lambda name, export: probe.Probed(name, "not tried"))
    detectors = names("detectors", "--probe", "true")
    assert set(detectors) >= {"fcos", "retinanet", "faster_rcnn", "mask_rcnn", "ssd", "ssdlite", "torchvision"}


def test_methods_say_whether_they_serve_a_pair(capsys):
    model = "resnet10t,channels=16-16-16-16,stem=8,neck=32"

    def answers(student, teacher):
        cli.main(["methods", "--json", "--student", student, "--teacher", teacher])
        found = json.loads(capsys.readouterr().out)
        assert (found["student"], found["teacher"]) == (student, teacher)
        return {method["name"]: (method["serves"], method["reason"]) for method in found["methods"]}

    equal = answers(f"fcos:{model},levels=3-4,convs=1", f"fcos:{model},levels=3-4")
    assert equal["pkd"] == equal["unikd"] == (True, None)
    refused_ones = {method for method, (serves, _) in equal.items() if not serves}
    assert {"d3etr", "detrdistill", "kd_detr"} <= refused_ones  # they distil queries
    assert not refused_ones & {"pkd", "fgd", "mgd", "cwd", "fkd", "fitnet", "unikd"}
    assert "quer" in equal["kd_detr"][1]
    serves, reason = answers(f"fcos:{model},levels=3-4", f"fcos:{model},levels=5-6")["pkd"]
    assert not serves
    assert reason.startswith("no common level: student fcos:resnet10t")


def test_cite_prints_the_bibtex_of_each(capsys):
    cli.main(["cite", "fgd,temperature=0.8+pkd"])
    text = capsys.readouterr().out
    assert text.count("@inproceedings{") == 2
    assert text.index("yang2022fgd") < text.index("cao2022pkd")
    assert refused(capsys, "cite pdk").startswith("detdistill: no method 'pdk' (did you mean 'pkd'?)")


def test_assumptions_are_notes_of_one_line(capsys, monkeypatch):
    def listing(**given):
        warnings.warn("x: assumed y", DetdistillWarning, stacklevel=1)
        warnings.warn("of somebody else", UserWarning, stacklevel=1)
        return []

    monkeypatch.setattr("detdistill.listing.list_recipes", listing)
    with pytest.warns(UserWarning, match="of somebody else"):
        cli.main(["recipes", "--json"])
    assert "note: x: assumed y\n" in capsys.readouterr().err
