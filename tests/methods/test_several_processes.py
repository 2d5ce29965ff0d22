"""Every method in two processes: each of its stages gives all that it trains a gradient, and most train as one process does."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detdistill.detectors.contract import Detector
from detdistill.methods.shared.catalogue import method_slugs
from detdistill.methods.shared.compose import method_class
from detdistill.methods.shared.contract import Method, Stage, teach_by_canvas
from detdistill.methods.shared.hyper_parameters import checked_settings
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Batch
from tests.methods.contract_checks import MIDDLE, _Pair, learn, stage_losses, without_boxes
from tests.methods.test_dicod import SMALL as SMALL_DICOD
from tests.methods.test_ld import TinySides
from tests.methods.test_scalekd import SMALL as SMALL_SCALEKD
from tests.methods.test_ssd_det import SMALL as SMALL_SSD_DET
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

pytestmark = pytest.mark.slow
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "crosskd": [{"depth": 1}],
    "defeat": [{}, {"head": "cells"}, {"head": "regions", "regions": "both"}],
    "dicod": [SMALL_DICOD],
    "drkd": [{"nodes": (4,)}],
    "fitnet": [{}, {"variant": "modified"}],
    "head": [
        {"pair": "dense_to_dense"},
        {"pair": "regions_to_regions", "ckd_weight": 1.0},
        {"pair": "teacher_free", "width": 16},
    ],
    "kd_detr": [{"general_points": 6, "cls_reduction": "weighted_mean"}],
    "lad": [{"form": "solad", "switch": True}],
    "ld": [{"box_weight": 0.0, "valuable_weight": 0.0, "valuable_cls_weight": 1.0, "imitation_weight": 2.0}],
    "mimic": [{"keep_features": True}, {"two_stage": False, "size": 2, "max_regions": 4}],
    "mimicdet": [{"width": 16}],
    "scalekd": [SMALL_SCALEKD],
    "ssd_det": [SMALL_SSD_DET],
    "unikd": [{"queries": 8}],
}
"""Settings in which a method is tried: small, met by a tiny pair, and without sums over images (see the docs)."""
DIFFERENT = {
    "pkd": "standardised over the batch",
    "crosskd": "moments of the batch",
    "fkd": "norms over the batch",
    "drkd": "norms over the batch, and sums over images",
    "dsig": "sums over images",
    "gid": "relations between instances of different images",
    "glamd": "norms over the batch",
    "mgd": "random cells",
    "icd": "random queries",
    "ssd_det": "a process without boxes has no background boxes",
}
"""Methods that train otherwise in several processes than in one with all images, and why; docs/training.md names them."""


def pairs(slug: str) -> Iterator[tuple[str, _Pair]]:
    """For each of the settings the first pair of equal families that a method accepts, with a name."""
    kind = method_class(slug)
    for settings in SETTINGS.get(slug, [{}]):
        alone = kind.needs(**checked_settings(slug, kind, settings)).teacher is None
        for family in (TinySides,) if slug == "ld" else (TinyDense, TinyRegions, TinyQueries):
            for channels in (16, 8):
                pair = _Pair(kind, settings, None if alone else family, family, channels)
                with contextlib.suppress(PairError):
                    pair.build()
                    yield f"{slug} {family.__name__} {settings}", pair
                    break
            else:
                continue
            break  # one family is enough


def part(batch: Batch, images: slice) -> Batch:
    """Some images of a batch."""
    return dataclasses.replace(
        batch,
        images=batch.images[images],
        sizes=batch.sizes[images],
        targets=batch.targets[images],
        ids=batch.ids[images],
        views=batch.views[images],
    )


def batches() -> dict[str, Batch]:
    """Four images, two for each process: with boxes in all, and without boxes in those of the second process."""
    whole = tiny_batch(4)
    return {"boxes": whole, "no boxes": without_boxes(whole, range(2, 4))}


def learned(pair: _Pair, batch: Batch) -> dict[str, Tensor]:
    """Gradients of ``learn`` for a new student and method."""
    method = pair.build()
    student = pair.student
    assert student is not None
    pair.forget()
    losses = learn(method, student, batch, teach_by_canvas(method, batch))
    if not losses.terms:
        return {}
    named = {f"student.{name}": p for name, p in student.named_parameters()} | dict(method.named_parameters())
    named = {name: p for name, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(losses.total(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g.contiguous() for (n, p), g in zip(named.items(), found, strict=True)}


class Step(nn.Module):
    """The step of a stage as the forward pass of a module, with only that trainable which the stage trains."""

    def __init__(self, student: Detector, method: Method, stage: Stage) -> None:
        super().__init__()
        self.student, self.method, self.stage = student, method, stage
        trained = {p for module in stage.trains(MIDDLE) for p in module.parameters()}
        for p in self.parameters():
            p.requires_grad_(p.requires_grad and p in trained)

    def forward(self, batch: Batch) -> Tensor:
        torch.manual_seed(3)
        return stage_losses(self.stage, batch).total()


def stepped(pair: _Pair, batch: Batch) -> list[str]:
    """Do a step of each stage under DDP; what got no gradient in a process, or other gradients than in the other."""
    wrong = []
    for number in range(len(pair.build().stages(pair.student))):
        method = pair.build()
        stage = method.stages(pair.student)[number]
        if stage.before is not None:
            stage.before()
        pair.forget()
        step = Step(pair.student, method, stage)
        wrapped = DistributedDataParallel(step, find_unused_parameters=False)
        total = wrapped(batch)
        named = {name: p for name, p in step.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
        both: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(both, [name for name, grad in zip(named, grads, strict=True) if grad is None])
        # Some stages and settings leave parts of the detector alone; all processes must leave the same.
        wrong += [f"process {rank}, {stage.name}: {n}" for rank, some in enumerate(both) for n in some if n.startswith("method.")]
        if both[0] != both[1]:
            wrong.append(f"{stage.name}: without gradient are {both}")
        if any(both):  # DDP would wait forever
            continue
        total.backward()
        for p, grad in zip(named.values(), grads, strict=True):
            mean = grad.contiguous()
            dist.all_reduce(mean)
            torch.testing.assert_close(p.grad, mean / 2, rtol=1e-4, atol=1e-6)
    return wrong


def process(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    given = batches()
    alone = {}
    if rank == 0:
        every = [pair for slug in method_slugs() for pair in pairs(slug)]
        alone = {(name, kind): learned(pair, batch) for name, pair in every for kind, batch in given.items()}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=300)
    )
    found = {}
    for name, pair in (pair for slug in method_slugs() for pair in pairs(slug)):
        for kind, batch in given.items():
            mine = part(batch, slice(2 * rank, 2 * rank + 2))
            wrong = stepped(pair, mine) if kind == "no boxes" else []
            grads, farthest = learned(pair, mine), 0.0
            for grad in grads.values():
                dist.all_reduce(grad)
            if rank == 0:
                wanted = alone[name, kind]
                scale = max(float(value.abs().max()) for value in wanted.values()) + 1e-12
                farthest = (
                    max(float((grad / 2 - wanted[key]).abs().max()) / scale for key, grad in grads.items()) if grads else 0.0
                )
            found[f"{name}, {kind}"] = (wrong, farthest)
    if rank == 0:
        torch.save(found, Path(out))
    dist.destroy_process_group()


def test_every_method_in_two_processes(tmp_path: Path):
    out = tmp_path / "found.pt"
    mp.start_processes(process, (str(tmp_path / "store"), str(out)), nprocs=2, start_method="fork")
    found = torch.load(out)
    assert {key.partition(" ")[0] for key in found} == set(method_slugs())
    assert {key: wrong for key, (wrong, _) in found.items() if wrong} == {}
    far = {key for key, (_, farthest) in found.items() if farthest > 1e-4}
    assert {key.partition(" ")[0] for key in far} == set(DIFFERENT), far
