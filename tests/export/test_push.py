"""``detdistill push``, against a stand-in for the hub."""

import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest

from detdistill import api, cli
from detdistill.detectors.build import build_detector
from detdistill.detectors.save import save_student
from detdistill.errors import RunError

MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(build_detector(MODEL, ("a", "b")), tmp_path_factory.mktemp("run") / "student")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder."""

    class Hub:
        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            (tmp_path / "hub" / "me" / name.rpartition("/")[2]).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=f"me/{name.rpartition('/')[2]}", private=private)

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            def left_out(folder, names):
                return [name for name in names if allow_patterns and not any(fnmatch(name, one) for one in allow_patterns)]

            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, ignore=left_out, dirs_exist_ok=True)
            return f"hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return tmp_path / "hub" / "me"


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("inside", ["", "student"])
def test_a_student(student, hub, capsys, inside):
    cli.main(["push", "--model", str(student.parent / inside), "--to", "hub:tiny"])
    assert capsys.readouterr().out == "uploaded to hub/me/tiny/commit/1\n"
    assert names(hub / "tiny") == names(student)


def test_an_exported_file(tmp_path, hub):
    for name in ("model.onnx", "other.onnx", "export.json", "README.md", "private.txt"):
        (tmp_path / name).write_text(name)
    api.push(tmp_path / "model.onnx", "hub:me/tiny")
    assert names(hub / "tiny") == {"model.onnx", "export.json", "README.md"}


def test_a_damaged_student_is_not_uploaded(student, hub, tmp_path):
    copy = shutil.copytree(student, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"model.safetensors differs from its checksum"):
        api.push(copy, "hub:tiny")
    assert not hub.exists()


@pytest.mark.parametrize(
    ("model", "to", "expected"),
    [
        ("student", "tiny", "'tiny' must be hub:NAME or hub:OWNER/NAME"),
        ("student", "hub:a/b/c", "must be hub:NAME"),
        ("nothing", "hub:tiny", "no student in .*nothing"),
        ("student/model.safetensors", "hub:tiny", "is no exported file"),
    ],
)
def test_bad_input(student, hub, model, to, expected):
    with pytest.raises(RunError, match=expected):
        api.push(student.parent / model, to)


def test_without_network(student, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set; unset it to upload"):
        api.push(student, "hub:me/tiny")


def test_without_a_token(student, monkeypatch):
    class Hub:
        def create_repo(self, *arguments, **settings):
            error = RuntimeError("401 Client Error")
            error.response = SimpleNamespace(status_code=401)
            raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(RunError, match="no valid token; run `hf auth login`, or set HF_TOKEN"):
        api.push(student, "hub:tiny")
