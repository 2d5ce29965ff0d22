import itertools

import pytest
import torch

from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import batches_of, endless, key_of, sights, variants
from detdistill.errors import RunError


@pytest.fixture(scope="module")
def data():
    return load_data("digits:train=6,val=2,size=96,seed=3").train


def test_views_are_those_that_training_draws_pixel_for_pixel(data):
    settings = ViewSettings(size=64, flip=0.5, scales=(0.5, 1.0, 1.5))
    chosen = sights(data, settings)
    assert len(chosen) == 6 * 2 * 3
    assert len({sight.key for sight in chosen}) == 36
    made = {}
    for group, batch in batches_of(data, settings, chosen, batch_size=4):
        assert {batch.padding_hw} == {sight.canvas_hw for sight in group}
        for index, sight in enumerate(group):
            assert sight.key == key_of(batch.ids[index], batch.views[index].key)
            height, width = batch.views[index].size_hw
            made[sight.key] = (batch.images[index, :, :height, :width], batch.targets[index].boxes_xyxy)
    assert made.keys() == {sight.key for sight in chosen}
    loader = DetectionLoader(data, settings, 3, train=True, in_memory=True)
    drawn = set()
    for batch in itertools.chain.from_iterable(loader for _ in range(6)):
        for index, view in enumerate(batch.views):
            pixels, boxes = made[key_of(batch.ids[index], view.key)]
            assert torch.equal(batch.images[index, :, : view.size_hw[0], : view.size_hw[1]], pixels)
            assert torch.equal(batch.targets[index].boxes_xyxy, boxes)
            drawn.add(key_of(batch.ids[index], view.key))
    assert len(drawn) > 15, "training draws many of them"


def test_variants_and_what_has_none():
    assert [kind.flip for kind in variants(ViewSettings(flip=0.3))] == [0.0, 1.0]
    assert [kind.flip for kind in variants(ViewSettings(flip=0.0))] == [0.0]
    assert [(kind.flip, kind.scales) for kind in variants(ViewSettings(flip=1.0, scales=(1.0, 2.0)))] == [
        (1.0, (1.0,)),
        (1.0, (2.0,)),
    ]
    assert endless(ViewSettings(scales=(0.5, 1.0))) == []
    assert endless(ViewSettings(colour=0.2, scale_jitter=(0.5, 1.5), mosaic=1)) == [
        "colour=0.2",
        "scale_jitter=0.5,1.5",
        "mosaic=1",
    ]


def test_scales_that_cannot_be_are_refused():
    for wrong in (ViewSettings(scales=(1.0, 1.0)), ViewSettings(scales=(0.0,)), ViewSettings(scales=(1.0,), mosaic=0.5)):
        with pytest.raises(RunError, match="scales"):
            wrong.validate()
