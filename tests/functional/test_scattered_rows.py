import torch

from detdistill.functional.scattered_rows import scattered_rows


def test_rows_are_added_where_the_index_says_as_often_as_it_says():
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    index, weights = torch.tensor([[3, 0, 3], [0, 1, 1]]), torch.tensor([[1.0, 2.0, 0.5], [10.0, 1.0, -1.0]])
    assert scattered_rows(rows, index, weights, 5).tolist() == [[22.0, 220.0], [0.0, 0.0], [0.0, 0.0], [1.5, 15.0], [0.0, 0.0]]


def test_no_rows_add_nothing():
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert scattered_rows(torch.zeros(0, 3), none, none.float(), 2).tolist() == [[0.0] * 3] * 2


def test_one_place_for_each_row():
    found = scattered_rows(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1], [0], [1]]), torch.ones(3, 1), 2)
    assert found.tolist() == [[2.0], [5.0]]
