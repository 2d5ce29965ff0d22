"""The probe finds what works, and says why something does not; and every adapter passes it."""

from dataclasses import replace

import pytest
import torch

from detdistill import listing
from detdistill.detectors import probe
from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.probe import CHECKS, STAGES, has_tiny, probe_adapter, probe_detector
from detdistill.errors import ModelError
from detdistill.structures import Losses
from tests.tiny import TinyDense, TinyQueries, TinyRegions

BACKBONE, TOWERS, REGIONS, QUERIES, COPIES = CHECKS[1:]


def test_the_checks_are_the_stages_and_the_capabilities_that_most_methods_build_on():
    assert CHECKS == ("all stages", "backbone features", "towers", "regions", "queries", "copies of neck and head")


@pytest.mark.parametrize(
    ("kind", "family", "able"),
    [
        (TinyDense, "dense", (BACKBONE, TOWERS, COPIES)),
        (TinyRegions, "regions", (BACKBONE, REGIONS)),
        (TinyQueries, "queries", (BACKBONE, QUERIES)),
    ],
)
def test_what_works_is_found_and_what_is_not_claimed_is_no(kind, family, able):
    found = probe_detector(kind())
    assert found.family == family
    assert found.failures == ()
    assert found.results[STAGES]
    assert found.able == able
    assert [found.cell(check) for check in CHECKS[1:]] == ["yes" if check in able else "no" for check in CHECKS[1:]]


def test_probing_draws_no_random_numbers_and_comes_out_the_same():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = probe_detector(TinyRegions())
    assert torch.equal(torch.rand(2), expected)
    assert probe_detector(TinyRegions()) == first


class OtherTower(TinyDense):
    def finish(self, hidden, batch):
        found = super().finish(hidden, batch)
        return found if hidden.depth == 0 else replace(found, logits=found.logits + 1e-6)

    def predict(self, features, batch):
        return self.finish(self.tower(features, 0), batch)


class NoPositives(TinyDense):
    def assign(self, prediction, batch):
        found = super().assign(prediction, batch)
        return replace(found, matched=torch.full_like(found.matched, -1))


class NoNumber(TinyDense):
    def loss(self, prediction, batch, assignment=None):
        return Losses({name: value / 0 for name, value in super().loss(prediction, batch, assignment).terms.items()})


class Crash(TinyDense):
    def detect(self, prediction, batch):
        raise RuntimeError("no boxes today\nand a second line")


class SharedHead(TinyDense):
    def copy_head(self, fresh=False):
        return self.head


class Detached(TinyDense):
    def positives(self, prediction, assignment, batch):
        return super().positives(prediction, assignment, batch).detach()


class Shuffled(TinyRegions):
    def regions(self, features, boxes_xyxy, batch):
        return super().regions(features, [boxes.flip(0) for boxes in boxes_xyxy], batch)


class Remembering(TinyQueries):
    def decode(self, features, seed, batch, attention=False):
        if seed.content.shape[1] < self.num_queries:
            self.shift = 1e-4
        found = super().decode(features, seed, batch, attention)
        return replace(found, logits=found.logits + getattr(self, "shift", 0.0))


@pytest.mark.parametrize(
    ("kind", "check", "reason"),
    [
        (OtherTower, TOWERS, "finish(tower(features, None)) differs from predict(features) by"),
        (NoPositives, STAGES, "assign finds no positive"),
        (NoNumber, STAGES, "the loss is inf"),
        (Crash, STAGES, "RuntimeError: no boxes today"),
        (Detached, STAGES, "the boxes of positives are not differentiable"),
        (SharedHead, COPIES, "a copied head shares parameters"),
        (Shuffled, REGIONS, "regions differ from the given boxes or their order"),
        (Remembering, QUERIES, "decoding a foreign group changes the own result by"),
    ],
)
def test_what_breaks_the_contract_fails_with_its_reason(kind, check, reason):
    found = probe_detector(kind())
    assert found.cell(check) == "FAILS"
    assert not found.results[check]
    assert found.reasons[check].startswith(reason)
    assert "\n" not in found.reasons[check]
    assert list(found.reasons) == [check]


@pytest.mark.parametrize("error", [ImportError("rt_detr needs transformers 5.20 or newer"), ModelError("two words")])
def test_a_missing_package_or_a_broken_file_is_shown_with_its_sentence(error, monkeypatch, capsys):
    def broken(name):
        raise error

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(probe, "adapter", broken)
    monkeypatch.setattr(probe, "adapter_names", lambda: ("rt_detr",))
    (found,) = probe.probe_all()
    assert found.failures == (f"rt_detr, all stages: {error}",)
    listing.show_detectors(listing.list_detectors(probe=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rt_detr", "cannot", "be", "imported"]
    assert lines[1].strip() == f"FAILS all stages: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("name", adapter_names())
def test_every_adapter_keeps_the_contract(name):
    """Families must bring what their methods live on."""
    found = probe_adapter(name)
    assert found.failures == ()
    if not has_tiny(name):  # it only loads models, with their weights
        assert (found.family, [found.cell(check) for check in CHECKS]) == ("as loaded", [""] * len(CHECKS))
        return
    assert found.results[STAGES]
    assert found.family in ("dense", "regions", "queries")
    own = {"dense": TOWERS, "regions": REGIONS, "queries": QUERIES}[found.family]
    assert set(found.able) == {BACKBONE, COPIES, own}
