import torch
import torch.nn.functional as F

from detdistill.functional.focal import distribution_focal_loss, distribution_mean, quality_focal_loss
from tests.golden import Golden, assert_golden


def test_quality_focal_loss_equals_the_released_code():
    golden = Golden("_gfl")
    logits, label, score = golden["in_qfl_logits"], golden["in_qfl_label"], golden["in_qfl_score"]
    quality = torch.zeros_like(logits)
    positive = torch.nonzero(label < golden.meta["num_classes"]).flatten()
    quality[positive, label[positive]] = score[positive]
    assert_golden(quality_focal_loss(logits, quality, golden.meta["beta"]).sum(dim=1), golden["out_qfl"])


def test_distribution_focal_loss_equals_the_released_code():
    golden = Golden("_gfl")
    assert_golden(distribution_focal_loss(golden["in_dfl_logits"], golden["in_dfl_target"]), golden["out_dfl"])


def test_means_of_distributions_equal_the_released_code():
    golden = Golden("_gfl")
    for level, expected in zip(golden.levels("in_reg"), golden.levels("out_integral"), strict=True):
        rows = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
        assert_golden(distribution_mean(rows, golden.meta["reg_max"] + 1), expected)


def test_quality_focal_loss_is_zero_at_its_target_and_focal_elsewhere():
    logits = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    torch.testing.assert_close(quality_focal_loss(logits, logits.sigmoid()), torch.zeros(1, 2, dtype=torch.float64))
    negative = quality_focal_loss(logits, torch.zeros_like(logits))
    torch.testing.assert_close(negative, logits.sigmoid() ** 2 * F.softplus(logits))


def test_distribution_focal_loss_is_least_at_the_neighbours_shares():
    target = torch.tensor([2.25], dtype=torch.float64)
    logits = torch.full((1, 5), -40.0, dtype=torch.float64)
    logits[0, 2:4] = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    logits.requires_grad_()
    distribution_focal_loss(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(distribution_mean(logits, 5), target[:, None])
    assert distribution_focal_loss(logits[:0], target[:0]).sum() == 0
