import math

import pytest

from detdistill.data.flags import is_id, truth, whole


@pytest.mark.parametrize("value", [0, 0.0, False, None, "0", "0.0", "false", " False ", "NO", "n", "off"])
def test_false(value):
    assert truth(value) is False


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "1.0", "true", " True", "Yes", "y", "on"])
def test_true(value):
    assert truth(value) is True


@pytest.mark.parametrize("value", [2, -1, 0.5, math.nan, "", "2", "maybe", "nan", [], [0], {}])
def test_neither(value):
    assert truth(value) is None


def test_ids_and_whole_numbers():
    assert [value for value in (1, 2.5, "a", True, math.nan, math.inf, "", " ", None, [1]) if is_id(value)] == [1, 2.5, "a"]
    assert [whole(value) for value in (3, 3.0, "3", "3.0", 3.5, "x", True, math.inf, None)] == [3, 3, 3, 3, *[None] * 5]
