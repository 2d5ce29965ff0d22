import contextlib
import copy
import io

import numpy as np
import pytest

from detdistill.evaluation import METRICS, coco_scores

CLASSES = ("cat", "dog", "absent", "bird")
"""``absent`` never has ground truth."""


def reference(ground_truth, results):
    """The 12 numbers and the AP of each class by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.catIds = [1, 2, 3, 4]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = [values[values > -1].mean() if (values > -1).any() else -1.0 for values in np.moveaxis(precision, 2, 0)]
    return evaluation.stats, per_class


def random_case(seed, images=12, per_image=25, crowd=0.15):
    """Boxes of all three sizes, areas other than width times height, empty images, detections that hit, miss and tie."""
    generator = np.random.default_rng(seed)
    truth = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    results = []
    for image in range(images):
        image_id = 7 * image + 3
        truth["images"].append({"id": image_id, "file_name": f"{image}.jpg", "height": 480, "width": 640})
        boxes = []
        for _ in range(0 if image % 5 == 4 else generator.integers(1, 8)):
            width, height = np.exp(generator.uniform(np.log(8), np.log(250), 2))
            x, y = generator.uniform(0, 640 - width), generator.uniform(0, 480 - height)
            label = int(generator.choice([1, 2, 4]))
            boxes.append((label, [x, y, width, height]))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x, y, width, height],
                    "area": width * height * generator.uniform(0.3, 1.0),
                    "iscrowd": int(generator.random() < crowd),
                }
            )
        for _ in range(0 if image % 6 == 5 else per_image):
            if boxes and generator.random() < 0.7:
                label, box = boxes[generator.integers(len(boxes))]
                box = (np.array(box) * generator.uniform(0.85, 1.15, 4)).tolist()
                label = label if generator.random() < 0.8 else int(generator.integers(1, 5))
            else:
                label, box = int(generator.integers(1, 5)), [*generator.uniform(0, 400, 2), *generator.uniform(5, 200, 2)]
            score = round(float(generator.random()), 1)  # many ties
            results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return truth, results


def assert_equals_pycocotools(truth, results):
    stats, per_class = reference(truth, results)
    scores = coco_scores(truth, results, CLASSES)
    assert tuple(scores.metrics) == METRICS
    np.testing.assert_allclose(list(scores.metrics.values()), stats, rtol=0, atol=1e-6)
    assert tuple(scores.per_class) == CLASSES
    np.testing.assert_allclose(list(scores.per_class.values()), per_class, rtol=0, atol=1e-6)
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(seed):
    scores = assert_equals_pycocotools(*random_case(seed))
    assert 0.005 < scores.metrics["AP"] < 0.9
    assert scores.per_class["absent"] == -1
    assert scores.images == 12


def test_more_than_a_hundred_detections_of_an_image():
    assert_equals_pycocotools(*random_case(10, images=3, per_image=700))


def test_without_crowds_and_with_nothing_but_crowds():
    assert_equals_pycocotools(*random_case(11, crowd=0.0))
    truth, results = random_case(12, crowd=1.0)
    scores = assert_equals_pycocotools(truth, results)
    assert set(scores.metrics.values()) == {-1.0}


def test_sizes_without_ground_truth_are_undefined():
    truth, results = random_case(13)
    for annotation in truth["annotations"]:
        annotation["area"] = 50.0
    scores = assert_equals_pycocotools(truth, results)
    assert scores.metrics["APl"] == scores.metrics["ARm"] == -1
    assert scores.metrics["APs"] >= 0


def test_no_results_score_zero_where_there_is_ground_truth():
    truth, _ = random_case(14)
    truth["annotations"] = [{**annotation, "area": 50.0} for annotation in truth["annotations"] if annotation["category_id"] != 4]
    scores = coco_scores(truth, [], CLASSES)
    stats, per_class = reference(truth, [{"image_id": 3, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.0}])
    np.testing.assert_allclose(list(scores.metrics.values()), stats)
    np.testing.assert_allclose(list(scores.per_class.values()), per_class)
    assert scores.metrics["AP"] == scores.metrics["APs"] == 0
    assert scores.metrics["APl"] == -1


def test_no_ground_truth_is_undefined():
    truth, results = random_case(15)
    scores = coco_scores({**truth, "annotations": []}, results, CLASSES)
    assert set(scores.metrics.values()) == {-1.0}
    assert scores.per_class == dict.fromkeys(CLASSES, -1.0)
    assert coco_scores({**truth, "annotations": []}, [], CLASSES).metrics == scores.metrics


def test_perfect_detections_score_one():
    truth, _ = random_case(16, crowd=0.0)
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
    ]
    scores = coco_scores(truth, results, CLASSES)
    assert scores.metrics["AP"] == pytest.approx(1.0)
    assert scores.metrics["AR100"] == pytest.approx(1.0)
    assert scores.per_class == pytest.approx({"cat": 1.0, "dog": 1.0, "absent": -1.0, "bird": 1.0})


def test_the_input_is_left_as_it_was_and_nothing_is_printed(capsys):
    truth, results = random_case(17)
    before = copy.deepcopy((truth, results))
    coco_scores(truth, results, CLASSES)
    assert (truth, results) == before
    assert capsys.readouterr().out == ""
