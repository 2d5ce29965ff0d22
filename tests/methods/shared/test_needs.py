import dataclasses

import pytest
import torch

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import DenseCoding, HasBackboneFeatures, HasCopies, HasQueries, HasRegions, HasTowers, Teacher
from detdistill.detectors.probe import tiny_name
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.compose import build_method, method_slugs, serving_methods
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.needs import Needs, PairError, check_pair, why_not
from detdistill.structures import Clock, Look, Losses
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

TOWERS = "towers (a dense head that can be resumed)"
QUERIES = "queries (a decoder that accepts other queries)"


def softmax(student):
    student.spec = dataclasses.replace(student.spec, softmax=True)
    return student


def with_bins(detector):
    detector.spec = dataclasses.replace(detector.spec, box_bins=5)
    return detector


def of_maps(detector):
    detector.spec = dataclasses.replace(detector.spec, family="features")
    return detector


def absent(detector):
    teacher = Teacher(detector)
    return AbsentTeacher(detector.spec, teacher.fingerprint)


def refusal(needs, teacher, student):
    """The sentence, without its hint at other methods."""
    with pytest.raises(PairError) as error:
        check_pair("m", needs, teacher, student)
    text = str(error.value)
    assert text.startswith("m: ")
    assert "\n" not in text
    return text.removeprefix("m: ").partition("; methods that could serve this pair: ")[0]


@pytest.mark.parametrize(
    ("needs", "teacher", "student", "reason"),
    [
        (Needs(), None, TinyDense(), "it needs a teacher; give one with --teacher"),
        (
            Needs(teacher_families=("dense",), student_families=("dense", "queries")),
            Teacher(TinyDense()),
            TinyRegions(),
            "the student tinyregions:patches predicts regions; it needs a student that predicts dense or queries",
        ),
        (
            Needs(teacher_families=("dense",), student_families=("dense", "queries")),
            Teacher(TinyQueries()),
            TinyDense(),
            "the teacher tinyqueries:patches predicts queries; it needs a teacher that predicts dense",
        ),
        # All that a side lacks is named at once.
        (
            Needs(student_capabilities=(HasTowers, HasCopies, HasBackboneFeatures), teacher_capabilities=(HasRegions,)),
            Teacher(TinyRegions()),
            TinyQueries(),
            f"the student tinyqueries:patches lacks {TOWERS}, copies of neck and head",
        ),
        (
            Needs(teacher_capabilities=(HasRegions, HasQueries)),
            Teacher(TinyDense()),
            TinyDense(),
            f"the teacher tinydense:patches lacks regions (a region head on given boxes), {QUERIES}",
        ),
        # What is looked at must be shown.
        (
            Needs(teaching_capabilities=(HasQueries, HasRegions), advice={HasRegions: "use head=none"}),
            Teacher(TinyDense()),
            TinyDense(),
            f"the teacher tinydense:patches lacks {QUERIES}, regions (a region head on given boxes); use head=none",
        ),
        (
            Needs(student_capabilities=(HasQueries,), advice={HasRegions: "use head=none"}),
            Teacher(TinyDense()),
            TinyDense(),
            f"the student tinydense:patches lacks {QUERIES}",
        ),
        (
            Needs(student=Look(towers=(1,), attention=True), student_capabilities=(HasTowers,)),
            Teacher(TinyDense()),
            TinyRegions(),
            f"the student tinyregions:patches lacks {TOWERS}, {QUERIES}",
        ),
        (
            Needs(teacher=Look(attention=True)),
            Teacher(TinyDense()),
            TinyDense(),
            f"the teacher tinydense:patches lacks {QUERIES}",
        ),
        (
            Needs(student=Look(towers=(1, 3)), teacher=Look(towers=(2,))),
            Teacher(TinyDense()),
            TinyDense(),
            "it looks at the towers of the student tinydense:patches after 3 blocks, but they have 2; choose a smaller depth, or "
            "build the detector with more blocks",
        ),
        *(
            (
                needs,
                Teacher(of_maps(TinyDense())),
                TinyDense(),
                "it learns from predictions, but the teacher tinydense:patches outputs feature maps only; take a method on maps",
            )
            for needs in (Needs(teacher=Look(prediction=True)), Needs(same_classes=True))
        ),
        (
            Needs(box_distributions=True),
            Teacher(TinyDense()),
            with_bins(TinyDense()),
            "it compares distributions of box sides, but the teacher tinydense:patches predicts each side as one number; take "
            "detectors such as gfl, d_fine or deimv2",
        ),
        (
            Needs(same_classes=True),
            Teacher(TinyDense(classes=("a", "b", "c"))),
            TinyDense(classes=("a", "dog", "cat")),
            "it compares class scores, but the teacher does not know dog, cat; its classes: a, b, c",
        ),
        (
            Needs(outputs="same"),
            Teacher(TinyDense()),
            softmax(TinyDense()),
            "it compares class scores, but the teacher tinydense:patches has sigmoid and the student tinydense:patches softmax "
            "classes",
        ),
        (
            Needs(outputs="sigmoid"),
            Teacher(TinyRegions()),
            TinyDense(),
            "the teacher tinyregions:patches has softmax classes with a background, but the method compares sigmoid scores of "
            "single classes",
        ),
        (
            Needs(outputs="sigmoid"),
            Teacher(TinyDense()),
            TinyRegions(),
            "the student tinyregions:patches has softmax classes with a background, but the method compares sigmoid scores of "
            "single classes",
        ),
        (
            Needs(same_cells=True),
            Teacher(TinyDense(strides=(8, 32))),
            TinyDense(strides=(8, 16)),
            "it compares predictions cell by cell, but the student tinydense:patches has strides (8, 16) with (1, 1) anchors of "
            "a cell, the teacher tinydense:patches (8, 32) with (1, 1); take two detectors of one kind and equal levels=",
        ),
        (
            Needs(same_cells=True),
            Teacher(TinyQueries()),
            TinyDense(),
            "it compares predictions cell by cell, but the student tinydense:patches has strides (8, 16) with (1, 1) anchors of "
            "a cell, the teacher tinyqueries:patches (8, 16) with (); take two detectors of one kind and equal levels=",
        ),
        (
            Needs(same_cells=True),
            Teacher(TinyQueries()),
            TinyQueries(),
            "it compares predictions cell by cell, but the student tinyqueries:patches has strides (8, 16) with () anchors of a "
            "cell, the teacher tinyqueries:patches (8, 16) with (); take two detectors of one kind and equal levels=",
        ),
        (
            Needs(live_teacher="it asks the teacher about random boxes"),
            absent(TinyDense()),
            TinyDense(),
            "it asks the teacher about random boxes; give the teacher too (--teacher tinydense:patches)",
        ),
        (
            Needs(teacher_capabilities=(HasTowers,)),
            absent(TinyDense()),
            TinyDense(),
            f"it runs the teacher's own {TOWERS} when it learns, which no cache holds; give the teacher too (--teacher "
            "tinydense:patches)",
        ),
    ],
)
def test_what_a_pair_lacks_is_said_in_one_sentence(needs, teacher, student, reason):
    assert refusal(needs, teacher, student) == reason
    assert why_not(needs, teacher, student) == reason


def test_of_many_unknown_classes_the_first_are_named():
    many = tuple(f"x{index}" for index in range(14))
    text = refusal(Needs(same_classes=True), Teacher(TinyDense()), TinyDense(classes=many))
    assert text == "it compares class scores, but the teacher does not know x0, x1, x2, x3, x4, x5, ...; its classes: a, b"


def test_pairs_that_have_what_is_needed_pass():
    capabilities = Needs(student_capabilities=(HasTowers, HasCopies, HasBackboneFeatures), teacher_capabilities=(HasRegions,))
    check_pair("m", capabilities, Teacher(TinyRegions()), TinyDense())
    check_pair("m", Needs(same_classes=True), Teacher(TinyDense(classes=("a", "b", "c"))), TinyDense(classes=("c", "a")))
    check_pair("m", Needs(), Teacher(TinyDense()), TinyDense(classes=("x",)))
    check_pair("m", Needs(), Teacher(of_maps(TinyDense())), TinyDense())
    check_pair("m", Needs(outputs="same"), Teacher(TinyRegions()), TinyRegions())
    check_pair("m", Needs(teacher=Look(attention=True), student=Look(towers=(0,))), Teacher(TinyQueries()), TinyDense())
    # A teacher may have more levels, in another order of strides.
    check_pair("m", Needs(same_cells=True), Teacher(TinyDense(channels=(8,) * 3, strides=(4, 8, 16))), TinyDense())
    check_pair("m", Needs(teacher=None, student_families=("dense",)), None, TinyDense())
    # What a cache's teacher would have to show was looked at when the cache was filled.
    check_pair("m", Needs(teacher=Look(backbone=True, towers=(1,))), absent(TinyDense()), TinyDense())
    check_pair("m", Needs(teaching_capabilities=(HasRegions,)), absent(TinyDense()), TinyDense())


def test_equal_strides_with_other_anchors_are_not_the_same_cells():
    three = TinyDense()
    three.spec = dataclasses.replace(three.spec, anchors=(1, 3))
    assert "with (1, 3) anchors" in refusal(Needs(same_cells=True), Teacher(TinyDense()), three)
    assert "(8, 16) with (1, 3);" in refusal(Needs(same_cells=True), Teacher(three), TinyDense())
    check_pair("m", Needs(same_cells=True), Teacher(three), three)


def with_anchors(*levels, **more):
    """A detector with two anchors for each cell, whose sides are given for the strides 8 and 16."""
    detector = TinyDense(**more)
    anchors = tuple(len(level) for level in levels)
    detector.spec = dataclasses.replace(detector.spec, anchors=anchors, coding=DenseCoding(anchors_wh=levels))
    return detector


FINE, COARSE = ((8.0, 4.0), (4.0, 8.0)), ((40.0, 20.0), (20.0, 40.0))


def test_anchors_of_other_sides_are_named():
    student, needs = with_anchors(FINE, COARSE), Needs(same_cells=True, same_anchors=True)
    check_pair("m", needs, Teacher(with_anchors(FINE, COARSE)), student)
    check_pair("m", needs, Teacher(with_anchors(COARSE, FINE, strides=(16, 8))), student)
    other = Teacher(with_anchors(FINE, COARSE[::-1]))
    assert refusal(needs, other, student) == (
        "it compares predictions of equal anchors, but anchor 0 of stride 16 has 40x20 pixels in the student tinydense:patches "
        "and 20x40 in the teacher tinydense:patches; build both with the same anchors"
    )
    check_pair("m", Needs(same_cells=True), other, student)
    for levels in ((0,), (-2,)):
        check_pair("m", Needs(same_cells=True, same_anchors=levels), other, student)
    for levels in ((1,), (0, -1)):
        assert "anchor 0 of stride 16" in refusal(Needs(same_cells=True, same_anchors=levels), other, student)


@pytest.mark.parametrize(("width", "same"), [(40.059, True), (40.061, False), (39.941, True), (39.939, False)])
def test_sides_of_anchors_may_differ_a_little(width, same):
    """Half of 40 pixels may differ by a hundredth of a pixel and a thousandth."""
    teacher = Teacher(with_anchors(FINE, ((width, 20.0), (20.0, 40.0))))
    assert (why_not(Needs(same_anchors=True), teacher, with_anchors(FINE, COARSE)) == "") == same


def test_anchors_that_are_not_stated_or_alone_in_their_cell_are_not_compared():
    alone = [with_anchors(((side, side),), ((side, side),)) for side in (8.0, 16.0)]
    check_pair("m", Needs(same_cells=True, same_anchors=True), Teacher(alone[0]), alone[1])
    student, silent = with_anchors(FINE, COARSE), with_anchors(COARSE, FINE)
    silent.spec = dataclasses.replace(silent.spec, coding=None)
    for teacher, other in ((silent, student), (student, silent)):
        check_pair("m", Needs(same_cells=True, same_anchors=True), Teacher(teacher), other)


def test_a_cache_is_enough_unless_something_of_the_teachers_runs_while_learning():
    assert Needs(teacher=Look(prediction=True)).why_live() == ""
    assert Needs(live_teacher="it draws").why_live() == "it draws"
    assert Needs(live_teacher="it draws", teacher_capabilities=(HasTowers,)).why_live() == "it draws"
    assert Needs(teacher_capabilities=(HasTowers, HasQueries)).why_live() == (
        f"it runs the teacher's own {TOWERS}, {QUERIES} when it learns, which no cache holds"
    )


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(), ""),
        (Needs(teacher=None, same_cells=True), ""),
        (Needs(teacher=Look(towers=(1,), prediction=True), same_cells=True), ""),
        (Needs(teacher=Look(attention=True)), "it compares the teacher's attention to cells"),
        (Needs(live_teacher="it draws"), "it runs the teacher on the student's images when it learns"),
        (Needs(box_distributions=True), "it compares distributions over distances in pixels"),
        (Needs(one_size="it draws"), "it draws"),
    ],
)
def test_what_is_compared_decides_whether_the_teacher_may_see_images_of_another_size(needs, reason):
    assert needs.why_one_size() == reason


class Watching(Method):
    """Keeps the assignment that ``learn`` is shown."""

    slug, title, bibtex = "watching_toy", "a toy", ""

    def learn(self, student, seen, taught, batch, clock):
        self.assignment = seen.assignment
        return Losses({})


class Assigning(Watching):
    @classmethod
    def needs(cls, **settings):
        return Needs(assignment=True)


def test_the_students_assignment_is_shown_to_methods_that_need_it():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch()
    plain, assigning = Watching(teacher, student), Assigning(teacher, student)
    for method in (plain, assigning):
        method.step(student, batch, method.teach(batch), Clock(0, 10))
    assert plain.assignment is None
    assert torch.equal(assigning.assignment.matched, student.assign(student(batch).prediction, batch).matched)


PAIRS = {
    "alone": (None, TinyDense),
    "dense": (TinyDense, TinyDense),
    "regions": (TinyRegions, TinyRegions),
    "queries": (TinyQueries, TinyQueries),
    "dense to regions": (TinyDense, TinyRegions),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_methods_that_are_recommended_can_be_built_and_no_other(pair, monkeypatch):
    teacher, student = PAIRS[pair]
    check_recommended(None if teacher is None else Teacher(teacher(seed=1)), student(seed=2), monkeypatch)


@pytest.mark.parametrize(("teacher", "student"), [("gfl", "atss"), ("ssd", "ssdlite"), ("deformable_detr", "rt_detr")])
def test_so_are_those_for_detectors_that_differ_in_depth_anchors_or_maps(teacher, student, monkeypatch):
    classes = ("a", "b")
    built = [build_detector(tiny_name(name), classes) for name in (teacher, student)]
    check_recommended(Teacher(built[0]), built[1], monkeypatch)


def check_recommended(teacher, student, monkeypatch):
    sides = teacher, student
    serving = serving_methods(*sides)
    assert len(serving) > 2
    monkeypatch.setattr("detdistill.methods.shared.compose.serving_methods", lambda *_: serving)  # it takes a second
    built, refused = [], {}
    for slug in method_slugs():
        try:
            build_method(slug, *sides)
        except PairError as error:
            refused[slug] = str(error)
        else:
            built.append(slug)
    assert built == serving
    for slug, message in refused.items():
        assert message.startswith(f"{slug}: ")
        assert message.endswith(f"; methods that could serve this pair: {', '.join(serving)}")


def test_recommended_methods_are_others():
    others = [slug for slug in serving_methods(None, TinyDense()) if slug != "pkd"]
    with pytest.raises(PairError) as error:
        PKD(None, TinyDense())
    assert str(error.value) == (
        f"pkd: it needs a teacher; give one with --teacher; methods that could serve this pair: {', '.join(others)}"
    )
    assert "dicod" in others


def test_without_another_method_there_is_no_hint(monkeypatch):
    monkeypatch.setattr("detdistill.methods.shared.compose.serving_methods", lambda teacher, student: ["m"])
    with pytest.raises(PairError) as error:
        check_pair("m", Needs(), None, TinyDense())
    assert str(error.value) == "m: it needs a teacher; give one with --teacher"
