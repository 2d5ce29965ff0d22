"""Several processes train like one with the same images; they begin together, and torchrun starts them again together."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from detdistill import api
from detdistill.errors import RunError
from detdistill.processes import is_main_process, local_rank, number_of_processes
from detdistill.progress import Progress
from detdistill.settings import DistillSettings, TrainSettings, effects
from detdistill.training import machine
from detdistill.training.folder import LAUNCH, after_restart, forget_launch
from detdistill.training.lock import locked
from tests.training import small
from tests.training.together import free_port, srun, together, torchrun

BACKBONE = "resnet10t,channels=8-8-16-16,stem=8"
MODELS = {
    "fcos": f"fcos:{BACKBONE},neck=32,levels=3-4,convs=1",
    "retinanet": f"retinanet:{BACKBONE},neck=16,levels=3-4,convs=1,norm=frozen",
    # 240 anchors and at most 28 regions in an image: fewer than are sampled, so that nothing is left to chance
    "faster_rcnn": f"faster_rcnn:{BACKBONE},neck=16,levels=3-4,mlp=16,proposals=20,rois=64,norm=frozen",
    "rt_detr": f"rt_detr:{BACKBONE},dim=16,heads=2,ffn=16,queries=8,decoder=2,denoising=0",
}
STEPS: dict[str, Any] = {
    **small.SETTINGS,
    "epochs": 1,
    "steps": 3,
    "optimizer": "sgd",  # Adam divides rounding errors by themselves
    "lr": 0.01,
    "schedule": "constant",
    "monitor_every": 2,
    "sync_bn": True,
}


def train(model: str, out: Path, **settings: Any) -> None:
    with Progress(quiet=True) as progress:
        api.train(model, settings.pop("data", small.DATA), out=out, progress=progress, **{**STEPS, **settings})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world", "nodes", "environment"),
    [("fcos", 2, 2, torchrun), ("retinanet", 2, 2, srun), ("faster_rcnn", 4, 2, torchrun), ("rt_detr", 2, 1, torchrun)],
)
def test_several_processes_train_as_one(name: str, world: int, nodes: int, environment: Any, tmp_path: Path):
    model, alone, shared = MODELS[name], tmp_path / "alone", tmp_path / "shared"
    train(model, alone)
    settings = {"devices": world // nodes, "nodes": nodes, "batch": 4 // world}
    codes = together(world, lambda rank: train(model, shared, **settings), environment, nodes=nodes)
    assert codes == [0] * world
    one, several = weights(alone), weights(shared)
    assert one.keys() == several.keys()
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    start = small.checkpoint(alone)["callbacks"]["Evaluation"]["latest"]["metrics"]
    assert small.checkpoint(shared)["callbacks"]["Evaluation"]["latest"]["metrics"] == pytest.approx(start, abs=1e-9)
    rows = small.rows(shared)
    assert [int(row["step"]) for row in rows if row["loss"]] == [1, 2, 3]


def test_processes_with_other_data_end_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def run(rank: int) -> None:
        train(MODELS["fcos"], tmp_path / "run", devices=2, batch=2, data=small.DATA.replace("seed=0", f"seed={rank}"))

    assert together(2, run) == [2, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("detdistill: ")]
    assert len(lines) == 2, "one of each process"
    assert len(set(lines)) == 1
    host = socket.gethostname()
    assert lines[0].startswith(f"detdistill: process 1 on {host} has training data ")
    assert lines[0].endswith(" (and other validation data); all processes of a run must have the same")
    assert not (tmp_path / "run").exists(), "nothing was trained"


def test_a_port_in_use_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def of_two(rank: int, world: int, port: int) -> Mapping[str, Any]:
        return torchrun(rank, 2, port)

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        codes = together(1, lambda rank: train(MODELS["fcos"], tmp_path / "run", devices=2, batch=2), of_two, port)
    assert codes == [2]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("detdistill: ")]
    assert said == [f"detdistill: port {port} of 127.0.0.1 is in use; set the environment variable MASTER_PORT to a free port"]


# ------------------------------------------------------------------------------------------------------------ the numbers


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch):
    """Sets the environment of a process; that of the tests themselves counts no more."""

    def give(environment: Mapping[str, Any]) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM", "TORCHELASTIC", "RANK", "LOCAL", "WORLD", "GROUP", "NODE", "MASTER")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return give


@pytest.mark.parametrize("environment", [torchrun, srun])
def test_the_first_process_of_the_first_machine_is_the_main_one(environment: Any, variables: Any):
    found = []
    for rank in range(4):
        variables(environment(rank, 4, 1, nodes=2))
        found.append((is_main_process(), local_rank(), number_of_processes()))
    assert found == [(True, 0, 4), (False, 1, 4), (False, 0, 4), (False, 1, 4)]


def test_a_batch_script_of_slurm_is_a_single_process(variables: Any):
    given = srun(0, 4, 1)
    del given["SLURM_STEP_ID"]
    variables(given)
    assert (is_main_process(), local_rank(), number_of_processes()) == (True, 0, 1)
    variables({**srun(3, 4, 1), **torchrun(1, 2, 1)})  # torchrun inside of a job
    assert (is_main_process(), local_rank(), number_of_processes()) == (False, 1, 2)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"devices": 1}, "devices: 4 processes were started, but --devices times --nodes is 1; give --devices"),
        ({"SLURM_NTASKS_PER_NODE": None}, {}, "devices: start srun with --ntasks-per-node, the same number as --devices"),
        ({"SLURM_NTASKS_PER_NODE": 1}, {}, "devices: srun has started 1 processes on each machine, but --devices is 4"),
        ({"SLURM_NNODES": 2}, {}, "nodes: srun has started processes on 2 machines, but --nodes is 1"),
    ],
)
def test_other_numbers_than_sruns_are_refused(changes: dict[str, Any], settings: Any, message: str, variables: Any):
    variables({name: value for name, value in {**srun(0, 4, 1), **changes}.items() if value is not None})
    with pytest.raises(RunError) as error:
        machine.check_machine(TrainSettings(**{"devices": 4, "device": "cpu", **settings}))
    assert str(error.value).startswith(message)


def test_synchronised_norms_are_a_setting_of_the_run_only():
    effect = effects(DistillSettings)["sync_bn"]
    assert (effect.run, effect.stage, effect.cache) == (True, False, False)


# --------------------------------------------------------------------------------------------------------------- restart


def test_only_the_run_of_the_same_launch_is_continued(tmp_path: Path, variables: Any):
    settings, first = TrainSettings(out=tmp_path), torchrun(0, 2, 1)
    (tmp_path / LAUNCH).write_text('{"launch": "test-1"}')
    variables(first)
    assert not after_restart(settings).resume, "it has not been started again"
    variables({**first, "TORCHELASTIC_RESTART_COUNT": 1})
    assert after_restart(settings).resume
    variables({**first, "TORCHELASTIC_RESTART_COUNT": 1, "TORCHELASTIC_RUN_ID": "another"})
    assert not after_restart(settings).resume
    again = {**first, "TORCHELASTIC_RESTART_COUNT": 1}
    variables(again)
    (tmp_path / "summary.json").touch()
    assert not after_restart(settings).resume, "it is finished"
    (tmp_path / "summary.json").unlink()
    assert not after_restart(TrainSettings(out=tmp_path / "elsewhere")).resume
    forget_launch(tmp_path)
    assert after_restart(settings).resume, "only a first process forgets"
    variables(first)
    with locked(tmp_path):
        forget_launch(tmp_path)
    assert (tmp_path / LAUNCH).exists(), "somebody trains there"
    forget_launch(tmp_path)  # a second launch of the same name, whose first processes are refused
    variables(again)
    assert not after_restart(settings).resume


def _mortal(out: str, settings: dict[str, Any]) -> None:
    """A process of torchrun's: the second one is killed when there is a checkpoint, but not once it was started again."""
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":

        def kill() -> None:
            while not (Path(out) / "checkpoints" / "last.ckpt").exists():
                time.sleep(0.01)
            small.die()

        threading.Thread(target=kill, daemon=True).start()
    train(small.MODEL, Path(out), **settings)


def _torchrun(out: Path, settings: dict[str, Any]) -> None:
    """What ``torchrun --nproc-per-node 2 --max-restarts 1 --master-port PORT`` does, with forks as its processes."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="none",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": 120},
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _mortal)(str(out), settings)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_after_a_process_was_killed(strategy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = {
        "steps": 24,
        "batch": 2,
        "devices": 2,
        "checkpoint_every": 2,
        "evaluate_every": 100,
        "sync_bn": False,
        "strategy": strategy,
    }
    assert together(2, lambda rank: train(small.MODEL, whole, **settings)) == [0, 0]
    assert together(1, lambda rank: _torchrun(out, settings), lambda rank, world, port: {}) == [0]
    assert "failed (exitcode: -9) local_rank: 1" in capfd.readouterr().err
    assert small.unequal_runs(whole, out) == []
    assert not (out / LAUNCH).exists()
