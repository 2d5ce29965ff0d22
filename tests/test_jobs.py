"""Commands in processes of their own: on this machine, and on a Ray cluster of two CPUs that the tests start."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from torch import Tensor

from detdistill import api, cli
from detdistill.api import training as api_training
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.errors import DetdistillError, RunError, StoppedError
from detdistill.jobs import on_node, on_ray
from detdistill.jobs.contract import Job
from detdistill.jobs.on_node import Order, work
from detdistill.jobs.together import run_together
from detdistill.jobs.versions import versions_of_all
from detdistill.jobs.where import runner_on
from detdistill.processes import ATTEMPT
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.structures import map_tensors
from tests.training import small

SECRET = "a-password-of-a-store"
BAD = "detdistill: epochs: 0 is not a whole number, 1 or more"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A cluster of two CPUs on this machine; yields the folder of its logs."""
    before = dict(os.environ)
    ray = on_ray.import_ray("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    folder, port = tempfile.mkdtemp(prefix="ray-", dir="/tmp"), free_port()  # Ray's sockets need a short path
    os.environ["RAY_TMPDIR"] = folder  # Ray notes the cluster's address below it, in a folder that it does not make
    (Path(folder) / "ray").mkdir()
    head = {"num_cpus": 2, "include_dashboard": False, "temp_dir": folder, "ray_client_server_port": port}
    made = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = made.address
    os.environ["RAY_CLIENT_OF_TEST"] = f"ray://127.0.0.1:{port}"
    try:
        yield Path(folder)
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def connected(cluster: Path) -> None:
    """A connection that is open already, as in a notebook; it stays open for the next test."""
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="CRITICAL")


@pytest.fixture
def unconnected() -> None:
    """No connection is open, as in a new process."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / "teacher"
    small.train(folder, role="teacher", epochs=1, seed=5)
    return folder


class Noted:
    """Writes down how a job ended."""

    def __init__(self, index: int, ends: dict[int, tuple[int, str]]) -> None:
        self.index, self.ends = index, ends

    def look(self) -> None:
        pass

    def ended(self, code: int, line: str) -> None:
        self.ends[self.index] = (code, line)


def ends_of(jobs: list[Job], on: str, say: Callable[[str], None] = print) -> list[tuple[int, str]]:
    ends: dict[int, tuple[int, str]] = {}
    with runner_on(on, say) as runner:
        run_together(jobs, runner, runner.at_once(2), lambda index: Noted(index, ends))
    return [ends[index] for index in range(len(jobs))]


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"^on: ray needs the package ray: pip install 'detdistill\[ray\]'$"):
        ends_of([Job("one", "recipes")], "ray")


@pytest.mark.parametrize(
    ("on", "address", "expected"),
    [
        (
            "ray://127.0.0.1:1",
            None,
            r"^on: no Ray cluster answers at ray://127.0.0.1:1 \(Connection refused\); `ray status` there",
        ),
        ("ray", "127.0.0.1:1", r"^on: no Ray cluster answers at 127.0.0.1:1 \(Connection refused\); `ray status` there says"),
        (
            "ray",
            None,
            r"^on: no Ray cluster runs on this machine; start one with `ray start --head`, or give --on ray://HOST:10001",
        ),
        ("ray", "silent", r"^on: what answers at 127.0.0.1:\d+ is no Ray cluster, or a broken one; RAY_ADDRESS is HOST:6379 or"),
    ],
)
def test_there_is_no_cluster(
    unconnected: None, on: str, address: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(on_ray, "HEALTHY", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        known = f"127.0.0.1:{silent.getsockname()[1]}" if address == "silent" else address
        monkeypatch.setenv("RAY_ADDRESS", known) if known else monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(RunError, match=expected):
            ends_of([Job("one", "recipes")], on)


@pytest.mark.parametrize("on", ["local", "ray", "ray://"])
def test_a_job_gives_its_exit_code_and_its_last_line(unconnected: None, on: str, cluster: Path):
    jobs = [
        Job("one", "recipes", {"json": True}),
        Job("two", "train", {"model": "fcos:resnet18", "epochs": 0}),
        Job("three", "recipes", words=("--json=true",)),
        Job("four", "--version"),
    ]
    found = ends_of(jobs, os.environ["RAY_CLIENT_OF_TEST"] if on == "ray://" else on)
    assert found == [(0, "}"), (2, BAD), (0, "}"), (0, f"detdistill {versions_of_all()['detdistill']}")]


def test_nodes_with_other_versions_are_refused(unconnected: None, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(os.environ["RAY_ADDRESS"])  # as `ray start` notes it
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(on_ray, "versions_of_all", lambda: {"torch": "0.4.1"})
    ((code, line),) = ends_of([Job("one", "recipes")], "ray")
    assert code == 2
    assert line.startswith("node ")
    assert line.endswith(
        f" has torch {versions_of_all()['torch']}, but this machine has 0.4.1; install the same versions on all nodes"
    )


def test_below_uv_run_the_working_folder_is_not_sent(cluster: Path, tmp_path: Path):
    """Ray looks for a process ``uv run`` above its own, whose working folder it would pack, send and install on the nodes."""
    asks = (
        "from detdistill.jobs.contract import Job; from detdistill.jobs.where import runner_on\n"
        "with runner_on('ray', print) as runner:\n"
        "    job = runner.start(Job('one', 'recipes'))\n"
        "    while job.poll() is None: pass\n"
        "    print('ended with', job.poll())\n"
    )
    (tmp_path / "asks.py").write_text(asks)
    (tmp_path / "run").write_text(f"{sys.executable} asks.py\n")  # bash, under the name of uv, runs the script "run"
    found = subprocess.run(
        ["uv", "run"], executable=shutil.which("bash"), cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert (found.returncode, found.stdout) == (0, "ended with 0\n"), found.stderr
    assert [path for path in cluster.rglob("working_dir_files/*") if path.is_dir()] == []


def test_passwords_are_in_no_log_of_ray(connected: None, cluster: Path):
    assert ends_of([Job("one", "train", {"model": "fcos:resnet18", "epochs": 0, "data": f"s3://key:{SECRET}@store/data"})], "ray")
    texts = {path: path.read_bytes() for path in cluster.rglob("*") if path.is_file() and path.stat().st_size < 10_000_000}
    assert any(b"detdistill" in text or b"raylet" in text for text in texts.values())
    assert [path for path, text in texts.items() if SECRET.encode() in text] == []


def _processes_with(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, status = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
            except OSError:
                continue
            if word.encode() in command and status.rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
    return found


def _wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("on", ["local", "ray"])
def test_a_signal_leaves_no_job(unconnected: None, on: str, cluster: Path, tmp_path: Path):
    class Stops(Noted):
        def look(self) -> None:
            if _processes_with(str(tmp_path / "long")):
                os.kill(os.getpid(), signal.SIGTERM)

    job = Job("long", "train", {"model": small.MODEL, **small.SETTINGS}, words=(f"--out={tmp_path / 'long'}", "--epochs=1000"))
    with pytest.raises(StoppedError, match="stopped by SIGTERM; --resume true continues"), runner_on(on, print) as runner:
        run_together([job, job], runner, 1, lambda index: Stops(index, {}))
    _wait_for(lambda: not _processes_with(str(tmp_path / "long")), 10)


@pytest.mark.slow
def test_a_run_goes_on_when_its_worker_was_killed_and_gives_the_same(
    connected: None, teacher: Path, tmp_path: Path, capfd, monkeypatch
):
    settings: dict[str, Any] = {"seeds": (1,), "epochs": 3, "method": "pkd"}
    folder, killed = tmp_path / "ray" / "distilled-seed1", []

    def kill() -> None:
        _wait_for(lambda: (folder / "checkpoints" / "last.ckpt").exists())
        run = json.loads((folder / "run.lock").read_text())["pid"]
        worker = int(Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[1])
        assert b"ray::detdistill distilled, seed 1" in Path(f"/proc/{worker}/cmdline").read_bytes()
        killed.append(worker)
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with (tmp_path / "said").open("w") as file:
        done = small.distill(teacher, tmp_path / "ray", console=Console(file=file, width=200), on="ray", **settings)
    killer.join()
    said = (tmp_path / "said").read_text()
    assert len(killed) == 1
    assert said.count("its worker was lost") == 1
    assert "distilled, seed 1: its worker was lost (WorkerCrashedError); started again, 1 of 3" in said
    assert "raylet" not in capfd.readouterr().err
    small.distill(teacher, tmp_path / "here", **settings)
    for run in done.runs:
        assert small.unequal_runs(run, tmp_path / "here" / run.name) == []
    # Nothing is run twice.
    monkeypatch.setattr(on_ray.RayRunner, "start", lambda *_: pytest.fail("a finished run was started"))
    small.distill(teacher, tmp_path / "ray", on="ray", resume=True, **settings)


def test_a_single_run_takes_place_on_ray_too(connected: None, teacher: Path, tmp_path: Path):
    done = small.distill(teacher, tmp_path / "run", on="ray", method="pkd", epochs=1)
    assert done.runs == (tmp_path / "run",)
    assert (tmp_path / "run" / "summary.json").exists()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["on"], config["resume"]) == ("local", False)


def tensors_of(knowledge: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for piece in knowledge:
        map_tensors(piece, lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.slow
def test_a_cache_is_filled_by_writers_on_ray(connected: None, teacher: Path, tmp_path: Path):
    common = {"size": 64, "batch": 4, "device": "cpu", "store": "float32", "probe": 1, "stages": str(tmp_path / "stages")}
    with Progress(quiet=True) as progress:
        here = api.cache(teacher, tmp_path / "here", small.DATA, progress=progress, **common)
        there = api.cache(teacher, tmp_path / "there", small.DATA, progress=progress, on="ray", devices=2, **common)
    assert (there.records, there.complete) == (here.records, True) == (48, True)
    one, two = KnowledgeCache.open(here.folder), KnowledgeCache.open(there.folder)
    assert sorted(one.index.places) == sorted(two.index.places)
    for key in one.index.places:
        assert len(tensors_of(one.read(key))) >= 2
        assert small.differences(tensors_of(one.read(key)), tensors_of(two.read(key))) == []
    writers = {path.name[:8] for path in (tmp_path / "there" / "shards").glob("*.safetensors")}
    assert writers == {"000of002", "001of002"}


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (lambda order: os.kill(os.getpid(), signal.SIGKILL), "WorkerCrashedError"),
        (lambda order: (-9, ""), "its process was killed"),  # by the kernel, when the memory of the node is full
    ],
)
def test_a_job_that_loses_every_worker_is_given_up(connected: None, monkeypatch: pytest.MonkeyPatch, ends: Any, reason: str):
    said: list[str] = []
    monkeypatch.setattr(on_ray, "work", types.FunctionType(ends.__code__, {"os": os, "signal": signal}))  # sent as it is
    with pytest.raises(RunError, match=rf"^one: its worker was lost 4 times \({reason}\); --resume true continues"):
        ends_of([Job("one", "recipes")], "ray", said.append)
    assert said == [f"one: its worker was lost ({reason}); started again, {n} of 3" for n in (1, 2, 3)]


def test_tasks_of_benchmarks_wait_for_each_other_on_ray(connected: None, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    runs = importlib.import_module("_runs")
    first, bad, after_first, after_bad = (tmp_path / name for name in ("first", "bad", "after_first", "after_bad"))
    tasks = [
        runs.Task(after_bad, ("recipes",), after=(bad,)),
        runs.Task(after_first, ("recipes",), after=(first,)),
        runs.Task(first, ("recipes",)),
        runs.Task(bad, ("train", "--model", "fcos:resnet18", "--epochs", "0")),
    ]
    noted: list[int] = []
    runs.run(tasks, 1, tmp_path, lambda: noted.append(1), "ray")
    said = [line.split(" ", 1)[1].rpartition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(said) == ["after_first: done", f"bad: FAILED: {BAD}", "first: done"]
    assert said.index("first: done") < said.index("after_first: done")
    assert len(noted) == 3


def test_a_cluster_too_small_for_a_run_is_refused_before_anything_starts(connected: None, teacher: Path, tmp_path: Path):
    expected = (
        r"^on: distilled, seed 0 needs 3 CPUs on one node, but the largest node of the Ray cluster has 2 CPUs; give smaller"
    )
    with pytest.raises(RunError, match=expected):
        small.distill(teacher, tmp_path / "run", seeds=(0,), devices=3, on="ray", method="pkd")
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        RunError, match="needs 2 CPUs and 2 GPUs on one node, but the largest node of the Ray cluster has 2 CPUs;"
    ):
        small.distill(teacher, tmp_path / "run", seeds=(0,), devices=2, device="cuda", on="ray", method="pkd")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"on": "rya"}, "on: 'rya' is not local, ray or ray://HOST:PORT (did you mean 'ray'?)"),
        ({"on": "ray://host"}, "on: 'ray://host' is not local, ray or ray://HOST:PORT"),
        ({"on": "slurm"}, "on: 'slurm' is not local, ray or ray://HOST:PORT"),
        (
            {"on": "ray", "nodes": 2},
            "nodes: on Ray, a run has the devices of one node; leave out --nodes, or start it with torchrun or srun",
        ),
    ],
)
def test_where_runs_cannot_take_place(given: dict[str, Any], expected: str):
    with pytest.raises(RunError) as caught:
        DistillSettings(**given)
    assert str(caught.value) == expected


@pytest.mark.parametrize("text", ["on: ray://host:10001\n", "'on': ray://host:10001\n", "on: ray://host:10001\nepochs: 3\n"])
def test_the_word_on_in_a_settings_file(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(api, "schedules", lambda **settings: given.update(settings) or pytest.skip("parsed"))
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(pytest.skip.Exception):
        cli.main(["schedules", "--student", "fcos:resnet18", "--teacher", "x", "--config", str(tmp_path / "settings.yaml")])
    assert given["on"] == "ray://host:10001"


def test_a_writer_that_replaces_a_lost_one_has_a_name_of_its_own(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ATTEMPT, "2")
    with Progress(quiet=True) as progress:
        wanted = {"size": 64, "device": "cpu", "store": "float32", "probe": 1, "flip": 0.0, "stages": str(tmp_path / "stages")}
        assert api.cache(teacher, tmp_path / "cache", small.DATA, progress=progress, **wanted).complete
    assert {path.name[:14] for path in (tmp_path / "cache" / "shards").iterdir()} == {"000of001again2"}


def order(**changes: Any) -> Order:
    plain = {"verb": "recipes", "config": "", "words": (), "environment": {}, "cwd": str(Path.cwd()), "folder": None}
    return Order(**{**plain, "attempt": 0, "versions": versions_of_all(), **changes})


def test_a_node_without_the_working_folder_says_what_must_be_shared(tmp_path: Path):
    code, line = work(order(cwd=str(tmp_path / "gone")))
    assert code == 2
    assert (
        f"has no folder {tmp_path / 'gone'}; with --on ray, the working folder, --data and --out must be on a disk that" in line
    )


@pytest.mark.parametrize(("attempt", "begun", "resumes"), [(0, True, False), (1, True, True), (1, False, False)])
def test_only_a_run_that_has_begun_and_lost_its_worker_is_resumed(
    attempt: int, begun: bool, resumes: bool, tmp_path, monkeypatch
):
    started: list[Any] = []

    class Instead:
        def __init__(self, verb: str, config: str, words: list[str], environment: dict[str, str], *rest: Any) -> None:
            started.append((words, environment))

        def poll(self) -> int:
            return 0

        def kill(self) -> None:
            pass

        def last_line(self) -> str:
            return ""

    monkeypatch.setattr(on_node, "Child", Instead)
    if begun:
        (tmp_path / "config.yaml").touch()
    work(order(folder=str(tmp_path), attempt=attempt))
    assert started == [(["--resume=true"] if resumes else [], {ATTEMPT: "1"} if attempt else {})]


def test_a_run_that_is_started_again_waits_for_the_lock_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small.train(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "summary.json").unlink()
    holds = (
        "import sys, time; from pathlib import Path; from detdistill.training.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(1.5)"
    )
    with subprocess.Popen([sys.executable, "-c", holds, tmp_path / "run"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="is in use by process"):
            small.train(tmp_path / "run", epochs=1, resume=True)
        monkeypatch.setenv(ATTEMPT, "1")
        small.train(tmp_path / "run", epochs=1, resume=True)
    assert (tmp_path / "run" / "summary.json").exists()


def test_one_variant_does_not_cost_the_others(teacher: Path, tmp_path: Path, forked_python: None):
    common = {**small.SETTINGS, "steps": 3, "seeds": (0,), "jobs": 2, "score_teacher": False, "stages": str(tmp_path / "stages")}
    variants = {
        "misspelt": {**common, "method": "pdk", "out": tmp_path / "misspelt"},
        "broken": {**common, "method": "pkd", "lr": 1e30, "clip": 0.0, "out": tmp_path / "broken"},
        "good": {**common, "method": "pkd", "out": tmp_path / "good"},
    }
    said: dict[str, str] = {}
    with Progress(quiet=True) as progress:
        done = api_training.distill_each(
            str(teacher), small.MODEL, small.DATA, variants, progress=progress,
            failed=lambda name, error: said.update({name: str(error)}),
        )  # fmt: skip
        with pytest.raises(DetdistillError, match="pdk"):
            api_training.distill_each(str(teacher), small.MODEL, small.DATA, variants, progress=progress)
    assert list(done) == ["good"]
    assert done["good"].runs == (tmp_path / "good" / "distilled-seed0",)
    assert list(said) == ["misspelt", "broken"]
    assert "(did you mean 'pkd'?)" in said["misspelt"]
    assert said["broken"].startswith("broken: distilled, seed 0 failed: detdistill: ")


def test_trials_and_lengths_side_by_side_give_the_same_as_one_by_one(teacher: Path, tmp_path: Path, forked_python: None):
    common = {**small.SETTINGS, "epochs": None, "steps": 1}
    del common["epochs"]
    with Progress(quiet=True) as progress:
        found = [
            api.find(
                str(teacher), small.MODEL, small.DATA, over=("lr",), trials=3, at_once=2, jobs=jobs,
                out=tmp_path / f"find{jobs}", progress=progress, **common,
            )
            for jobs in (1, 2)
        ]  # fmt: skip
        assert [(one.values, one.ap, one.alone) for one in found[0].tried] == [
            (one.values, one.ap, one.alone) for one in found[1].tried
        ]
        assert (found[1].at_once, found[1].best) == (2, found[0].best)
        with pytest.raises(
            DetdistillError, match=r"^cannot resume .*find2: at_once was 2 and is now 1; use the same, or a new --out"
        ):
            api.find(
                str(teacher), small.MODEL, small.DATA, over=("lr",), trials=3, out=tmp_path / "find2", resume=True,
                progress=progress, **common,
            )  # fmt: skip
        lengths = [
            api.schedules(
                str(teacher), small.MODEL, small.DATA, at=(1, 2), jobs=jobs, out=tmp_path / f"lengths{jobs}", progress=progress,
                **{**common, "score_teacher": False},
            )
            for jobs in (1, 2)
        ]  # fmt: skip
    assert [one.gain.pairs for one in lengths[0].found] == [one.gain.pairs for one in lengths[1].found]
    for run in ("1x/baseline-seed0", "1x/distilled-seed0", "2x/baseline-seed0", "2x/distilled-seed0"):
        assert small.unequal_runs(tmp_path / "lengths1" / run, tmp_path / "lengths2" / run) == []
