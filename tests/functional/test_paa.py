"""The mixture against scikit-learn's, the selection by hand, and what a box without candidates does."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from detdistill.functional.boxes import pairwise_iou
from detdistill.functional.paa import cheap_side, paa_assign, paa_candidates, paa_costs, paa_select
from detdistill.structures import IGNORED, NEGATIVE, Dense, Target


def by_sklearn(costs):
    """Positions of the ascending costs that are positive, as the released code finds them."""
    costs = costs.numpy().reshape(-1, 1)
    settings = {"weights_init": np.array([0.5, 0.5]), "means_init": costs[[0, -1]], "precisions_init": np.ones((2, 1))}
    mixture = GaussianMixture(2, covariance_type="diag", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture.fit(costs)
    cheap = np.flatnonzero(mixture.predict(costs) == 0)
    if len(cheap) == 0:
        return []
    likelihood = mixture.score_samples(costs)[cheap]
    return cheap[: likelihood.argmax() + 1].tolist()


def test_the_cheap_side_equals_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in (2, 3, 4, 5, 9, 18, 27, 45):
        for spread in (1e-4, 0.1, 1.0, 10.0):
            middle = torch.rand(2, generator=generator, dtype=torch.float64) * 5
            values = torch.randn(count, generator=generator, dtype=torch.float64).abs() * spread
            rows.append((middle[torch.randint(0, 2, (count,), generator=generator)] + values).sort().values)
    found = [np.flatnonzero(cheap_side(row.numpy())).tolist() for row in rows]
    assert found == [by_sklearn(row) for row in rows]
    assert 0 < sum(map(len, found)) < sum(map(len, rows))


def test_two_equally_likely_costs_are_decided_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(5)
    for _ in range(30):
        low, high = (torch.rand(count, generator=generator, dtype=torch.float64) for count in (2, 8))
        row = torch.cat([1 + 0.3 * low, 3 + 2 * high]).sort().values
        assert np.flatnonzero(cheap_side(row.numpy())).tolist() == by_sklearn(row)


@pytest.mark.parametrize(
    ("costs", "cheap"),
    [
        ([0, 3, 5, 6], [0]),  # a cost halfway between the least and the largest, which belongs half to each at first
        ([0, 1, 2, 2, 3, 3, 3.5, 4], [0, 1]),
        ([0, 0.3, 0.4, 1], [0, 1]),  # one more step of the fit would change the side of a cost
        ([0, 0.5, 2.5, 3, 3, 3.5], [0]),
    ],
)
def test_the_fit_begins_and_ends_as_scikit_learns(costs, cheap):
    row = torch.tensor(costs, dtype=torch.float64)
    assert np.flatnonzero(cheap_side(row.numpy())).tolist() == by_sklearn(row) == cheap


def test_costs_without_a_mixture():
    for row in ([1.0], [], [1.0, 2.0, math.inf], [1.0, math.nan]):
        assert not cheap_side(np.array(row)).any()
    assert cheap_side(np.full(3, 2.0))[0]  # equal costs are all cheap and equally likely
    assert cheap_side(np.array([1e12, 1e12 + 1, 3e12])).dtype == bool  # variances that rounding makes negative


def target(boxes, labels, crowd=()):
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return Target(boxes, torch.tensor(labels, dtype=torch.int64), torch.tensor([i in crowd for i in range(len(labels))]).bool())


def squares(side=16.0, count=6, step=8.0):
    """[count^2, 4] squares, row by row."""
    y, x = torch.meshgrid(*[torch.arange(count, dtype=torch.float64) * step] * 2, indexing="ij")
    centers = torch.stack([x.flatten(), y.flatten()], dim=1)
    return torch.cat([centers - side / 2, centers + side / 2], dim=1)


def dense(images=1, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    priors = squares().expand(images, -1, -1)
    logits = torch.randn(images, 36, classes, generator=generator, dtype=torch.float64)
    boxes = priors + torch.randn(images, 36, 4, generator=generator, dtype=torch.float64)
    index = torch.arange(36)
    cells = torch.stack([index // 6, index % 6], dim=1)
    return Dense(logits, boxes, boxes, priors, (index % 2), cells, torch.zeros(36, dtype=torch.int64))


BOXES = [[4.0, 4.0, 30.0, 30.0], [20.0, 18.0, 40.0, 44.0], [0.0, 0.0, 9.0, 9.0]]


def test_candidates_overlap_their_box():
    prediction = dense()
    valid = torch.ones(1, 36, dtype=torch.bool)
    valid[0, 30:] = False
    matched = paa_candidates(prediction.priors_xyxy, valid, [target(BOXES, [0, 1, 2], crowd=(1,))])[0]
    assert torch.equal(matched == IGNORED, ~valid[0])
    assert 1 not in matched  # the crowd box
    overlaps = pairwise_iou(prediction.priors_xyxy[0], torch.tensor(BOXES, dtype=torch.float64))[:, [0, 2]]
    near = overlaps.amax(dim=1) >= 0.1
    assert torch.equal((matched >= 0)[valid[0]], near[valid[0]])
    best = torch.tensor([0, 2])[overlaps.argmax(dim=1)]
    assert torch.equal(matched[near & valid[0]], best[near & valid[0]])


def test_a_box_without_overlap_has_its_best_prior_or_none():
    prediction = dense()
    valid = torch.ones(1, 36, dtype=torch.bool)
    thin, outside = [10.0, 10.0, 10.5, 10.5], [500.0, 500.0, 510.0, 510.0]
    matched = paa_candidates(prediction.priors_xyxy, valid, [target([thin, outside, [5, 5, 5, 9]], [0, 1, 2])])[0]
    assert 0 < int((matched == 0).sum()) < 10
    assert set(matched.tolist()) == {NEGATIVE, 0}
    # The first box begins outside the image; its IoU with the first square is 144 / (576 + 256 - 144). The second is a square.
    two = target([[-20.0, -20.0, 4.0, 4.0], [32.0, 0.0, 48.0, 16.0]], [0, 0])
    assert paa_candidates(prediction.priors_xyxy, valid, [two])[0, [0, 11]].tolist() == [0, 1]


def test_the_positives_of_a_box_are_few_and_candidates():
    prediction, targets = dense(2), [target(BOXES, [0, 1, 2]), target([], [])]
    valid = torch.ones(2, 36, dtype=torch.bool)
    for most in (1, 3, 9):
        matched = paa_assign(prediction, valid, targets, most).matched
        candidates = paa_candidates(prediction.priors_xyxy, valid, targets)
        assert torch.equal(matched[matched >= 0], candidates[matched >= 0])
        assert all(int((matched[0] == box).sum()) <= 2 * most for box in range(3))
        assert not (matched[1] >= 0).any()
    assert (matched[0] >= 0).any()


def test_costs_beside_the_candidates_do_not_count_and_images_are_independent():
    prediction, targets = dense(2, seed=3), [target(BOXES, [0, 1, 2]), target(BOXES[:2], [2, 2])]
    valid = torch.ones(2, 36, dtype=torch.bool)
    whole = paa_assign(prediction, valid, targets, 9).matched
    candidates = paa_candidates(prediction.priors_xyxy, valid, targets)
    prediction.logits[candidates < 0] += 50.0
    assert torch.equal(paa_assign(prediction, valid, targets, 9).matched, whole)
    for image, alone in enumerate(prediction.split(2)):
        assert torch.equal(paa_assign(alone, valid[:1], [targets[image]], 9).matched[0], whole[image])


def test_costs_by_hand():
    prediction = dense()
    candidates = torch.full((1, 36), NEGATIVE)
    candidates[0, 7] = 1
    truth = target(BOXES, [0, 1, 2])
    prediction.boxes_xyxy[0, 7] = truth.boxes_xyxy[1]
    score = prediction.logits[0, 7].sigmoid()
    terms = 0.75 * score**2 * -(1 - score).log()
    terms[1] = 0.25 * (1 - score[1]) ** 2 * -score[1].log()
    assert float(paa_costs(prediction, candidates, [truth])) == pytest.approx(float(terms.sum()), rel=1e-12)
    assert len(paa_costs(prediction, candidates.clamp(max=NEGATIVE), [truth])) == 0


def test_costs_that_are_not_numbers_leave_a_box_without_positives():
    costs, candidates = torch.tensor([0.1, 0.2, 3.0, torch.nan, 0.1, 3.0]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    matched = paa_select(costs, candidates, torch.zeros(6, dtype=torch.int64), most=9)
    assert matched[0, 0] == 0
    assert not (matched == 1).any()
    one = paa_select(costs[:1], torch.tensor([[0, -1, -2]]), torch.zeros(3, dtype=torch.int64), most=9)
    assert one.tolist() == [[-1, -1, -2]]
