"""Questions and answers as bytes."""

import json
import random
import struct
from dataclasses import replace

import pytest
import torch

from detdistill.cache.encoding import decode, encode
from detdistill.serving.messages import (
    joined,
    packed_answer,
    packed_keys,
    packed_question,
    some_of,
    unpacked_answer,
    unpacked_keys,
    unpacked_question,
)
from detdistill.structures import Batch, Features, Target, View
from tests.methods.contract_checks import assert_same
from tests.serving.near import mixed_batch
from tests.tiny import tiny_batch


def asked(*groups, classes=2):
    return unpacked_question(packed_question(groups, "d"), classes)


def equal(first, second):
    assert_same(first, second, "")
    assert (first.ids, first.views, first.enlarged) == (second.ids, second.views, second.enlarged)


def test_a_batch_comes_back_exactly_as_it_was():
    batch = replace(
        tiny_batch(3), views=tuple(View((5, 7), (9, 3), (0.1, 1 / 3), (-2.0, 0.5), True, (1.1,), (3, 4)) for _ in "abc")
    )
    (again,), data = asked(batch)
    equal(again, batch)
    assert data == "d"
    scored = batch.with_targets([replace(target, scores=torch.rand(len(target))) for target in batch.targets])
    equal(asked(scored)[0][0], scored)


def test_pixels_of_files_are_sent_as_bytes_and_all_others_as_they_are():
    noise = tiny_batch(2)
    whole = replace(noise, images=(noise.images * 255).round().to(torch.uint8).to(torch.float32).div_(255))
    sent = [len(packed_question([batch], "d")) for batch in (noise, whole)]
    assert sent[1] < 0.3 * sent[0]
    equal(asked(whole)[0][0], whole)


def test_masks_stay_and_of_a_larger_view_only_the_larger_pixels_are_sent():
    batch = tiny_batch(2, size=32)
    masked = [replace(target, masks=torch.ones(len(target), 32, 32, dtype=torch.bool)) for target in batch.targets]
    assert asked(batch.with_targets(masked))[0][0].targets[0].masks is None
    (again,), _ = asked(replace(batch, large=tiny_batch(2, size=64), enlarged=2.0))
    equal(again.large, tiny_batch(2, size=64))
    assert (again.padding_hw, again.enlarged) == ((32, 32), 2.0)
    assert torch.equal(again.sizes, batch.sizes)


def test_groups_are_joined_and_parts_are_taken_out():
    groups = [group for _, group in mixed_batch(4).by_canvas()]
    again, _ = asked(*groups)
    assert [group.padding_hw for group in again] == [(64, 64), (48, 64)]
    both = joined([tiny_batch(2, seed=0), tiny_batch(1, seed=1)])
    assert both.ids == (0, 1, 100)
    equal(some_of(both, [2]), tiny_batch(1, seed=1))


def test_records_come_back_with_a_cache_s_checksums():
    records = [encode((Features((torch.rand(1, 2, 3, 3),), (8,)),), "float32") for _ in range(2)]
    content = b"".join(packed_answer(["1/a", "2/b"], records))
    again = unpacked_answer(content, ["1/a", "2/b"])
    assert again == records
    assert isinstance(decode(again[0].layout, bytearray(again[0].data))[0], Features)
    with pytest.raises(ValueError, match="record of image 3/a is damaged"):
        unpacked_answer(content, ["3/a", "2/b"])
    with pytest.raises(ValueError, match="record of image 2/b is damaged"):
        unpacked_answer(content[:-1] + bytes([content[-1] ^ 1]), ["1/a", "2/b"])
    with pytest.raises(ValueError):
        unpacked_answer(content, ["1/a"])
    assert unpacked_keys(packed_keys(["1/a"], "d")) == (["1/a"], "d")


def changed(change):
    """A question whose JSON was changed."""
    content = packed_question([tiny_batch(2)], "d")
    (length,) = struct.unpack_from("<Q", content)
    plain = json.loads(content[8 : 8 + length])
    text = json.dumps(change(plain) or plain).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def group(**fields):
    return changed(lambda plain: plain["groups"][0].update(fields))


def with_target(**fields):
    batch = tiny_batch(1)
    return packed_question([batch.with_targets([replace(batch.targets[0], **fields)])], "d")


WRONG = {
    "empty": b"",
    "short": b"\xff" * 8,
    "no json": struct.pack("<Q", 3) + b"abc",
    "a list": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "no tensors": changed(lambda plain: None)[:-4000],
    "no groups": changed(lambda plain: {"data": "d", "groups": []}),
    "groups": changed(lambda plain: {"data": "d", "groups": 3}),
    "data": changed(lambda plain: plain.update(data=3)),
    "ids": group(ids=["a", "b"]),
    "one id": group(ids=[1]),
    "large number": group(ids=[10**30, 1]),
    "size": group(hw=[10**9, 10**9]),
    "views": group(views=[{}, {}]),
    "view": group(views=[1, 2]),
    "enlarged": group(enlarged="x"),
    "recursion": group(large={"ids": []}),
    "label": with_target(labels=torch.full((2,), 2)),
    "negative": with_target(labels=torch.full((2,), -1)),
    "boxes": with_target(boxes_xyxy=torch.zeros(2, 3)),
    "more boxes": with_target(boxes_xyxy=torch.zeros(3, 4)),
    "crowd": with_target(crowd=torch.zeros(2)),
    "scores": with_target(scores=torch.zeros(5)),
    "images": packed_question([replace(tiny_batch(2), images=torch.zeros(2, 3, 64, 64, dtype=torch.float64))], "d"),
    "sizes": packed_question([replace(tiny_batch(2), sizes=torch.tensor([[64, 64], [65, 64]]))], "d"),
    "channels": packed_question([replace(tiny_batch(2), images=torch.zeros(2, 1, 64, 64))], "d"),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_whatever_is_wrong_with_a_question_is_a_value_error(content):
    with pytest.raises(ValueError):
        unpacked_question(content, 2)


def test_a_question_with_random_bytes_changed_is_read_or_refused():
    question = packed_question([replace(tiny_batch(1, size=8), large=tiny_batch(1, size=16), enlarged=2.0)], "d")
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        content = bytearray(question)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content) // 3)] = chance.randrange(256)
        try:
            unpacked_question(bytes(content[: chance.choice((len(content), chance.randrange(len(content))))]), 2)
        except ValueError:
            refused += 1
    assert 200 < refused < 400


@pytest.mark.parametrize("content", [b"", b"[]", b'{"keys": [1], "data": ""}', b'{"keys": ["a"]}', b"\xff", b"[" * 100_000])
def test_whatever_is_wrong_with_keys_is_a_value_error(content):
    with pytest.raises(ValueError):
        unpacked_keys(content)


def test_an_image_without_boxes_is_a_question_too():
    batch = tiny_batch(2, boxes=False)
    equal(asked(batch)[0][0], batch)
    assert isinstance(batch, Batch)
    assert isinstance(batch.targets[0], Target)
