"""Faults of disks, processes and people: a file that is flipped, cut or swapped, a process that is killed, a full disk.

Few cases by default; ``DETDISTILL_FAULTS=100`` runs a hundred of each kind.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from detdistill.detectors.load import load_detector
from detdistill.errors import DetdistillError, ModelError, RunError
from detdistill.files import checksum, checksum_file, damage, replace_with_checksum
from detdistill.training.callbacks import Checkpoints
from tests.training import small

COUNT = int(os.environ.get("DETDISTILL_FAULTS", "6"))
DIGITS = [str(digit) for digit in range(10)]


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    """Cut the end off."""
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def swap_blocks(path: Path, chance: random.Random) -> None:
    """Exchange two blocks of 64 bytes with different content."""
    content = path.read_bytes()
    starts = range(0, len(content) - 64, 64)
    while True:
        first, second = sorted(chance.sample(starts, 2))
        one, two = content[first : first + 64], content[second : second + 64]
        if one != two:
            break
    path.write_bytes(content[:first] + two + content[first + 64 : second] + one + content[second + 64 :])


FAULTS: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, swap_blocks)


@pytest.fixture(scope="module")
def interrupted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with last.ckpt (step 9) and best.ckpt (step 6) that was killed."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    save = Checkpoints.save

    def dying(self: Any, trainer: Any, module: Any, name: str) -> None:
        save(self, trainer, module, name)
        if trainer.global_step == 9:
            small.die()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoints, "save", dying)
        assert small.killed(lambda: small.distill(teacher, folder, checkpoint_every=1)) == -9
    assert [small.checkpoint(folder, name)["global_step"] for name in ("last.ckpt", "best.ckpt")] == [9, 6]
    return folder


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run."""
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_not_resumed(fault: Callable[[Path, random.Random], None], run: Path, teacher: Path):
    path = run / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    for seed in range(COUNT):
        path.write_bytes(whole)
        fault(path, random.Random(seed))
        with pytest.raises(RunError) as caught:
            small.distill(teacher, run, checkpoint_every=1, resume=True)
        text = str(caught.value)
        assert text.startswith(f"cannot resume from {path}: it"), text
        assert text.endswith("delete it, then --resume true continues from best.ckpt (step 6), which is whole")


def test_an_older_checkpoint_has_the_checksums_of_its_zip_file(run: Path, teacher: Path):
    path = run / "checkpoints" / "last.ckpt"
    checksum_file(path).unlink()
    assert damage(path) == ""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "differs from its checksum" in damage(path) or "CRC" in damage(path)
    with pytest.raises(RunError, match=r"cannot resume from .*last.ckpt: .*best.ckpt \(step 6\)"):
        small.distill(teacher, run, checkpoint_every=1, resume=True)


def test_both_checkpoints_damaged_or_swapped(run: Path, teacher: Path):
    last, best = (run / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    contents = last.read_bytes(), best.read_bytes()
    last.write_bytes(contents[1])
    best.write_bytes(contents[0])
    with pytest.raises(RunError, match=r"cannot resume from .*last.ckpt: it.*there is no whole checkpoint beside it"):
        small.distill(teacher, run, checkpoint_every=1, resume=True)


def test_without_last_the_best_is_continued_and_the_end_is_the_same(run: Path, teacher: Path, tmp_path: Path):
    (run / "checkpoints" / "last.ckpt").unlink()
    console = Console(file=io.StringIO(), width=300)
    small.distill(teacher, run, console=console, checkpoint_every=1, resume=True)
    assert "continuing from best.ckpt" in console.file.getvalue()  # type: ignore[attr-defined]
    small.distill(teacher, tmp_path / "whole", checkpoint_every=1)
    assert small.unequal_runs(tmp_path / "whole", run) == []


def test_without_any_checkpoint_step_0_is_said(run: Path, teacher: Path):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    console = Console(file=io.StringIO(), width=300)
    small.distill(teacher, run, console=console, checkpoint_every=1, resume=True)
    assert "no checkpoint in" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "starting from step 0" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["model.safetensors", "student.json", "model.json", "checksums.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_teacher_is_not_used(fault: Any, name: str, teacher: Path, tmp_path: Path):
    shutil.copytree(teacher / "student", tmp_path / "student")
    path = tmp_path / "student" / name
    whole = path.read_bytes()
    if fault is swap_blocks and len(whole) < 200:
        pytest.skip("the file is too short")
    for seed in range(COUNT):
        path.write_bytes(whole)
        fault(path, random.Random(seed))
        with pytest.raises(ModelError, match=r"student: .*checksum"):
            load_detector(tmp_path / "student", DIGITS)
    path.write_bytes(whole)
    assert load_detector(tmp_path / "student", DIGITS).spec.classes == tuple(DIGITS)


def test_a_damaged_best_checkpoint_is_no_teacher(teacher: Path, tmp_path: Path):
    shutil.copytree(teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "checkpoints" / "best.ckpt"
    assert load_detector(path, DIGITS) is not None
    flip(path, random.Random(1))
    with pytest.raises(ModelError, match=r"best.ckpt: its content differs from the checksum in best.ckpt.crc32: it is damaged"):
        load_detector(path, DIGITS)


def test_checksums_at_every_moment_of_a_replacement(tmp_path: Path, monkeypatch):
    """Killed between any two renames, the file and its checksum still fit."""
    path = tmp_path / "last.ckpt"
    for moment in range(4):
        (tmp_path / "new").write_text("first")
        replace_with_checksum(tmp_path / "new", path)
        (tmp_path / "new").write_text(f"second {moment}")
        calls = []
        replace = os.replace

        def dying(source: Any, target: Any, calls: list[int] = calls, moment: int = moment, replace: Any = replace) -> None:
            if len(calls) == moment:
                raise KeyboardInterrupt
            calls.append(1)
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr("detdistill.files.os.replace", dying)
            if moment < 3:
                with pytest.raises(KeyboardInterrupt):
                    replace_with_checksum(tmp_path / "new", path)
            else:
                replace_with_checksum(tmp_path / "new", path)
        assert damage(path) == "", moment
        assert path.read_text() == ("first" if moment < 2 else f"second {moment}")
    assert checksum_file(path).read_text() == checksum(path) + "\n"


def test_the_standalone_script_compares_too(teacher: Path, tmp_path: Path):
    from detdistill.detectors.student_files import load_student

    shutil.copytree(teacher / "student", tmp_path / "student")
    assert load_student.load(tmp_path / "student") is not None
    flip(tmp_path / "student" / "model.safetensors", random.Random(2))
    with pytest.raises(ValueError, match=r"model.safetensors differs from its checksum in checksums.json"):
        load_student.load(tmp_path / "student")


def test_checksums_cost_little(tmp_path: Path):
    """50 MB in well under a tenth of a second: two hundredths of the seconds that a resumed run takes to load."""
    torch.save({"a": torch.randn(12_500_000)}, tmp_path / "new")
    replace_with_checksum(tmp_path / "new", tmp_path / "last.ckpt")
    started = time.perf_counter()
    assert damage(tmp_path / "last.ckpt") == ""
    assert time.perf_counter() - started < 1.0


def test_stage_results_are_compared(tmp_path: Path):
    from detdistill.cache.storage import LocalFolder
    from detdistill.methods.shared.contract import Stage
    from detdistill.training.stage_results import load_result, save_result

    layer = torch.nn.Linear(8, 8)
    stage = Stage("first", lambda *_: None, lambda clock: (layer,), layer, depends_on="x")  # type: ignore[arg-type, return-value]
    save_result(LocalFolder(tmp_path), "a.safetensors", stage)
    assert load_result(LocalFolder(tmp_path), "a.safetensors", stage)
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    before = layer.weight.clone()
    for seed in range(COUNT):
        path.write_bytes(whole)
        flip(path, random.Random(seed))
        with pytest.raises(DetdistillError, match=r"a.safetensors (is damaged|does not fit)"):
            load_result(LocalFolder(tmp_path), "a.safetensors", stage)
    assert torch.equal(layer.weight, before)
