import torch

from detdistill.structures import Assignment


def test_as_ignored_leaves_the_original_alone():
    assignment = Assignment(torch.tensor([[0, -1, 1]]))
    assert assignment.as_ignored(torch.tensor([[True, False, False]])).matched.tolist() == [[-2, -1, 1]]
    assert assignment.matched.tolist() == [[0, -1, 1]]
