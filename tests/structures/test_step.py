import pytest
import torch

from detdistill.structures import Clock, Losses


def test_losses_are_prefixed_merged_and_summed():
    first = Losses({"cls": torch.tensor(1.0), "box": torch.tensor(2.0, dtype=torch.bfloat16)})
    second = Losses({"cls": torch.tensor(4.0)}, {"gap": torch.tensor(100.0)}).prefixed("pkd")
    merged = Losses.merge([first, second])
    assert list(merged.terms) == ["cls", "box", "pkd/cls"]
    assert list(merged.monitors) == ["pkd/gap"]
    assert float(merged.total()) == 7.0
    assert merged.total().dtype == torch.float32
    with pytest.raises(ValueError, match="'cls'"):
        Losses.merge([first, Losses({"cls": torch.tensor(0.0)})])


def test_total_trains_terms_and_never_monitors():
    term, monitor = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    Losses({"a": term * 2, "b": term * 3}, {"m": monitor * 5}).total().backward()
    assert float(term.grad) == 5.0
    assert monitor.grad is None


def test_clock():
    assert Clock(0, 10).progress == 0.0
    assert Clock(5, 10).progress == 0.5
    assert Clock(0, 0).progress == 0.0
    assert [Clock(step, 10).warm_up(4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert Clock(0, 10).warm_up(0) == 1.0


def test_terms_of_the_distillation_are_known_by_name_through_prefix_and_merge():
    own = Losses({"cls": torch.tensor(1.0)})
    learned = Losses({"maps": torch.tensor(2.0), "more": torch.tensor(3.0)}, {"gap": torch.tensor(9.0)}).as_distilled()
    assert (own.distilled, learned.distilled) == (frozenset(), {"maps", "more"})
    merged = Losses.merge([own, learned.prefixed("toy")])
    assert merged.distilled == {"toy/maps", "toy/more"}
    tripled = merged.with_distilled_scaled(3.0)
    assert {name: float(term) for name, term in tripled.terms.items()} == {"cls": 1.0, "toy/maps": 6.0, "toy/more": 9.0}
    assert float(tripled.monitors["toy/gap"]) == 9.0
    assert tripled.distilled == merged.distilled
    assert float(merged.with_distilled_scaled(0.0).total()) == 1.0
    assert merged.with_distilled_scaled(1.0) is merged
