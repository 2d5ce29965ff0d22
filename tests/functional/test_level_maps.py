import pytest
import torch

from detdistill import losses
from detdistill.errors import DetdistillError

MAPS = [torch.rand(2, 4, 6, 6), torch.rand(2, 4, 3, 3)]
BY_LEVEL = {
    "pkd_loss": losses.pkd_loss,
    "cwd_loss": losses.cwd_loss,
    "mgd_loss": losses.mgd_loss,
    "fitnet_loss": losses.fitnet_loss,
    "fitnet_normalized_loss": losses.fitnet_normalized_loss,
    "fitnet_modified_loss": lambda mine, theirs: losses.fitnet_modified_loss(mine, theirs, [torch.ones(2, 6, 6)] * len(mine)),
}
OF_ONE_LEVEL = {
    "fgd_terms": lambda mine, theirs: losses.fgd_terms(mine, theirs, *[torch.ones(2, 6, 6)] * 2, *[theirs] * 2),
    "fkd_feature_loss": lambda mine, theirs: losses.fkd_feature_loss(mine, theirs, torch.ones(2, 6, 6)),
    "fkd_attention": losses.fkd_attention,
    "detrdistill_feature_loss": lambda mine, theirs: losses.detrdistill_feature_loss(mine, theirs, torch.ones(2, 1, 6, 6)),
}


def test_all_losses_that_compare_maps_are_here():
    """A loss whose arguments are maps of student and teacher belongs into one of the two tables."""
    known = {name for name in dir(losses) if name.endswith(("_loss", "_terms", "_attention"))}
    assert {*BY_LEVEL, *OF_ONE_LEVEL} <= known


@pytest.mark.parametrize("name", BY_LEVEL)
def test_lists_of_maps_are_wanted_and_other_things_named(name):
    loss = BY_LEVEL[name]
    one = MAPS[:1]
    for mine, theirs, said in (
        (MAPS[0], one, rf"{name}: student is a tensor \[2, 4, 6, 6\]; give a list with a map per level: \[student\]"),
        (one, MAPS[0], rf"{name}: teacher is a tensor"),
        (MAPS, one, rf"{name}: 2 student maps and 1 teacher maps"),
        ([], [], rf"{name}: 0 student maps"),
        (["a"], one, rf"{name}: student is no list of tensors"),
        ([torch.rand(2, 1, 6, 6)], one, rf"{name}: level 0: .*\[2, 1, 6, 6\] .* differ in channels; .*Conv2d\(1, 4, 1\)"),
        ([torch.rand(1, 4, 6, 6)], one, rf"{name}: level 0: .* different numbers of images"),
        ([torch.rand(4, 6, 6)], one, rf"{name}: level 0: .* must be \[B, C, H, W\]"),
    ):
        with pytest.raises(DetdistillError, match=said):
            loss(mine, theirs)
    assert loss(one, one).isfinite()
    smaller = [torch.rand(2, 4, 3, 3)]
    if name in ("cwd_loss", "mgd_loss"):
        with pytest.raises(DetdistillError, match="differ in size; resize first"):
            loss(smaller, one)
    else:
        assert loss(smaller, one).isfinite()


@pytest.mark.parametrize("name", OF_ONE_LEVEL)
def test_single_maps_are_wanted_and_other_things_named(name):
    loss, one = OF_ONE_LEVEL[name], MAPS[0]
    for mine, said in (
        ([one], rf"{name}: student is a list, not a map \[B, C, H, W\]; call it for each level"),
        (torch.rand(2, 1, 6, 6), rf"{name}: .* differ in channels"),
        (torch.rand(2, 4, 3, 3), rf"{name}: .* differ in size"),
    ):
        with pytest.raises(DetdistillError, match=said):
            loss(mine, one)
    loss(one, one)
