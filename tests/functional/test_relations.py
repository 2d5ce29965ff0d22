import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detdistill.functional.relations import (
    GloReBlock,
    NonLocalBlock,
    RowBank,
    cosine_gram,
    info_nce,
    normalized_distances,
    overlapping_pairs,
    relate_cells,
)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module, seed):
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


# ------------------------------------------------------------------------------------------------------------- cosines


def test_cosines_by_pairs():
    rows = drawn(0, 6, 5)
    gram = cosine_gram(rows)
    for i in range(6):
        for j in range(6):
            assert gram[i, j].item() == pytest.approx(F.cosine_similarity(rows[i], rows[j], dim=0).item(), abs=1e-12)
    torch.testing.assert_close(cosine_gram(rows * torch.arange(1.0, 7)[:, None]), gram, rtol=0, atol=1e-12)
    stacked = cosine_gram(torch.stack([rows, rows.flip(0)]))
    torch.testing.assert_close(stacked[1], gram.flip(0, 1), rtol=0, atol=1e-12)


def test_cosines_of_zeros_and_of_nothing_are_finite():
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    gram = cosine_gram(rows)
    assert gram.tolist() == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]
    gram.sum().backward()
    assert bool(rows.grad.isfinite().all())
    empty = torch.zeros(0, 4, requires_grad=True)
    cosine_gram(empty).square().sum().backward()
    assert cosine_gram(empty).shape == (0, 0)


@pytest.mark.parametrize("relation", [cosine_gram, normalized_distances])
def test_gradients_of_relations_equal_finite_differences(relation):
    assert torch.autograd.gradcheck(relation, drawn(1, 5, 3).requires_grad_())


# ----------------------------------------------------------------------------------------------------------- distances


def test_distances_by_another_way():
    rows = drawn(2, 7, 4)
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = torch.nn.functional.pdist(rows)
    torch.testing.assert_close(normalized_distances(rows), apart / pairs.mean(), rtol=1e-10, atol=1e-10)


def test_distances_see_neither_scale_nor_place():
    rows = drawn(3, 6, 4)
    expected = normalized_distances(rows)
    torch.testing.assert_close(normalized_distances(7 * rows + drawn(4, 1, 4)), expected, rtol=1e-10, atol=1e-10)
    assert (expected.sum() / 30).item() == pytest.approx(1.0)
    assert torch.equal(expected.diagonal(), torch.zeros(6, dtype=torch.float64))


def test_scaling_has_no_gradient():
    rows = drawn(5, 6, 4)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (normalized_distances(scale * rows) * drawn(6, 6, 6)).sum().backward()
    assert abs(scale.grad.item()) < 1e-10


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_few_and_equal_rows(count):
    rows = torch.ones(count, 3, dtype=torch.float64, requires_grad=True)
    distances = normalized_distances(rows)
    assert distances.tolist() == (1 - torch.eye(count)).tolist()  # all pairs at the mean distance
    distances.square().sum().backward()
    assert bool(rows.grad.isfinite().all())


# ----------------------------------------------------------------------------------------------------------- contrast


def units(seed, *shape):
    return F.normalize(drawn(seed, *shape), dim=-1)


def test_contrast_is_cross_entropy_over_keys_and_bank():
    anchors, keys, bank = units(7, 5, 4), units(8, 5, 4), units(9, 3, 4)
    labels = torch.arange(5)
    expected = F.cross_entropy(anchors @ keys.T / 0.07, labels, reduction="none")
    torch.testing.assert_close(info_nce(anchors, keys, 0.07), expected, rtol=1e-12, atol=1e-12)
    expected = F.cross_entropy(anchors @ torch.cat([keys, bank]).T / 0.07, labels, reduction="none")
    torch.testing.assert_close(info_nce(anchors, keys, 0.07, bank=bank), expected, rtol=1e-12, atol=1e-12)
    nobody = torch.zeros(5, 5, dtype=torch.bool)
    torch.testing.assert_close(info_nce(anchors, keys, 0.07, bank=bank, ignored=nobody), expected, rtol=1e-12, atol=1e-12)


def test_contrast_one_by_one():
    anchors, keys, bank = units(10, 4, 3), units(11, 4, 3), units(12, 2, 3)
    ignored = torch.zeros(4, 4, dtype=torch.bool)
    ignored[0, 1] = ignored[1, 0] = ignored[3, 0] = ignored[2, 2] = True
    for with_positive in (True, False):
        found = info_nce(anchors, keys, 0.5, bank=bank, ignored=ignored, positive_in_denominator=with_positive)
        for i in range(4):
            total = sum(math.exp(anchors[i] @ key / 0.5) for key in bank)
            for j in range(4):
                if (i == j and with_positive) or (i != j and not ignored[i, j]):
                    total += math.exp(anchors[i] @ keys[j] / 0.5)
            assert found[i].item() == pytest.approx(math.log(total) - (anchors[i] @ keys[i] / 0.5).item(), rel=1e-12)


def test_contrast_without_negatives_is_zero():
    anchor = units(13, 1, 3).requires_grad_()
    both = torch.ones(2, 2, dtype=torch.bool)
    for rows, ignored in ((anchor, None), (anchor.expand(2, -1), both)):
        for with_positive in (True, False):
            loss = info_nce(rows, rows.detach(), 0.07, ignored=ignored, positive_in_denominator=with_positive)
            assert loss.tolist() == pytest.approx([0.0] * len(rows), abs=1e-12)
            (gradient,) = torch.autograd.grad(loss.sum(), anchor)
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_no_anchors_give_a_zero_with_a_graph():
    empty = torch.zeros(0, 3, requires_grad=True)
    ignored = torch.zeros(0, 0, dtype=torch.bool)
    for settings in ({}, {"bank": units(14, 2, 3).float()}, {"ignored": ignored, "positive_in_denominator": False}):
        loss = info_nce(empty, empty.detach(), 0.07, **settings).sum()
        assert loss.item() == 0.0
        loss.backward()


def test_contrast_of_extreme_similarities_is_finite_in_float32():
    rows = torch.eye(3).requires_grad_()
    loss = info_nce(rows, -torch.eye(3), 0.001)
    assert loss.tolist() == pytest.approx([1000 + math.log(2)] * 3)
    loss.sum().backward()
    assert bool(rows.grad.isfinite().all())


def test_gradients_of_contrast_reach_anchors_and_keys_and_not_the_bank():
    anchors, keys, bank = (units(seed, 4, 3).requires_grad_() for seed in (15, 16, 17))
    ignored = torch.eye(4, dtype=torch.bool).flip(0)

    def loss(mine, theirs):
        return info_nce(mine, theirs, 0.3, bank=bank.detach(), ignored=ignored)

    assert torch.autograd.gradcheck(loss, (anchors, keys))
    info_nce(anchors, keys, 0.3, bank=bank).sum().backward()
    assert bank.grad is None


def test_overlapping_pairs_are_of_one_image():
    box = torch.tensor([0.0, 0.0, 10.0, 10.0])
    first = torch.stack([box, box + 1, box + 40])  # IoU of the first two: 81 / 119
    second = torch.stack([box, box + torch.tensor([0.0, 0.0, 0.0, 10.0])])  # IoU exactly 0.5
    pairs = overlapping_pairs([first, torch.zeros(0, 4), second])
    assert pairs.nonzero().tolist() == [[0, 1], [1, 0]]
    assert overlapping_pairs([first, second], iou=0.45).nonzero().tolist() == [[0, 1], [1, 0], [3, 4], [4, 3]]
    assert overlapping_pairs([first, second], iou=0.7).nonzero().tolist() == []
    assert overlapping_pairs([torch.zeros(0, 4)]).shape == (0, 0)


# ----------------------------------------------------------------------------------------------------------------- bank


def test_bank_keeps_the_last_batches_newest_first():
    bank, like = RowBank(batches=2), torch.zeros(1, 2)
    assert bank(like).shape == (0, 2)
    bank.push(torch.tensor([[1.0, 1], [2, 2]], requires_grad=True))
    bank.push(torch.zeros(0, 2))
    bank.push(torch.tensor([[3.0, 3]]))
    assert bank(like)[:, 0].tolist() == [3, 1, 2]
    assert not bank(like).requires_grad
    bank.push(torch.tensor([[4.0, 4], [5, 5], [6, 6]]))
    assert bank(like)[:, 0].tolist() == [4, 5, 6, 3]
    assert bank(like.double()).dtype == torch.float64


def test_bank_comes_back_from_a_checkpoint():
    bank, other = RowBank(batches=2), nn.ModuleDict({"bank": RowBank(batches=2)})
    bank.push(torch.tensor([[1.0, 1], [2, 2]]))
    bank.push(torch.tensor([[3.0, 3]]))
    other.load_state_dict(nn.ModuleDict({"bank": bank}).state_dict())
    for one in (bank, other["bank"]):
        one.push(torch.tensor([[7.0, 7]]))
    assert other["bank"](torch.zeros(1, 2)).tolist() == bank(torch.zeros(1, 2)).tolist() == [[7, 7], [3, 3]]
    assert list(bank.state_dict()) == ["rows", "counts"]


# ------------------------------------------------------------------------------------------------------ non-local block


def test_relations_equal_the_matrix_form():
    theta, phi, values = drawn(18, 2, 3, 80), drawn(19, 2, 3, 20), drawn(20, 2, 3, 20)
    pairwise = theta.transpose(1, 2) @ phi / 20
    expected = (pairwise @ values.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(relate_cells(theta, phi, values), expected, rtol=1e-12, atol=1e-12)


def normalized(block, maps, eps):
    """``nn.BatchNorm2d`` with the block's parameters."""
    norm = nn.BatchNorm2d(maps.shape[1], eps=eps).double()
    norm.weight, norm.bias = block.norm_weight, block.norm_bias
    return norm(maps)


def plain_non_local(block, level):
    """With a normalisation layer and the matrix of all pairs of cells."""
    pool = min(block.pool, *level.shape[-2:])
    phi, values = (F.max_pool2d(conv(level), pool).flatten(2) for conv in (block.phi, block.values))
    pairwise = block.theta(level).flatten(2).transpose(1, 2) @ phi / phi.shape[2]
    related = (pairwise @ values.transpose(1, 2)).transpose(1, 2).unflatten(2, level.shape[-2:])
    return level + normalized(block, block.out(related), 1e-5)


def plain_glore(block, level):
    """With a normalisation layer, and one cell and node at a time: nodes are weighted sums of cells and back."""
    weights = block.project(level).flatten(2)
    states = torch.einsum("bsn,bmn->bsm", block.reduce(level).flatten(2), weights)
    between = torch.einsum("km,bsm->bsk", block.mix_nodes.weight[:, :, 0], states) + block.mix_nodes.bias
    inside = torch.einsum("ts,bsm->btm", block.mix_states.weight[:, :, 0], (states + between).relu())
    back = torch.einsum("btm,bmn->btn", inside, weights).unflatten(2, level.shape[-2:])
    return level + normalized(block, block.extend(back), 1e-4)


def compare(block, plain):
    upstream, found = drawn(21, 2, 6, 7, 9), []
    for form in (block, lambda level: plain(block, level)):
        level = drawn(22, 2, 6, 7, 9).requires_grad_()
        block.zero_grad()
        output = form(level)
        (output * upstream).sum().backward()
        found.append([output.detach(), level.grad, *(parameter.grad.clone() for parameter in block.parameters())])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9 * float(found[1][1].abs().max()))


@pytest.mark.parametrize("pool", [1, 2, 3, 50])
def test_non_local_block_equals_its_plain_form_with_gradients(pool):
    compare(randomized(NonLocalBlock(6, 2, pool), 23), plain_non_local)


def test_non_local_block_is_the_identity_at_first_in_training_and_evaluation_mode():
    level = drawn(24, 2, 8, 5, 6)
    assert torch.equal(NonLocalBlock(8, 4, 2).double()(level), level)
    block = randomized(NonLocalBlock(8, 4, 2), 25)
    assert torch.equal(block.eval()(level), block.train()(level))


# --------------------------------------------------------------------------------------------------------- GloRe block


@pytest.mark.parametrize(("nodes", "states"), [(3, None), (4, 5), (1, 1)])
def test_glore_block_equals_its_plain_form_with_gradients(nodes, states):
    block = GloReBlock(6, nodes, states)
    assert block.reduce.out_channels == (2 * nodes if states is None else states)
    compare(randomized(block, 26), plain_glore)


def test_glore_block_is_the_identity_without_its_normalization_and_depends_on_no_mode():
    block, level = randomized(GloReBlock(8, 4), 27), drawn(28, 2, 8, 5, 6)
    assert torch.equal(block.eval()(level), block.train()(level))
    fresh = GloReBlock(8, 4)
    assert torch.equal(fresh.norm_weight, torch.ones(8))
    assert torch.equal(fresh.norm_bias, torch.zeros(8))
    nn.init.zeros_(fresh.norm_weight)
    assert torch.equal(fresh.double()(level), level)


@pytest.mark.parametrize("block", [NonLocalBlock(4, 2, 8), GloReBlock(4, 3)])
def test_a_single_value_does_not_fail(block):
    block = randomized(block, 29)
    level = drawn(30, 1, 4, 1, 1).requires_grad_()
    output = block(level)
    torch.testing.assert_close(output, level + block.norm_bias[:, None, None])
    output.square().sum().backward()
    assert bool(torch.isfinite(level.grad).all())


@pytest.mark.parametrize("block", [NonLocalBlock(6, 2, 2), GloReBlock(6, 3)])
def test_doubled_batches_change_nothing_and_cells_have_no_places(block):
    block, level = randomized(block, 31), drawn(32, 2, 6, 4, 4)
    twice = block(level.repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice, block(level).repeat(2, 1, 1, 1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block(level.transpose(2, 3)), block(level).transpose(2, 3), rtol=1e-10, atol=1e-10)
