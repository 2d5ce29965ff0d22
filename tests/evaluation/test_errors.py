"""Each kind of error by hand, with the AP50 it costs; and the analysis starts from COCO's own AP50."""

import numpy as np
import pytest

from detdistill.evaluation import ERRORS, KINDS, coco_scores, detection_errors
from detdistill.evaluation import errors as analysis
from detdistill.evaluation.errors import sort_errors
from tests.evaluation.test_scores import CLASSES, random_case

HALF = 51 / 101
"""AP of precision 1 up to recall 0.5, by 101 points: 0, 0.01, ..., 0.5."""
A, B = [0, 0, 10, 10], [50, 50, 10, 10]
"""Two objects, far from each other."""


def truth(*objects):
    """One image; an object is class, box, and perhaps crowd."""
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": int(bool(crowd))}
        for i, (label, box, *crowd) in enumerate(objects)
    ]
    names = [{"id": i + 1, "name": name} for i, name in enumerate("ab")]
    image = {"id": 1, "width": 100, "height": 100, "file_name": ""}
    return {"info": {}, "images": [image], "annotations": annotations, "categories": names}


def found(*detections):
    """Class, box, score; all in the image 1."""
    return [{"image_id": 1, "category_id": label, "bbox": box, "score": score} for label, box, score in detections]


def lost(objects, detections):
    """AP50, and what costs something."""
    given = truth(*objects), found(*detections), ("a", "b")
    errors = detection_errors(*given)
    assert tuple(errors) == ERRORS
    assert sort_errors(*given).ap50() == pytest.approx(coco_scores(*given).metrics["AP50"])
    return sort_errors(*given).ap50(), {name: value for name, value in errors.items() if value}


def test_perfect_detections_lose_nothing():
    assert lost([(1, A), (2, B)], [(1, A, 0.9), (2, B, 0.8)]) == (1.0, {})


def test_background_before_a_hit():
    """Precision 1/2 at all recalls; a box with IoU 10 / 190 is still background."""
    for nothing in ([80, 80, 10, 10], [0, 9, 10, 10]):
        assert lost([(1, A)], [(1, nothing, 0.9), (1, A, 0.8)]) == (0.5, {"Bkg": 0.5, "FalsePos": 0.5})


def test_duplicate_before_another_hit():
    """Hits at ranks 1 and 3 of 3: precision 1 to recall 0.5, then 2/3."""
    before = (51 + 50 * 2 / 3) / 101
    ap, errors = lost([(1, A), (1, B)], [(1, A, 0.9), (1, [0, 0, 10, 9], 0.8), (1, B, 0.7)])
    assert ap == pytest.approx(before)
    assert errors == pytest.approx({"Dupe": 1 - before, "FalsePos": 1 - before})


def test_localization_makes_a_hit_of_the_best_and_suppresses_the_rest():
    """IoU 0.3 twice: nothing is found, but B could be; without the loose boxes recall stays at one half."""
    ap, errors = lost([(1, A), (1, B)], [(1, A, 0.9), (1, [50, 50, 10, 3], 0.8), (1, [50, 50, 3, 10], 0.7)])
    assert ap == pytest.approx(HALF)
    # FalseNeg counts the found object only, after which the loose boxes come too late to matter.
    assert errors == pytest.approx({"Loc": 1 - HALF, "FalseNeg": 1 - HALF})


def test_loose_box_on_a_found_object_is_suppressed():
    ap, errors = lost([(1, A)], [(1, [0, 0, 10, 3], 0.9), (1, A, 0.8)])
    assert ap == 0.5
    assert errors == {"Loc": 0.5, "FalsePos": 0.5}


def test_wrong_class_moves_to_the_right_one():
    """Class a: nothing found. Class b: a false positive before its hit. Repaired: both are 1."""
    ap, errors = lost([(1, A), (2, B)], [(2, A, 0.9), (2, B, 0.8)])
    assert ap == 0.25
    # FalsePos leaves class a at 0; FalseNeg leaves it neither objects nor detections, which is 1.
    assert errors == pytest.approx({"Cls": 0.75, "FalsePos": 0.25, "FalseNeg": 0.5})


def test_wrong_class_of_a_found_object_is_suppressed():
    ap, errors = lost([(1, A), (2, B)], [(2, A, 0.9), (2, B, 0.8), (1, A, 0.7)])
    assert ap == 0.75
    assert errors == {"Cls": 0.25, "FalsePos": 0.25}


def test_wrong_class_and_loose_box_is_suppressed():
    """Nothing could find the object of class a: it is missed."""
    ap, errors = lost([(1, A), (2, B)], [(2, [0, 0, 10, 3], 0.9), (2, B, 0.8)])
    assert ap == 0.25
    # Class a without its object and without detections has 1.
    assert errors == {"Both": 0.25, "Miss": 0.5, "FalsePos": 0.25, "FalseNeg": 0.5}


def test_missed_objects_leave_the_count():
    ap, errors = lost([(1, A), (1, B)], [(1, A, 0.9)])
    assert ap == pytest.approx(HALF)
    assert errors == pytest.approx({"Miss": 1 - HALF, "FalseNeg": 1 - HALF})


def test_missed_class_with_false_positives_stays_at_zero():
    ap, errors = lost([(1, A), (2, B)], [(1, A, 0.9), (2, [80, 0, 5, 5], 0.5)])
    assert (ap, errors) == (0.5, {})
    found_all = sort_errors(truth((1, A), (2, B)), found((1, A, 0.9), (2, [80, 0, 5, 5], 0.5)), "ab")
    assert found_all.ap50(["Bkg", "Miss"]) == 1.0


def test_kinds_do_not_share_what_they_could_find():
    """A wrong class and a better-scored loose box on the same object: each kind repaired alone finds it."""
    ap, errors = lost([(1, A)], [(1, [0, 0, 10, 3], 0.9), (2, A, 0.8)])
    assert ap == 0
    assert errors == {"Cls": 0.5, "Loc": 1.0}  # the loose box stays before the repaired class


def test_kind_is_the_first_that_fits():
    objects = [(1, A), (2, [0, 0, 10, 6]), (2, B)]
    kinds = sort_errors(
        truth(*objects),
        found((1, A, 0.9), (2, [0, 0, 10, 6], 0.8), (1, [0, 0, 10, 5.5], 0.7), (2, [0, 0, 10, 2.5], 0.6), (2, A, 0.5)),
        "ab",
    )
    # The third is also a duplicate of A, the last also one of class b: both have IoU 0.5 or more with the other class's object.
    assert [KINDS[kind] if kind >= 0 else "hit" for kind in kinds.kind] == ["hit", "hit", "Cls", "Loc", "Cls"]
    assert kinds.missed.tolist() == [False, False, True]


def test_crowds_take_false_positives_of_their_class_and_are_never_missed():
    objects = [(1, A), (1, [40, 40, 40, 40], True)]
    inside = (1, [45, 45, 10, 10], 0.9)
    assert lost(objects, [inside, (1, A, 0.8)]) == (1.0, {})
    other = (2, [45, 45, 10, 10], 0.9)  # another class's, which has no ground truth and no AP
    assert lost(objects, [other, (1, A, 0.8)]) == (1.0, {})
    half_out = (1, [35, 40, 9, 10], 0.9)  # 4 of 9 are inside
    assert lost(objects, [half_out, (1, A, 0.8)]) == (0.5, {"Bkg": 0.5, "FalsePos": 0.5})


def test_without_detections_all_is_missed_and_without_objects_there_is_nothing_to_say():
    assert detection_errors(truth((1, A), (2, B)), [], "ab") == dict.fromkeys(ERRORS, 0.0) | {"Miss": 1.0, "FalseNeg": 1.0}
    assert detection_errors(truth(), found((1, A, 0.9)), "ab") == {}
    assert detection_errors(truth((1, A, True)), found((1, A, 0.9)), "ab") == {}
    assert detection_errors(truth(), [], "ab") == {}


@pytest.mark.parametrize("seed", range(4))
def test_starts_from_the_ap50_of_coco_and_ends_at_one(seed, monkeypatch):
    case = random_case(seed), CLASSES
    monkeypatch.setattr(analysis, "PAIRS_AT_ONCE", 100)
    sorted_errors = sort_errors(*case[0], CLASSES)
    assert sorted_errors.ap50() == pytest.approx(coco_scores(*case[0], CLASSES).metrics["AP50"], abs=1e-9)
    assert sorted_errors.ap50(KINDS) == 1.0
    assert sorted_errors.ap50(["FalsePos", "FalseNeg"]) == 1.0
    assert all(value >= 0 for value in detection_errors(*case[0], CLASSES).values())
    assert np.array_equal(sorted_errors.kind == analysis.NO_ERROR, sorted_errors.hit)


def test_more_than_a_hundred_detections_of_an_image():
    case = random_case(10, images=3, per_image=700)
    assert sort_errors(*case, CLASSES).ap50() == pytest.approx(coco_scores(*case, CLASSES).metrics["AP50"], abs=1e-9)


def test_equals_the_released_code():
    """tidecv 1.0.1 (dbolya/tide) with its plots cut out, pycocotools 2.0; scores without ties, whose order it leaves open."""
    data, results = random_case(3, crowd=0.0, images=30)
    generator = np.random.default_rng(3)
    results = [{**one, "score": one["score"] + 1e-3 * generator.random()} for one in results]
    results = [one for one in results if one["category_id"] != 3]  # it counts a class without ground truth as AP 0
    errors = sort_errors(data, results, CLASSES)
    counts = {"Cls": 11, "Loc": 64, "Both": 18, "Dupe": 51, "Bkg": 353}
    assert {name: int((errors.kind == KINDS.index(name)).sum()) for name in counts} == counts
    assert int(errors.missed.sum()) == 47
    recorded = {
        "Cls": 0.093245, "Loc": 5.111351, "Both": 0.104730, "Dupe": 0.160813, "Bkg": 10.303206, "Miss": 7.642896,
        "FalsePos": 29.818618, "FalseNeg": 12.897784,
    }  # fmt: skip
    assert 100 * errors.ap50() == pytest.approx(8.795243, abs=1e-5)
    # Its points of recall are k/100, ours numpy's linspace as in pycocotools: a last bit moves a point now and then.
    lost = {name: 100 * value for name, value in detection_errors(data, results, CLASSES).items()}
    assert lost == pytest.approx(recorded, abs=0.01)
