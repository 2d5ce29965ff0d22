"""What users give as models: names, paths and URLs."""

import pytest

from detdistill.detectors.adapters import adapter_names
from detdistill.given import local_copy


@pytest.mark.parametrize("adapter", adapter_names())
def test_a_model_string_with_an_absolute_path_is_no_url(adapter: str):
    assert local_copy(f"{adapter}:/home/me/best.pt") == f"{adapter}:/home/me/best.pt"
