"""What the tests of the multi-scale DETR families share: each family runs every test of ``DeformableTests``."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert
from transformers import AutoModelForObjectDetection

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import HasBackboneFeatures, HasCopies, HasQueries, Teacher
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.structures import Assignment, Batch, Features, Look, map_tensors
from tests.detectors.dense.shared import EMPTY, FULL, target, unequal_batch
from tests.detectors.queries.shared import CLASSES, easy_batch

SMALL = "resnet10t,channels=8-16-32-64,stem=8,dim=32,queries=30,encoder=1,decoder=3,heads=4,ffn=64,levels=3-5"
KEPT = ((0, 1, 2), (1,), ())
"""The boxes of ``unequal_batch`` that are no crowd."""


def labels_of(batch, frames, kept=KEPT):
    """By hand: boxes without crowd, as cxcywh in parts of each image's frame (height, width)."""
    labels = []
    for one, rows, (height, width) in zip(batch.targets, kept, frames, strict=True):
        boxes = box_convert(one.boxes_xyxy[list(rows)], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        labels.append({"class_labels": one.labels[list(rows)], "boxes": boxes})
    return labels


def shaken(detector, scale=0.05):
    """All parameters moved a little: nothing is at its symmetric start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return detector


def doubled(batch):
    return map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


class DeformableTests:
    """Derive, and give the family's name, options and image processor."""

    family: str
    options = ""
    processor: type
    exact = True
    """The library's own loss runs in float64."""
    queries = 30
    rows = 3
    """Rows of cells of stride 32 that show an image of 64 pixels on one of 100: rows begin at pixels 0, 25, 50, 75."""
    classification = "loss_ce"
    not_compared: tuple[str, ...] = ()
    """Endings of our terms that the library lacks."""
    unreached: tuple[str, ...] = ()
    """Parameters that a batch without boxes does not reach (parts of their names)."""

    @pytest.fixture(scope="class")
    def name(self):
        return f"{self.family}:{SMALL}{self.options}"

    @pytest.fixture(scope="class")
    def built(self, name):
        """The detector, built once for all tests of the class, and the random state after that."""
        torch.manual_seed(0)
        return shaken(build_detector(name, CLASSES)), torch.get_rng_state()

    @pytest.fixture
    def detector(self, built):
        detector, state = built
        torch.set_rng_state(state)
        return copy.deepcopy(detector)

    # ------------------------------------------------------------------- what the library wants; families may differ

    def frames(self, detector, batch):
        """What the library's boxes are relative to: height and width for each image."""
        return batch.sizes.tolist()

    def inputs(self, detector, batch):
        return {"pixel_values": detector.normalized(batch), "pixel_mask": (~batch.padding_mask()).long()}

    def weight(self, detector, name):
        return detector.term_weights()[name.removesuffix("_enc").rstrip("_0123456789")]

    def boxes_of_library(self, detector, prediction, batch):
        """[L, B, N, 4] in the library's own coordinates."""
        valid = batch.sizes.flip(1).repeat(1, 2)[:, None]
        frame = torch.tensor(self.frames(detector, batch)).flip(1).repeat(1, 2)[:, None]
        return prediction.boxes_cxcywh01 * valid / frame

    # ------------------------------------------------------------------------------------------- equal to the library

    @pytest.mark.parametrize("targets", [FULL, (FULL[2], FULL[0], FULL[2])], ids=["full", "one"])
    def test_losses_and_gradients_equal_the_librarys(self, detector, targets):
        kept = KEPT if targets is FULL else ((), (0, 1, 2), ())
        batch = unequal_batch(targets)
        if self.exact:
            detector, batch = detector.double(), doubled(batch)
        library = copy.deepcopy(detector.model)
        torch.manual_seed(1)  # dropout and denoising
        losses = detector.loss(detector(batch).prediction, batch)
        torch.manual_seed(1)
        labels = labels_of(batch, self.frames(detector, batch), kept)
        theirs = library(**self.inputs(detector, batch), labels=labels)
        mine = {name: term for name, term in losses.terms.items() if not name.endswith(self.not_compared or "?")}
        assert mine.keys() == {name for name in theirs.loss_dict if not name.startswith("cardinality")}
        close = {"rtol": 1e-10, "atol": 1e-12} if self.exact else {"rtol": 1e-5, "atol": 1e-6}
        for name, term in mine.items():
            torch.testing.assert_close(term, theirs.loss_dict[name] * self.weight(detector, name), **close, msg=name)
            assert bool(term != 0) or name.startswith("loss_ddf"), name
        total = torch.stack(list(mine.values())).sum()
        torch.testing.assert_close(total, theirs.loss, **close)
        total.backward()
        theirs.loss.backward()
        close = {"rtol": 1e-8, "atol": 1e-10} if self.exact else {"rtol": 2e-3, "atol": 1e-4}
        compared = 0
        for (name, one), other in zip(detector.model.named_parameters(), library.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, **close, msg=name)
                compared += 1
        assert compared > 100
        for one, other in zip(detector.model.buffers(), library.buffers(), strict=True):
            assert torch.equal(one, other)  # running statistics

    def check_logits(self, mine, theirs):
        assert torch.equal(mine, theirs)

    def test_detections_equal_the_librarys(self, detector):
        detector.eval()
        batch = unequal_batch()
        with torch.no_grad():
            prediction = detector(batch).prediction
            outputs = detector.model(**self.inputs(detector, batch))
        self.check_logits(prediction.logits[-1], outputs.logits)
        torch.testing.assert_close(
            self.boxes_of_library(detector, prediction, batch)[-1], outputs.pred_boxes, rtol=1e-5, atol=1e-6
        )
        threshold = float(outputs.logits.sigmoid().median())
        detector.score = threshold
        sizes = torch.tensor(self.frames(detector, batch))
        theirs = self.processor().post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        for image, (mine, other) in enumerate(zip(detector.detect(prediction, batch), theirs, strict=True)):
            height, width = batch.sizes[image].tolist()
            assert len(mine) > 10
            torch.testing.assert_close(mine.scores, other["scores"])
            assert torch.equal(mine.labels, other["labels"])
            limit = torch.tensor([width, height, width, height])
            torch.testing.assert_close(mine.boxes_xyxy, other["boxes"].clamp(min=0).minimum(limit), rtol=1e-5, atol=1e-4)
            scores = prediction.logits[-1, image, mine.origin.anchor, mine.labels].sigmoid()
            torch.testing.assert_close(scores, mine.scores)

    # ------------------------------------------------------------------------------------------------ training details

    def test_without_any_box(self, detector):
        batch = unequal_batch(EMPTY)
        prediction = detector(batch).prediction
        assert bool((detector.assign(prediction, batch).matched == -1).all())
        losses = detector.loss(prediction, batch)
        losses.total().backward()
        assert float(losses.terms["loss_bbox"].detach()) == 0
        assert float(losses.terms[self.classification].detach()) > 0
        for name, parameter in detector.named_parameters():
            if parameter.requires_grad and not any(part in name for part in self.unreached):
                assert parameter.grad is not None, name
                assert bool(torch.isfinite(parameter.grad).all()), name

    def test_assignment_is_one_to_one_over_trainable_boxes_and_draws_nothing(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        state = torch.get_rng_state()
        matched = detector.assign(prediction, batch).matched
        assert torch.equal(torch.get_rng_state(), state)
        assert matched.shape == (3, 3, self.queries)
        for layer in matched:
            assert sorted(layer[0][layer[0] >= 0].tolist()) == [0, 1, 2]
            assert layer[1][layer[1] >= 0].tolist() == [1]  # box 0 is a crowd
            assert bool((layer[2] == -1).all())

    def test_own_assignment_given_back_changes_nothing(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        own = detector.loss(prediction, batch).terms
        assignment = detector.assign(prediction, batch)
        ones = Assignment(assignment.matched, weights=torch.ones(assignment.matched.shape))
        for given in (detector.loss(prediction, batch, assignment).terms, detector.loss(prediction, batch, ones).terms):
            for name, term in given.items():
                torch.testing.assert_close(term, own[name], rtol=1e-5, atol=1e-6)

    def layer_terms(self, prediction):
        """Term suffix of each decoder layer whose class and box are trained: by number."""
        return {0: "_0", 1: "_1", 2: ""}

    def test_foreign_matches_go_through_the_librarys_formula(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        matched = torch.full(prediction.logits.shape[:3], -1)
        matched[:, 0, [4, 9, 20]] = torch.tensor([2, 0, 0])  # a box twice, another not at all
        matched[:, 1, 3] = 1
        indices = [
            (torch.tensor([4, 9, 20]), torch.tensor([2, 0, 0])),
            (torch.tensor([3]), torch.tensor([0])),
            (torch.tensor([], dtype=torch.int64),) * 2,
        ]
        criterion, labels = detector.criterion(), labels_of(batch, self.frames(detector, batch))
        mine = detector.loss(prediction, batch, Assignment(matched)).terms
        boxes = self.boxes_of_library(detector, prediction, batch)
        for layer, suffix in self.layer_terms(prediction).items():
            outputs = {"logits": prediction.logits[layer], "pred_boxes": boxes[layer].clamp(0, 1)}
            for kind in criterion.losses[:2]:
                for name, value in criterion.get_loss(kind, outputs, labels, indices, 4).items():
                    expected = value * self.weight(detector, name)
                    torch.testing.assert_close(mine[name + suffix], expected, rtol=1e-5, atol=1e-6)

    def test_weights_ignored_and_normalizer(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        own = detector.assign(prediction, batch)
        plain = detector.loss(prediction, batch, own).terms
        twice = detector.loss(prediction, batch, Assignment(own.matched, weights=torch.full(own.matched.shape, 2.0))).terms
        half = detector.loss(prediction, batch, Assignment(own.matched, normalizer=torch.tensor(8.0))).terms
        ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
        for suffix in self.layer_terms(prediction).values():
            for kind in (self.classification, "loss_bbox", "loss_giou"):
                name = kind + suffix
                torch.testing.assert_close(twice[name], 2 * plain[name], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(half[name], plain[name] / 2, rtol=1e-5, atol=1e-6)  # four boxes
                if kind == self.classification:
                    assert 0 < float(ignored[name].detach()) < float(plain[name].detach())
                else:
                    torch.testing.assert_close(ignored[name], plain[name], rtol=1e-5, atol=1e-6)

    def test_positives(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        positives = detector.positives(prediction, detector.assign(prediction, batch), batch)
        assert positives.layer.bincount().tolist() == [4, 4, 4]
        second = positives.image == 1
        assert torch.equal(positives.targets_xyxy[second], batch.targets[1].boxes_xyxy[[1, 1, 1]])
        boxes = prediction.boxes_cxcywh01[positives.layer[second], 1, positives.index[second]]
        expected = box_convert(boxes * torch.tensor([70.0, 90.0, 70.0, 90.0]), "cxcywh", "xyxy")  # image 1 is 90 x 70
        torch.testing.assert_close(positives.boxes_xyxy[second], expected)
        positives.boxes_xyxy.sum().backward()
        last = [p for name, p in detector.named_parameters() if "decoder" in name or "bbox_embed" in name]
        assert sum(float(parameter.grad.abs().sum()) for parameter in last if parameter.grad is not None) > 0

    def test_mixed_precision(self, detector):
        batch = unequal_batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = detector(batch).prediction
            losses = detector.loss(prediction, batch)
        assert prediction.boxes_cxcywh01.dtype == prediction.logits.dtype == torch.float32
        losses.total().backward()
        assert bool(torch.isfinite(losses.total().detach()))
        assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters() if p.grad is not None)

    # --------------------------------------------------------------------------------------------- features and queries

    def test_features_alone_are_enough(self, detector):
        batch = unequal_batch()
        detector.eval()
        with torch.no_grad():
            features = detector.features(batch)
            again = Features.stack(features.split(3))
            assert torch.equal(detector.predict(again, batch).logits, detector.predict(features, batch).logits)
        assert features.channels == detector.spec.channels == (32,) * 3
        assert features.strides == detector.spec.strides == (8, 16, 32)
        assert features.padding[2][2].tolist() == [[False, False, True, True]] * self.rows + [[True] * 4] * (4 - self.rows)

    def test_foreign_queries_leave_the_own_result_alone(self, detector):
        batch = unequal_batch()
        assert isinstance(detector, HasQueries)
        with torch.no_grad():
            statistics = [buffer.clone() for buffer in detector.buffers()]
            features = detector.features(batch)
            counted = [buffer.clone() for buffer in detector.buffers()]
            seed = detector.seed(features, batch)
            detector.decode(features, seed, batch)
            moved = [
                not torch.equal(*pair) for pair in zip(counted, detector.buffers(), strict=True) if pair[0].is_floating_point()
            ]
            assert not any(moved)  # a pass beside the own one does not count
            assert any(not torch.equal(*pair) for pair in zip(statistics, counted, strict=True))
            detector.eval()
            own = detector.predict(features, batch)
            seed = detector.seed(features, batch)
            again = detector.decode(features, seed, batch)
            torch.testing.assert_close(again.logits, own.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again.boxes_cxcywh01, own.boxes_cxcywh01, rtol=1e-5, atol=1e-6)
            pick = torch.tensor([3, 17, 17, 8, 29])
            foreign = map_tensors(seed, lambda tensor: tensor[:, pick])
            other = detector.decode(features, foreign, batch)
            assert other.logits.shape == (3, 3, 5, 3)
            assert not torch.allclose(other.logits, again.logits[:, :, pick])  # the group mixes among itself only
            torch.testing.assert_close(other.logits[:, :, 1], other.logits[:, :, 2])
            assert torch.equal(detector.decode(features, seed, batch).logits, again.logits)
        assert other.seed is foreign
        assert not torch.equal(other.embedding[0], other.embedding[-1])
        matched = torch.full((3, 3, 5), -1)
        matched[:, 0, 2] = 1
        detector.loss(other, batch, Assignment(matched)).total()  # foreign queries can be trained on

    def test_gradients_reach_a_foreign_seed(self, detector):
        batch = unequal_batch()
        features = detector.features(batch)
        seed = detector.seed(features, batch)
        content = seed.content.detach().clone().requires_grad_()
        detector.decode(features, replace(seed, content=content), batch).logits.sum().backward()
        assert float(content.grad.abs().sum()) > 0

    def test_dense_attention_is_what_the_decoder_computes(self, detector):
        """The map times the values, projected, is the module's own output; weights of points outside are lost."""
        batch = unequal_batch()
        detector.eval()
        module = detector.model.model.decoder.layers[1]
        module = getattr(module, "encoder_attn", None) or module.cross_attn
        seen = []
        hook = module.register_forward_hook(lambda m, args, kwargs, result: seen.append((kwargs, result[0])), with_kwargs=True)
        with torch.no_grad():
            features = detector.features(batch)
            seed = detector.seed(features, batch)
            shown = detector.decode(features, seed, batch, attention=True)
            hook.remove()
            plain = detector.decode(features, seed, batch)
            kwargs, output = seen[0]
            value = kwargs["encoder_hidden_states"]
            value = module.value_proj(value) if hasattr(module, "value_proj") else value
            mask = kwargs.get("attention_mask")
            value = value if mask is None else value.masked_fill(~mask[..., None], 0)
            heads = value.unflatten(2, (4, -1)).transpose(1, 2)  # [B, heads, S, D / heads]
            expected = (shown.attention[1] @ heads).transpose(1, 2).flatten(2)
            expected = module.output_proj(expected) if hasattr(module, "output_proj") else expected
        cells = sum(level.shape[-2] * level.shape[-1] for level in features.maps)
        assert shown.attention.shape == (3, 3, 4, self.queries, cells)
        assert plain.attention is None
        assert torch.equal(plain.logits, shown.logits)
        torch.testing.assert_close(expected, output, rtol=1e-4, atol=1e-5)

    # ---------------------------------------------------------------------------------------------------- copies, files

    def test_copies(self, detector):
        assert isinstance(detector, HasCopies)
        assert isinstance(detector, HasBackboneFeatures)
        batch = unequal_batch()
        detector.eval().requires_grad_(False)
        bottom, features = detector.backbone_features(batch), detector.features(batch)
        assert bottom.channels == (16, 32, 64)
        neck, head = detector.copy_neck(), detector.copy_head()
        copied = neck.eval()(bottom)
        for mine, other in zip(copied.maps, features.maps, strict=True):
            assert torch.equal(mine, other)
        prediction = head.eval().predict(features, batch)
        assert torch.equal(prediction.logits, detector.predict(features, batch).logits)
        head.loss(prediction, batch, head.assign(prediction, batch)).total().backward()
        missing = [name for name, p in head.named_parameters() if p.grad is None and p.requires_grad]
        assert not [name for name in missing if not any(part in name for part in self.unreached)]
        torch.stack([level.sum() for level in copied.maps]).sum().backward()
        assert all(parameter.grad is not None for parameter in neck.parameters())
        assert all(parameter.grad is None for parameter in detector.parameters())
        names = {name for name, _ in detector.named_parameters()}
        inside = [{name.removeprefix("detector.") for name, _ in part.named_parameters()} for part in (neck, head)]
        backbone = {name for name in names if any(f"model.{part}." in name for part in detector.backbone_modules)}
        assert inside[0].isdisjoint(inside[1])
        assert inside[0] | inside[1] | backbone == names
        told = detector.parts()
        assert {*told.names(detector, told.neck)} & names == inside[0]
        assert {*told.names(detector, told.head)} & names == inside[1]
        torch.manual_seed(5)
        fresh = detector.copy_head(fresh=True).eval().predict(features, batch)
        assert not torch.allclose(fresh.logits, prediction.logits)
        chosen = detector.config._attn_implementation
        detector.config._attn_implementation = chosen  # as after a pass that returns attention; handed down to the backbone's
        assert not torch.allclose(detector.copy_neck(fresh=True).eval()(bottom).maps[0], features.maps[0])

    def test_head_inheritance_by_class_name(self, detector, name):
        torch.manual_seed(3)
        student = build_detector(name.replace("8-16-32-64", "8-16-32-32"), ["c", "z", "a"])
        report = inherit_head(student, detector)
        assert not [one for one, _ in report.skipped if "input_proj" not in one and "projector" not in one]
        mine, theirs = student.state_dict(), detector.state_dict()
        rows = [key for key in mine if student.class_rows(key) is not None and key.endswith("weight")]
        assert rows
        for key in rows:
            assert torch.equal(mine[key][[0, 2]], theirs[key][[2, 0]]), key
            assert not torch.equal(mine[key][1], theirs[key][1]), key

    def test_the_backbone_trains(self, detector, name):
        norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        before = norms[0].running_mean.clone()
        detector(unequal_batch())
        assert not torch.equal(norms[0].running_mean, before)
        frozen = build_detector(f"{name},norm=frozen", CLASSES)
        backbone = frozen.model.get_submodule(frozen.backbone_modules[0])
        assert not [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]

    def test_as_a_teacher(self, detector):
        batch = unequal_batch()
        seen = Teacher(detector).observe(batch, Look(backbone=True, prediction=True))
        again = Teacher(detector).observe(batch, Look(prediction=True))
        assert torch.equal(seen.prediction.logits, again.prediction.logits)
        assert not seen.prediction.logits.requires_grad
        stacked = type(seen).stack(seen.split(3))
        assert torch.equal(stacked.prediction.logits, seen.prediction.logits)
        assert torch.equal(stacked.prediction.seed.reference, seen.prediction.seed.reference)

    def test_saved_and_loaded_in_transformers_alone(self, detector, tmp_path):
        batch = unequal_batch()
        with torch.no_grad():
            detector(batch)  # statistics move
        detector.eval()
        save_student(detector, tmp_path / "student")
        library = AutoModelForObjectDetection.from_pretrained(tmp_path / "student").eval()
        with torch.no_grad():
            mine = detector(batch).prediction
            theirs = library(**self.inputs(detector, batch))
        torch.testing.assert_close(theirs.logits, mine.logits[-1], rtol=1e-4, atol=1e-5)
        boxes = self.boxes_of_library(detector, mine, batch)[-1]
        torch.testing.assert_close(theirs.pred_boxes, boxes, rtol=1e-4, atol=1e-5)
        assert library.config.id2label == {0: "a", 1: "b", 2: "c"}
        for name in (str(tmp_path / "student"), f"hf:{tmp_path / 'student'}"):
            loaded = load_detector(name, CLASSES).eval()
            assert loaded.spec.strides == detector.spec.strides
            with torch.no_grad():
                again = loaded(batch).prediction
            torch.testing.assert_close(again.logits, mine.logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(again.boxes_cxcywh01, mine.boxes_cxcywh01, rtol=1e-5, atol=1e-6)
            trains = [[p.requires_grad for p in one.parameters()] for one in (loaded, detector)]
            assert trains[0] == trains[1]


class LearnsByHeart:
    """For variants that ``tests/detectors/test_training.py`` does not train."""

    steps, rate, tolerance = 60, 5e-3, 8.0
    """The tolerance in pixels."""

    def test_learns_two_images_by_heart(self, name):
        torch.manual_seed(0)
        detector, batch = build_detector(name, CLASSES), easy_batch()
        for module in detector.modules():  # a memory test: no dropout
            for attribute in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=self.rate, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / self.steps)))
        history = []
        for _ in range(self.steps):
            loss = detector.loss(detector(batch).prediction, batch).total()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            history.append(float(loss.detach()))
        assert history[-1] < 0.4 * history[0]
        with torch.no_grad():
            prediction = detector(batch).prediction
            found = detector.positives(prediction, detector.assign(prediction, batch), batch)
        last = found.layer == 2
        assert torch.equal(found.logits[last].argmax(dim=1), found.labels[last])
        assert float((found.boxes_xyxy - found.targets_xyxy)[last].abs().max()) < self.tolerance


class FrameTests(DeformableTests):
    """Families that know no padding: their boxes are parts of the padded tensor, made a multiple of 32."""

    rows = 2
    classification = "loss_vfl"
    unreached = ("denoising_class_embed",)

    def frames(self, detector, batch):
        height, width = (-(-side // 32) * 32 for side in batch.padding_hw)
        return [[height, width]] * len(batch)

    def inputs(self, detector, batch):
        height, width = self.frames(detector, batch)[0]
        rest = (0, width - batch.padding_hw[1], 0, height - batch.padding_hw[0])
        return {"pixel_values": F.pad(detector.normalized(batch), rest)}

    def weight(self, detector, name):
        return detector.criterion().weight_dict[name] if name in detector.criterion().weight_dict and self.raw else 1.0

    raw = False
    """Whether the terms that are compared come without their weight."""

    def layer_terms(self, prediction):
        return {0: "_aux_0", 1: "_aux_1", 2: ""}

    def test_foreign_matches_go_through_the_librarys_formula(self, detector):
        self.raw = True
        super().test_foreign_matches_go_through_the_librarys_formula(detector)

    def test_an_image_alone_on_the_same_canvas_is_the_image_in_the_batch(self, detector):
        batch = unequal_batch()
        detector.eval()
        with torch.no_grad():
            together = detector(batch).prediction
            for index in range(3):
                own = slice(index, index + 1)
                alone = Batch(batch.images[own], batch.sizes[own], batch.targets[own], (index,), (batch.views[index],))
                single = detector(alone).prediction
                torch.testing.assert_close(single.logits, together.logits[:, own], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(single.boxes_cxcywh01, together.boxes_cxcywh01[:, own], rtol=1e-4, atol=1e-5)

    def test_boxes_are_parts_of_the_valid_image(self, detector):
        """Image 2 fills a quarter of its frame: its reference boxes, chosen over the whole frame, double."""
        batch = unequal_batch()
        detector.eval()
        with torch.no_grad():
            features = detector.features(batch)
            reference = detector.seed(features, batch).reference
            chosen = detector.choose(detector.memory(features), batch).reference
        torch.testing.assert_close(reference[2], 2 * chosen[2])
        torch.testing.assert_close(reference[1], chosen[1] * torch.tensor([128 / 70, 128 / 90, 128 / 70, 128 / 90]))

    def test_denoising_is_the_trainings_own_and_reproducible(self, detector):
        batch = unequal_batch()
        totals = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            prediction = detector(batch).prediction
            totals.append(detector.loss(prediction, batch).terms)
            assert prediction.logits.shape == (3, 3, 30, 3)
        assert {name for name in totals[0] if "_dn_" in name}
        for name in totals[0]:
            assert torch.equal(totals[0][name], totals[1][name])
        assert any(not torch.equal(totals[0][name], totals[2][name]) for name in totals[0] if "_dn_" in name)
        # other targets, asked about later, leave the noise as it was made
        swapped = detector.loss(prediction, batch.with_targets((FULL[2], FULL[0], FULL[2]))).terms
        for name, term in totals[2].items():
            assert ("_dn_" in name) == torch.equal(swapped[name], term), name
        state = torch.get_rng_state()
        detector.eval()(batch)
        assert torch.equal(torch.get_rng_state(), state)

    def test_without_denoising(self, name):
        detector = build_detector(f"{name},denoising=0", CLASSES)
        batch = unequal_batch()
        losses = detector.loss(detector(batch).prediction, batch)
        assert not [term for term in losses.terms if "_dn_" in term]

    def test_too_few_cells_for_the_queries(self, name):
        detector = build_detector(name.replace("queries=30", "queries=400"), CLASSES)
        with pytest.raises(ValueError, match="128x128 pixels give 336 encoder cells, fewer than the 400 queries"):
            detector(unequal_batch())

    def test_a_point_is_no_reference(self, detector):
        batch = unequal_batch((target([], []),) * 3)
        features = detector.features(batch)
        seed = detector.seed(features, batch)
        with pytest.raises(ValueError, match="need a reference box"):
            detector.decode(features, replace(seed, reference=seed.reference[..., :2]), batch)
