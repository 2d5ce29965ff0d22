"""Workers of a distributed run do this run alone."""

import os
import subprocess
import sys

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

from detdistill.cache.storage import SECRET_URL
from detdistill.processes import PARENT
from detdistill.settings import DistillSettings
from detdistill.training.plan import Plan
from detdistill.training.workers import workers_run
from tests.training import small


def test_the_command_of_workers(tmp_path):
    before = sys.argv
    plan = Plan(small.MODEL, small.DATA, DistillSettings(cache="memory://me:SECRET@host/x"), role="distilled")
    with workers_run(tmp_path, plan):
        python, flag, module, *words = _basic_subprocess_cmd()
    assert (python, flag, module) == (sys.executable, "-m", "detdistill.__main__")
    assert words == ["distill", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path), "--resume", "false"]
    assert sys.argv is before
    assert not {PARENT, SECRET_URL} & set(os.environ), "other processes that are started here must not end with this one"
    assert "SECRET" not in " ".join(words)


@pytest.mark.slow
def test_two_calls_in_a_script_of_which_one_has_two_processes(tmp_path, forked_python):
    script = tmp_path / "mine.py"
    few = {**small.SETTINGS, "report": False}
    script.write_text(
        "import detdistill\n"
        f"few, model, data = {few!r}, {small.MODEL!r}, {small.DATA!r}\n"
        "open('calls.txt', 'a').write('called ')\n"
        "detdistill.train(model, data, out='first', **few)\n"
        "detdistill.train(model, data, out='second', **{**few, 'devices': 2})\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls.txt").read_text() == "called "
    assert (tmp_path / "second" / "summary.json").exists()
