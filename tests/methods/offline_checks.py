"""Earlier stages of every method, alone and in a composition, online and from a cache: part of ``check_method``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.cache.encoding import decode, encode
from detdistill.detectors.contract import Detector, HasQueries
from detdistill.methods.shared.contract import Method, Source, part_of, teach_by_canvas
from detdistill.methods.shared.hyper_parameters import checked_settings
from detdistill.structures import Batch, Taught
from detdistill.training.stage_results import cached_stage_file, load_result, packed, reusable
from tests.methods.tiny_pairs import MIDDLE, _Pair, assert_same, run_stage
from tests.tiny import tiny_batch


def check_earlier_stages_and_caches(pair: _Pair) -> None:
    """``check_offline`` alone and beside another method, whose company changes no loss of an earlier stage."""
    alone, together = (check_offline(pair, composed) for composed in (False, True))
    for name, loss in alone.items():
        assert torch.equal(together[name], loss), f"in a composition, {name} is {together[name]} instead of {loss}"


def check_offline(pair: _Pair, composed: bool = False) -> dict[str, Tensor]:
    """Learning from records of single images gives the online losses, without the teacher, with images of unequal size.

    Once with all images on one canvas, once with a canvas for each size. Results of earlier stages with ``depends_on`` come as
    files, as from a cache or from ``runs/stages``; all other stages are run. The teacher stays only where the method uses its
    modules.

    Returns:
        The losses of the earlier stages.
    """
    whole = tiny_batch(3)
    apart = dataclasses.replace(whole, canvases_hw=tuple(view.size_hw for view in whole.views))
    earlier: dict[str, Tensor] = {}
    for number, batch in enumerate((whole, apart)):
        pair.forget()
        online = pair.build(composed=composed)
        state = copy.deepcopy(online.state_dict())
        found, results = train_earlier(online, pair.student, batch)
        taught = online.teach(batch)
        if taught is None and not results.files:
            return earlier
        pair.forget()
        expected = _all_steps(online, pair.student, batch, teach_by_canvas)
        found |= {name: loss for name, loss in expected.items() if not name.startswith("distill/")}
        earlier |= {f"batch {number}, {name}": loss for name, loss in found.items()}
        records = {} if taught is None else _records(pair, online, batch)
        offline = _without_teacher(pair, composed)
        offline.load_state_dict(state)
        for stage in offline.stages(pair.student)[:-1]:
            if stage.depends_on:
                known = load_result(results, cached_stage_file(stage), stage)
                assert known, f"stage {stage.name}: depends_on is another one without the teacher, so no result is found"

        def source(method: Method, asked: Batch, records=records, root=offline) -> Taught | None:
            if not records:
                return None
            found = [records[key] for key in zip(asked.ids, (view.key for view in asked.views), strict=True)]
            pieces = [decode(record.layout, bytearray(record.data)) for record in found]
            return part_of(type(pieces[0]).stack(pieces), root, method)

        actual = _all_steps(offline, pair.student, batch, source)
        assert_same(actual, expected, "learning from records gives another loss: ", rtol=1e-6, atol=1e-6)
    return earlier


def _records(pair: _Pair, method: Method, batch: Batch) -> dict[tuple[int, str], Any]:
    """What is taught of each image alone, encoded as a cache holds it."""
    records = {}
    for image, alone in one_by_one(batch):
        pair.forget()
        (piece,) = method.teach(alone).split(1)
        records[batch.ids[image], batch.views[image].key] = encode(piece, "float32")
    return records


def _without_teacher(pair: _Pair, composed: bool) -> Method:
    """The method as a run from a cache builds it: with the teacher's description, unless it needs the teacher itself."""
    teacher = pair.teacher
    settings = checked_settings(pair.method_class.slug, pair.method_class, pair.hyperparameters)
    if teacher is not None and not pair.method_class.needs(**settings).why_live():
        queries = teacher.queries if isinstance(teacher.detector, HasQueries) else None
        pair.teacher = AbsentTeacher(dataclasses.replace(teacher.spec, queries=queries), teacher.fingerprint)
    try:
        return pair.build(composed=composed)
    finally:
        pair.teacher = teacher


@dataclasses.dataclass
class Results:
    """Files of earlier stages, by name, in memory (``cache.knowledge.Readable``)."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    url = "memory"

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]


def train_earlier(method: Method, student: Detector, batch: Batch) -> tuple[dict[str, Tensor], Results]:
    """One step of each earlier stage whose result is stored: its losses, and the file that it leaves."""
    losses: dict[str, Tensor] = {}
    results = Results()
    for stage in method.stages(student)[:-1]:
        if not stage.depends_on:
            continue
        assert reusable(stage, method), f"stage {stage.name} trains what is not in the method, so its result cannot be stored"
        torch.manual_seed(7)
        terms = run_stage(stage, student, method, batch).terms
        losses |= {f"{stage.name}/{name}": term.detach() for name, term in terms.items()}
        with torch.no_grad():
            for parameter in (*student.parameters(), *method.parameters()):
                if parameter.grad is not None:
                    parameter.sub_(1e-3 * parameter.grad.sign())
                    parameter.grad = None
        results.files[cached_stage_file(stage)] = packed(stage)
    return losses, results


def one_by_one(batch: Batch) -> Iterator[tuple[int, Batch]]:
    """Each image in a batch of its own, on its canvas."""
    canvases = batch.canvases_hw or (batch.padding_hw,) * len(batch)
    for image in range(len(batch)):
        yield image, batch._on_canvas([image], canvases[image])


def _all_steps(method: Method, student: Detector, batch: Batch, source: Source) -> dict[str, Tensor]:
    """Losses of all stages but those with ``depends_on``, whose results are there already."""
    found: dict[str, Tensor] = {}
    for stage in method.stages(student):
        if stage.depends_on:
            continue
        if stage.before is not None:
            stage.before()
        torch.manual_seed(7)
        with torch.no_grad():
            taught = None if stage.learns_from is None else source(stage.learns_from, batch)
            terms = stage.step(batch, taught, MIDDLE).terms
            found |= {f"{stage.name}/{name}": term for name, term in terms.items()}
    return found
