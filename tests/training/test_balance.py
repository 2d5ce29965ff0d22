"""``--balance``: the share is reached, nothing else changes, and a resumed run goes on exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detdistill.compare import _label, read_run
from detdistill.errors import DetdistillWarning, RunError
from detdistill.methods.shared.contract import TeacherFree
from detdistill.report.page import build_report
from detdistill.settings import DistillSettings, names_where
from detdistill.structures import Batch, Clock, Losses
from detdistill.training import balance as balance_module
from detdistill.training import session as session_module
from detdistill.training.balance import Balance
from detdistill.training.callbacks import Checkpoints
from detdistill.training.module import StageModule
from tests.training import small
from tests.training.test_from_cache import cache, offline
from tests.training.test_resume import kill_when


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure at every step, because runs of tests have twelve."""
    monkeypatch.setattr(Balance, "due", lambda self, step: True)


@pytest.fixture(scope="module")
def balanced(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of PKD at a share of 0.3; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "balanced"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Balance, "due", lambda self, step: True)
        small.distill(teacher, folder, method="pkd", balance=0.3)
    return folder


def trace(folder: Path, name: str, slug: str) -> list[float]:
    """A column of the trace, where it was measured."""
    return [float(row[f"balance/{slug}/{name}"]) for row in small.rows(folder) if row.get(f"balance/{slug}/{name}")]


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The share of each group of terms in every step, measured here from the losses that are trained."""
    found: list[dict[str, float]] = []
    apply = StageModule._balanced

    def watched(self: StageModule, balance: Balance, losses: Losses, first: bool) -> Losses:
        result = apply(self, balance, losses, first)
        weights = [p for p in self.student.parameters() if p.requires_grad]
        groups: dict[str, list[torch.Tensor]] = {}
        for name, term in result.terms.items():
            group = name.split("/")[0] if len(balance.members) > 1 else "method"
            groups.setdefault(group if name in losses.distilled else "own", []).append(term)
        norms = {}
        for group, terms in groups.items():
            grads = torch.autograd.grad(sum(terms), weights, retain_graph=True, allow_unused=True)
            norms[group] = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
        found.append({group: norm / sum(norms.values()) for group, norm in norms.items()})
        return result

    monkeypatch.setattr(StageModule, "_balanced", watched)
    return found


# ------------------------------------------------------------------------------------------------------- the controller


def test_the_first_measurement_gives_the_share_at_once():
    held = Balance(0.3, ["pkd"])
    held.update(2.0, {"pkd": 50.0})
    assert held.trace["balance/pkd/share"] == pytest.approx(50 / 52)
    assert held.trace["balance/pkd/factor"] == pytest.approx(0.3 / 0.7 * 2 / 50)
    factor = held.factors["pkd"]
    assert factor * 50 / (factor * 50 + 2) == pytest.approx(0.3)


def test_members_have_equal_parts_and_those_without_a_gradient_have_none():
    held = Balance(0.5, ["pkd", "fgd"])
    held.update(1.0, {"pkd": 4.0, "fgd": 0.02, "others": 0.0})
    parts = {"pkd": 4 * held.factors["pkd"], "fgd": 0.02 * held.factors["fgd"]}
    assert {name: part / (1 + sum(parts.values())) for name, part in parts.items()} == pytest.approx({"pkd": 0.25, "fgd": 0.25})
    assert held.factors["others"] == 1
    lone = Balance(0.5, ["pkd", "lad"])
    lone.update(1.0, {"pkd": 4.0, "lad": 0.0, "others": 0.0})
    assert lone.factors == pytest.approx({"pkd": 0.25, "lad": 1.0, "others": 1.0})


def test_a_norm_that_falls_a_thousandfold_in_the_first_steps_is_followed():
    held = Balance(0.5, ["odkd"])
    for norm in (4000.0, 4.0, 4.0, 4.0):
        held.update(1.0, {"odkd": norm})
    assert 4 * held.factors["odkd"] == pytest.approx(1000 ** (-1 / 4)), "the mean of all four, as near as in calmer runs"
    held = Balance(0.5, ["odkd"])
    for norm in (1.0, 1e9):
        held.update(1.0, {"odkd": norm})
    assert held.factors["odkd"] == pytest.approx(1 / 64), "not further at once"


def test_the_factor_is_the_mean_of_the_first_measurements_then_slow_and_never_leaps():
    held = Balance(0.5, ["pkd"])
    for norm in (1.0, 4.0, 2.0):  # wanted: 1, 1/4, 1/2
        held.update(1.0, {"pkd": norm})
    assert held.factors["pkd"] == pytest.approx((1 * 0.25 * 0.5) ** (1 / 3))
    for _ in range(40):
        held.update(1.0, {"pkd": 2.0})
    assert held.factors["pkd"] == pytest.approx(0.5, rel=1e-3)
    held.update(1.0, {"pkd": 2e-9})
    assert held.factors["pkd"] == pytest.approx(2.0, rel=1e-3), "a factor of 4 at most"
    held.update(1.0, {"pkd": 8e9})
    assert held.factors["pkd"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("own", "norm"), [(0.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 0.0), (1.0, 1e-20)])
def test_what_cannot_be_measured_moves_nothing(own: float, norm: float):
    held = Balance(0.5, ["pkd"])
    held.update(own, {"pkd": norm})
    assert (held.factors, held.counts, held.trace) == ({"pkd": 1.0}, {"pkd": 0}, {})


def test_norms_by_hand_and_terms_of_the_methods_own_modules_keep_their_weight():
    weight, adapter = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    terms = {"cls": weight.sum(), "box": 2 * weight.sum(), "hint": weight.square().sum() / 2, "decoder": adapter.square()}
    losses = Losses({**terms, "empty": torch.zeros(())}, distilled=frozenset(("hint", "decoder", "empty")))
    held = Balance(0.4, ["toy"])
    assert held.measure(losses, [weight]) == ""
    own, kd = 3 * math.sqrt(2), 5.0
    assert held.trace["balance/toy/share"] == pytest.approx(kd / (own + kd))
    assert held.factors["toy"] == pytest.approx(0.4 / 0.6 * own / kd)
    scaled = held.apply(losses)
    assert float(scaled.terms["hint"].detach()) == pytest.approx(12.5 * held.factors["toy"])
    assert float(scaled.terms["decoder"].detach()) == 4
    assert float(scaled.terms["cls"].detach()) == 7
    assert held.alone == {"decoder"}
    later = Losses({**terms, "decoder": adapter.square() * weight.sum()}, distilled=losses.distilled)
    held.measure(later, [weight])
    assert held.alone == set(), "a term that reaches the student after a warm-up is balanced from then on"
    again = Balance(0.4, ["toy"])
    again.load_state_dict(json.loads(json.dumps(held.state_dict())))
    assert again.state_dict() == held.state_dict()
    half = Balance(0.4, ["toy"])
    half.measure(losses, [weight], scale=1024.0)
    assert half.factors["toy"] == pytest.approx(0.4 / 0.6 * own / kd)


def test_measurements_are_seldom_and_more_seldom_with_more_methods():
    one, three = Balance(0.3, ["a"]), Balance(0.3, ["a", "b", "c"])
    assert [step for step in range(301) if one.due(step)] == [0, 1, 4, 16, 100, 200, 300]
    assert [step for step in range(401) if three.due(step)] == [0, 1, 4, 16, 200, 400]


def _measured(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    weight = torch.ones(1, requires_grad=True)
    kd = weight.sum() * (3.0 if rank else 1.0)
    losses = Losses({"own": 2 * weight.sum(), "kd": kd}, distilled=frozenset(("kd",)))
    held = Balance(0.5, ["toy"])
    held.measure(losses, [weight], reduce=StageModule._mean_over_processes)
    Path(out, f"{rank}.json").write_text(json.dumps(held.state_dict()))
    dist.destroy_process_group()


def test_all_processes_have_the_same_factor(tmp_path: Path):
    mp.start_processes(_measured, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1]
    assert states[0]["factors"]["toy"] == pytest.approx(1.0), "2 of the own loss, and 2 the mean of 1 and 3"


# ------------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize(("method", "low", "high"), [("pgd", 0.9, 1.0), ("mgd", 0.0, 0.01)])
def test_the_share_is_reached(method: str, low: float, high: float, teacher: Path, tmp_path: Path, often, shares):
    small.distill(teacher, tmp_path / "run", method=method, balance=0.3)
    slug = method.split(",")[0]
    measured = trace(tmp_path / "run", "share", slug)
    assert len(measured) == len(shares) == small.STEPS
    assert low < measured[0] < high, "with the published weight"
    assert shares[0]["method"] == pytest.approx(0.3, abs=1e-4)
    held = [step["method"] for step in shares[4:]]
    assert sum(held) / len(held) == pytest.approx(0.3, abs=0.05)
    assert min(held) > 0.1
    assert max(held) < 0.6, "single batches differ"


def test_a_composition_holds_each_method_at_its_part(teacher: Path, tmp_path: Path, often, shares):
    small.distill(teacher, tmp_path / "run", method="pkd+mgd", balance=0.4)
    assert shares[0] == pytest.approx({"own": 0.6, "pkd": 0.2, "mgd": 0.2}, abs=1e-4)
    for slug in ("pkd", "mgd"):
        held = [step[slug] for step in shares[4:]]
        assert sum(held) / len(held) == pytest.approx(0.2, abs=0.05)


def test_without_balance_nothing_changes_bit_for_bit(balanced: Path, teacher: Path, tmp_path: Path, monkeypatch, often):
    monkeypatch.setattr(Balance, "update", lambda *_: None)  # measured, with factors that stay 1
    small.distill(teacher, tmp_path / "idle", method="pkd", balance=0.3)
    monkeypatch.setattr(Balance, "__init__", lambda *_: pytest.fail("made without --balance"))
    small.distill(teacher, tmp_path / "off", method="pkd")
    assert small.unequal_runs(tmp_path / "off", tmp_path / "idle") == []
    assert "balance" not in small.checkpoint(tmp_path / "off")["detdistill"]
    assert not any(name.startswith("balance/") for name in small.rows(tmp_path / "off")[0])
    assert len(small.unequal_runs(tmp_path / "off", balanced)) > 50, "and with it, much does"


def test_a_resumed_run_goes_on_with_the_factor(teacher: Path, tmp_path: Path, monkeypatch, often):
    settings = {"method": "pkd+mgd,weight=0.001", "balance": 0.3, "checkpoint_every": 1}
    small.distill(teacher, tmp_path / "whole", **settings)
    for step, moment in ((6, "on_train_epoch_end"), (9, "on_train_batch_end")):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patched:
            kill_when(patched, Checkpoints, moment, "after", step)
            assert small.killed(lambda folder=folder: small.distill(teacher, folder, **settings)) == -9
        small.distill(teacher, folder, **settings, resume=True)
        assert small.unequal_runs(tmp_path / "whole", folder) == []
        states = [small.checkpoint(one)["detdistill"]["balance"] for one in (tmp_path / "whole", folder)]
        assert states[0] == states[1]
        assert states[0]["counts"] == {"pkd": 12, "mgd": 12, "others": 0}
    with pytest.raises(RunError, match=r"balance was 0\.3 and is now 0\.4"):
        small.distill(teacher, tmp_path / "whole", **{**settings, "balance": 0.4}, resume=True)


def test_batches_of_one_optimizer_step_share_a_factor(teacher: Path, tmp_path: Path, often):
    small.distill(teacher, tmp_path / "run", method="pkd", balance=0.3, batch=2, accumulate=2)
    assert len(trace(tmp_path / "run", "factor", "pkd")) == small.STEPS


def test_a_cache_gives_the_same_factors(balanced: Path, teacher: Path, tmp_path: Path, often):
    cache(teacher, tmp_path / "cache")
    offline(tmp_path / "cache", tmp_path / "offline", balance=0.3)
    factors = [trace(folder, "factor", "pkd") for folder in (balanced, tmp_path / "offline")]
    assert factors[0] == pytest.approx(factors[1], rel=1e-3)


def test_the_report_and_the_comparison_say_it(balanced: Path, tmp_path: Path):
    page = build_report([balanced], tmp_path / "page.html").read_text()
    assert "pkd, balance 0.3" in page
    factor, first = trace(balanced, "factor", "pkd")[-1], trace(balanced, "share", "pkd")[0]
    assert f"--balance 0.3: the methods&#39; gradient was {100 * first:.2g} % before the first step" in page
    assert f"factors at the end: pkd {factor:.3g}." in page
    assert "Balance: share of the student" in page
    assert _label({**read_run(balanced), "form": "torch"}) == "pkd, balance 0.3"


class Silent(TeacherFree):
    """Adds no distillation term."""

    slug, title, bibtex = "silent", "a toy", ""

    def learn(self, student: Any, seen: Any, taught: Any, batch: Batch, clock: Clock) -> Losses:
        return Losses({})


def test_a_method_without_a_gradient_is_said(teacher: Path, tmp_path: Path, monkeypatch):
    with pytest.warns(DetdistillWarning, match=r"balance: in stage hint no loss of the student's own .*changes nothing there"):
        small.distill(teacher, tmp_path / "hints", method="fitnet,hint_share=0.2", balance=0.3, steps=5)
    monkeypatch.setattr(session_module, "build_method", lambda text, teacher, student: Silent(teacher, student))
    with pytest.warns(DetdistillWarning, match="balance: in stage distill no distillation term has a gradient into the student"):
        small.distill(teacher, tmp_path / "silent", balance=0.3, steps=2)
    page = build_report([tmp_path / "silent"], tmp_path / "page.html").read_text()
    assert "--balance 0.3 changed nothing, because no distillation term had a gradient" in page


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan, True])
def test_a_share_that_is_none_is_refused(share: Any):
    with pytest.raises(RunError, match=r"balance: .* is not a number above 0 and below 1 or none"):
        DistillSettings(balance=share)


def test_settings_that_contradict_each_other():
    with pytest.raises(RunError, match="balance: distill_weight is 0"):
        DistillSettings(balance=0.3, distill_weight=0)
    assert "balance" in names_where(DistillSettings, "run")
    for other in ("views", "stage", "cache"):
        assert "balance" not in names_where(DistillSettings, other)
    assert balance_module.STEPS_PER_NORM == 50
