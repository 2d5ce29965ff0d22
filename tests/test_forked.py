import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture(params=["forked", "new"])
def python(request):
    """Starts Python in both ways: a fork must do what a new interpreter does."""
    if request.param == "forked":
        request.getfixturevalue("forked_python")
    return lambda *words, **settings: subprocess.run([sys.executable, *words], capture_output=True, text=True, **settings)


CODE = """
import os, signal, sys, warnings
warnings.warn("of the code", UserWarning)
print(__name__, sys.argv, os.getcwd(), os.environ.get("MINE"), "TOKEN" in os.environ, sys.stdin.read())
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
sys.exit({end})
"""


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [("", 0, None), ("3", 3, None), ("'why'", 1, "why"), ("1 / 0", 1, "ZeroDivisionError: division by zero")],
)
def test_a_fork_has_its_own_arguments_environment_streams_and_exit_code(python, tmp_path, monkeypatch, end, code, last):
    monkeypatch.setenv("TOKEN", "x")
    environment = {name: value for name, value in os.environ.items() if name != "TOKEN"} | {"MINE": "1"}
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    done = python("-c", CODE.replace("{end}", end), "a", "b", cwd=tmp_path, env=environment, input="typed")
    signal.signal(signal.SIGTERM, before)
    assert done.stdout.splitlines() == [f"__main__ ['-c', 'a', 'b'] {tmp_path} 1 False typed", "True"]
    said = done.stderr.splitlines()
    assert said[0].endswith("UserWarning: of the code")
    assert said[-1].endswith(last or "UserWarning: of the code")
    assert done.returncode == code


def test_scripts_and_modules(python, tmp_path):
    (tmp_path / "beside.py").write_text("value = 7")
    (tmp_path / "mine.py").write_text(
        "import sys, beside, __main__\nprint(__name__, sys.argv[1:], beside.value, __main__.beside.value)"
    )
    assert python(tmp_path / "mine.py", "x").stdout == "__main__ ['x'] 7 7\n"
    assert python("-m", "mine", "x", cwd=tmp_path).stdout == "__main__ ['x'] 7 7\n"


def test_a_fork_can_be_killed_and_is_waited_for(forked_python):
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"on\n"
    began = time.monotonic()
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    assert time.monotonic() - began < 5
