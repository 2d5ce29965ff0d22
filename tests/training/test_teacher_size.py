"""``teacher_size``: the teacher sees the same views at its own, larger size."""

import dataclasses

import pytest
import torch

from detdistill.cache.identity import views_lacking, views_of
from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import batches_of, sights
from detdistill.detectors.contract import PREDICTION, Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.shared.compose import build_method, check_teacher_size
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.structures import Clock
from tests.tiny import TinyDense, TinyQueries, TinyRegions

VIEWS = ViewSettings(size=64, teacher_size=128)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits:train=6,val=2,size=160,seed=0").train


def batches(data, settings, **changes):
    return list(DetectionLoader(data, settings, 3, train=True, **changes))


@pytest.mark.parametrize("settings", [VIEWS, dataclasses.replace(VIEWS, colour=0.5, scale_jitter=(0.6, 1.6), teacher_size=96)])
def test_both_sizes_show_the_same_view(digits, settings):
    factor = settings.teacher_size / settings.size
    for batch in batches(digits, settings):
        large = batch.large
        assert batch.enlarged == factor
        assert large.padding_hw == (settings.teacher_size, settings.teacher_size)
        assert batch.ids == large.ids
        for index, (mine, theirs) in enumerate(zip(batch.views, large.views, strict=True)):
            assert (mine.flip, mine.photometric) == (theirs.flip, theirs.photometric)
            one, other = batch.targets[index], large.targets[index]
            assert torch.equal(one.labels, other.labels)
            # Boxes agree by way of the original, up to the pixel by which a crop may be shifted; those at an edge are cut there.
            inside = ((one.boxes_xyxy > 1) & (one.boxes_xyxy < 63)).all(dim=1)
            there, here = (view.to_original(t.boxes_xyxy[inside].double()) for view, t in ((theirs, other), (mine, one)))
            torch.testing.assert_close(there, here, rtol=0, atol=1e-3)


def test_the_larger_picture_is_made_of_the_original_pixels(digits):
    """Averaged down it is the smaller one; it has more detail than the smaller one enlarged."""
    plain = dataclasses.replace(VIEWS, flip=0.0)
    batch = batches(digits, plain)[0]
    down = torch.nn.functional.avg_pool2d(batch.large.images, 2)
    assert float((down - batch.images).abs().mean()) < 0.02
    up = torch.nn.functional.interpolate(batch.images, scale_factor=2, mode="bilinear")
    assert float((batch.large.images - up).abs().mean()) > 2 * float((down - batch.images).abs().mean())


def test_the_students_batches_stay_as_they_are(digits):
    settings = dataclasses.replace(VIEWS, colour=0.5, scale_jitter=(0.6, 1.6))
    for alone, both in zip(
        batches(digits, dataclasses.replace(settings, teacher_size=None)), batches(digits, settings, in_memory=True), strict=True
    ):
        assert alone.large is None
        assert torch.equal(alone.images, both.images)
        assert alone.views == both.views
        assert all(torch.equal(a.boxes_xyxy, b.boxes_xyxy) for a, b in zip(alone.targets, both.targets, strict=True))


def test_evaluation_has_one_size(digits):
    assert all(batch.large is None for batch in DetectionLoader(digits, VIEWS, 3, train=False))


def test_maps_of_the_larger_view_teach_on_the_students_cells(digits):
    """What a teacher's maps are on the larger images, averaged over the cells of the smaller ones."""
    batch = batches(digits, VIEWS)[0]
    teacher, student = Teacher(TinyDense(classes=digits.classes, seed=1)), TinyDense(classes=digits.classes, seed=2)
    method = build_method("pkd", teacher, student)
    taught = teach_by_canvas(method, batch)
    for level, own in zip(taught.features.maps, teacher.detector.features(batch.large).maps, strict=True):
        torch.testing.assert_close(level, torch.nn.functional.avg_pool2d(own, 2))
    losses = method.step(student, batch, taught, Clock(0, 1))
    assert bool(torch.isfinite(losses.total()))


SERVED = {
    TinyDense: [
        *("bckd", "defeat,head=cells", "fgfi", "frs", "gid,box_distance=giou", "glamd", "pgd", "rm_pfi", "tbd", "unikd"),
        "fgfi+unikd+bckd",
    ],
    TinyRegions: ["frs", "fgfi", "unikd", "gid,box_distance=giou"],
    TinyQueries: ["detrdistill", "unikd", "matched+pkd"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SERVED.items() for text in texts])
def test_methods_on_maps_and_predictions_learn_from_the_larger_view(digits, kind, text):
    check_teacher_size(text)
    batch = batches(digits, dataclasses.replace(VIEWS, teacher_size=96))[0]
    teacher, student = kind(classes=digits.classes, seed=1), kind(classes=digits.classes, seed=2)
    method = build_method(text, Teacher(teacher), student)
    for stage in method.stages(student)[:-1]:
        stage.step(batch, None, Clock(0, 1)).total().backward()
    losses = method.step(student, batch, teach_by_canvas(method, batch), Clock(5, 10))
    losses.total().backward()
    assert bool(torch.isfinite(losses.total()))
    assert losses.terms.keys() - student.loss(student.observe(batch).prediction, batch).terms.keys()


def test_extractors_read_the_larger_maps_themselves(digits):
    batch = batches(digits, VIEWS)[0]
    teacher, student = Teacher(TinyDense(classes=digits.classes, seed=1)), TinyDense(classes=digits.classes, seed=2)
    method = build_method("unikd,queries=4", teacher, student)
    taught, alone = teach_by_canvas(method, batch), method.teach(batch.large)
    assert torch.equal(taught.content, alone.content)
    assert torch.equal(taught.boxes_cxcywh01, alone.boxes_cxcywh01)


def test_predictions_of_the_larger_view_have_the_students_cells_and_pixels(digits):
    """At twice the size, the centre of the student's cell (r, c) is the corner of the cell (2 r + 1, 2 c + 1)."""
    batch = batches(digits, VIEWS)[0]
    teacher = TinyDense(classes=digits.classes, seed=1)
    own = teacher.observe(batch.large, PREDICTION).prediction
    seen = Teacher(teacher).observe(batch, PREDICTION).prediction
    mine = teacher.observe(batch, PREDICTION).prediction
    assert torch.equal(seen.cells, mine.cells)
    assert torch.equal(seen.levels, mine.levels)
    torch.testing.assert_close(seen.priors_xyxy, mine.priors_xyxy)
    for index, (level, cell) in enumerate(zip(mine.levels.tolist(), mine.cells.tolist(), strict=True)):
        there = (own.levels == level) & (own.cells == torch.tensor([2 * side + 1 for side in cell])).all(dim=1)
        torch.testing.assert_close(seen.logits[:, index], own.logits[:, there][:, 0])
        torch.testing.assert_close(seen.boxes_xyxy[:, index], own.boxes_xyxy[:, there][:, 0] / 2)


def test_queries_of_the_larger_view_teach_unchanged(digits):
    batch = batches(digits, VIEWS)[0]
    teacher, student = (TinyQueries(classes=digits.classes, seed=seed) for seed in (1, 2))
    method = build_method("matched+pkd", Teacher(teacher), student)
    taught = teach_by_canvas(method, batch).parts[0]
    alone = build_method("matched", Teacher(teacher), student).teach(batch.large)
    assert torch.equal(taught.boxes_cxcywh01, alone.boxes_cxcywh01)
    assert torch.equal(taught.known, alone.known)


def test_a_cache_fills_from_the_larger_views(digits):
    settings = dataclasses.replace(VIEWS, resize="short_side")
    wanted = sights(digits, settings)
    assert all(sight.teacher_hw is not None for sight in wanted)
    for group, batch in batches_of(digits, settings, wanted, 2):
        assert batch.large.padding_hw == group[0].teacher_hw
        assert [view.key for view in batch.views] == [sight.key.partition("/")[2] for sight in group]


def test_the_size_belongs_to_a_caches_identity():
    small = dataclasses.replace(VIEWS, teacher_size=None)
    assert "teacher_size" not in views_of(small)
    assert views_lacking(views_of(VIEWS), views_of(VIEWS)) == []
    assert views_lacking(views_of(VIEWS), views_of(small)) == ["teacher_size=none (the cache has 128)"]
    assert views_lacking(views_of(small), views_of(VIEWS)) == ["teacher_size=128 (the cache has none)"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher_size": 64}, "teacher_size=64 must be a whole number of pixels, more than size=64"),
        ({"mosaic": 0.5}, "teacher_size cannot be combined with mosaic; leave one of them out"),
    ],
)
def test_sizes_out_of_range(changes, expected):
    with pytest.raises(DetdistillError) as error:
        dataclasses.replace(VIEWS, **changes).validate()
    assert str(error.value) == expected
