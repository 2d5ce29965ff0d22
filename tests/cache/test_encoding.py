import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch

from detdistill.cache.encoding import STORES, decode, encode, slots_of
from detdistill.methods.unikd import UniKDTaught
from detdistill.structures import (
    ADDED,
    SHARED,
    Dense,
    Features,
    Observation,
    PerImage,
    Queries,
    QuerySeed,
    Regions,
    Taught,
    TaughtTogether,
    Tower,
)
from tests.methods.contract_checks import assert_same, tensors
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch


def taught(detector_class, images=2):
    with torch.no_grad():
        return detector_class(seed=1).eval()(tiny_batch(images)).split(images)


def again(value, store="float32"):
    record = encode(value, store)
    return decode(record.layout, bytearray(record.data))


@pytest.mark.parametrize("detector_class", [TinyDense, TinyRegions, TinyQueries])
def test_float32_gives_back_every_family_exactly(detector_class):
    for piece in taught(detector_class):
        back = again(piece)
        assert type(back) is Observation
        assert back.features.strides == (8, 16)
        assert type(back.prediction) is type(piece.prediction)
        assert_same(back, piece, "")
        assert [t.dtype for _, t in tensors(back)] == [t.dtype for _, t in tensors(piece)]


@pytest.mark.parametrize("store", STORES)
def test_boxes_integers_and_masks_are_exact_in_every_store(store):
    piece = taught(TinyRegions)[1]
    back = again(piece, store)
    for path, tensor in tensors(piece):
        if not tensor.is_floating_point() or "xyxy" in path:
            assert torch.equal(dict(tensors(back))[path], tensor), path
    assert back.features.padding is not None


def test_errors_are_those_of_the_number_format():
    maps = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 4)[None, :, None, None]
    piece = Features((maps,), (8,))
    relative = {store: (again(piece, store).maps[0] / maps - 1).abs().max().item() for store in ("float16", "bfloat16")}
    assert 1e-4 < relative["float16"] < 2**-10
    assert 1e-3 < relative["bfloat16"] <= 2**-8
    for store, steps in (("int8", 127), ("int6", 31)):
        error = (again(piece, store).maps[0] - maps).abs()
        assert (error <= maps.abs().amax(dim=-1, keepdim=True) / (2 * steps) * 1.0001).all(), (
            "half a step of each row's own scale"
        )
        assert error.max() > 0


def test_sizes_are_what_the_formats_promise():
    piece = Features((torch.randn(1, 8, 64, 80, generator=torch.Generator().manual_seed(0)),), (8,))
    count, rows = 8 * 64 * 80, 8 * 64
    sizes = {store: len(encode(piece, store).data) for store in STORES}
    coded = sizes.pop("int6")
    assert sizes == {"float32": 4 * count, "float16": 2 * count, "bfloat16": 2 * count, "int8": count + 4 * rows}
    assert coded < 0.76 * count + 4 * rows, "62 values, normally distributed"


def test_unikd_in_the_papers_setting_fits_in_150_kb():
    """200 queries of 256 channels, of both kinds, as LayerNorm leaves them: 1.53 MB for two views in the paper."""
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.nn.functional.layer_norm(torch.randn(1, 200, 256, generator=generator), (256,)) for _ in range(4)]
    positive = torch.zeros(1, 200, dtype=torch.bool)
    taught = UniKDTaught(arrays[0], arrays[1], positive, arrays[2], arrays[3], positive, torch.rand(1, 200, 4))
    assert 200_000 < len(encode(taught, "int8").data) < 212_000
    assert len(encode(taught, "int6").data) < 150_000


def test_what_a_format_cannot_hold_stays_as_it_is():
    large = Features((torch.full((1, 1, 2, 2), 1e6),), (8,))
    assert torch.equal(again(large, "float16").maps[0], large.maps[0])
    endless = Features((torch.tensor([[[[1.5, -torch.inf]]]]),), (8,))
    for store in STORES:
        assert torch.equal(again(endless, store).maps[0], endless.maps[0]), store
    empty = Features((torch.zeros(1, 3, 0, 4),), (8,))
    zeros = Features((torch.zeros(1, 3, 2, 4),), (8,))
    for store in STORES:
        assert again(empty, store).maps[0].shape == (1, 3, 0, 4)
        assert torch.equal(again(zeros, store).maps[0], zeros.maps[0])


def test_integers_are_kept_narrow_and_come_back_wide():
    @dataclass(frozen=True)
    class Numbers(Taught):
        small: torch.Tensor
        large: torch.Tensor

    back = again(Numbers(torch.tensor([[1, -128]]), torch.tensor([[2**40, 0]])))
    assert back.small.tolist() == [[1, -128]]
    assert back.large.tolist() == [[2**40, 0]]
    assert back.small.dtype == back.large.dtype == torch.int64
    assert len(encode(Numbers(torch.tensor([[1, -128]]), torch.tensor([[2**40, 0]])), "float32").data) == 2 + 16


def test_memory_that_parts_share_is_written_once():
    piece = taught(TinyDense)[0]
    features = replace(piece, prediction=None)
    one, both = encode(features, "float32"), encode(TaughtTogether((features, features)), "float32")
    assert len(both.data) == len(one.data)
    assert_same(again(TaughtTogether((features, None))).parts[0], features, "")


def test_what_cannot_be_kept_is_refused_with_its_place():
    @dataclass(frozen=True)
    class Odd(Taught):
        inner: PerImage
        what: object

    piece = taught(TinyDense)[0]
    with pytest.raises(TypeError, match=r"a set at \.what cannot be stored"):
        encode(Odd(piece, {1}), "float32")


def test_a_layout_of_an_unknown_class_imports_nothing():
    record = encode(taught(TinyDense)[0], "float32")
    with pytest.raises(ValueError, match="antigravity:Flying, which is not loaded"):
        decode(record.layout.replace("detdistill.structures:Observation", "antigravity:Flying"), bytearray(record.data))
    with pytest.raises(ValueError, match="shorter than its layout"):
        decode(record.layout, bytearray(record.data)[:-10])


# What a cache of the first version holds for these two images' worth of knowledge, to the letter.
FEATURES_V1 = (
    '{"is":"detdistill.structures:Features","fields":{"maps":[{"t":%d},{"t":%d}],"strides":[{"v":8},{"v":16}],'
    '"padding":[{"t":%d},{"t":%d}]}}'
)
OBSERVATION_V1 = (
    '[[{"is":"detdistill.structures:Observation","fields":{"features":'
    + FEATURES_V1 % (0, 1, 2, 3)
    + ',"backbone_features":{"v":null},"prediction":{"v":null}}}],[["[0].features.maps[0]","F32",[1,2,2,2],"F32",-1],'
    '["[0].features.maps[1]","F32",[1,2,1,1],"F32",-1],["[0].features.padding[0]","BOOL",[1,2,2],"BOOL",-1],'
    '["[0].features.padding[1]","BOOL",[1,1,1],"BOOL",-1]],false]'
)
DENSE_V1 = (
    '[[{"is":"detdistill.structures:Observation","fields":{"features":'
    + FEATURES_V1 % (6, 7, 8, 9)
    + ',"backbone_features":'
    + FEATURES_V1 % (6, 7, 8, 9)
    + ',"prediction":{"is":"detdistill.structures:Dense","fields":{"logits":{"t":10},"deltas":{"t":11},"boxes_xyxy":{"t":4},'
    '"priors_xyxy":{"t":5},"levels":{"t":12},"cells":{"t":13},"anchors":{"t":14},"quality":{"v":null},"softmax":{"v":false},'
    '"own":{"v":null},"padding":{"v":null}}}}}],[["[0].features.maps[0].scale","F32",[1,2,2,1],"F32",-1],'
    '["[0].features.maps[1].scale","F32",[1,2,1,1],"F32",-1],["[0].prediction.logits.scale","F32",[1,2,1],"F32",-1],'
    '["[0].prediction.deltas.scale","F32",[1,2,1],"F32",-1],["[0].prediction.boxes_xyxy","F32",[1,2,4],"F32",-1],'
    '["[0].prediction.priors_xyxy","F32",[1,2,4],"F32",-1],["[0].features.maps[0]","I8",[1,2,2,2],"F32",0],'
    '["[0].features.maps[1]","I8",[1,2,1,1],"F32",1],["[0].features.padding[0]","BOOL",[1,2,2],"BOOL",-1],'
    '["[0].features.padding[1]","BOOL",[1,1,1],"BOOL",-1],["[0].prediction.logits","I8",[1,2,3],"F32",2],'
    '["[0].prediction.deltas","I8",[1,2,4],"F32",3],["[0].prediction.levels","I8",[2],"I64",-1],'
    '["[0].prediction.cells","I8",[2,2],"I64",-1],["[0].prediction.anchors","I8",[2],"I64",-1]],false]'
)
QUERIES_V1 = (
    '[[{"is":"detdistill.structures:TaughtTogether","fields":{"parts":[{"is":"detdistill.structures:Observation","fields":'
    '{"features":'
    + FEATURES_V1 % (1, 2, 6, 7)
    + ',"backbone_features":{"v":null},"prediction":{"v":null}}},{"is":"detdistill.structures:Observation","fields":{"features":'
    + FEATURES_V1 % (1, 2, 6, 7)
    + ',"backbone_features":{"v":null},"prediction":{"is":"detdistill.structures:Queries","fields":{"logits":{"t":3},'
    '"boxes_cxcywh01":{"t":0},"embedding":{"t":4},"seed":{"is":"detdistill.structures:QuerySeed","fields":{"content":{"t":5},'
    '"position":{"v":null},"reference":{"v":null}}},"attention":{"v":null},"softmax":{"v":false},"own":{"v":null},'
    '"self_attention":{"v":null}}}}},{"v":null}]}}],[["[0].parts[1].prediction.boxes_cxcywh01","F32",[1,1,2,4],"F32",-1],'
    '["[0].parts[0].features.maps[0]","F16",[1,2,2,2],"F32",-1],["[0].parts[0].features.maps[1]","F16",[1,2,1,1],"F32",-1],'
    '["[0].parts[1].prediction.logits","F16",[1,1,2,3],"F32",-1],'
    '["[0].parts[1].prediction.embedding","F16",[1,1,2,6],"F32",-1],'
    '["[0].parts[1].prediction.seed.content","F16",[1,2,6],"F32",-1],'
    '["[0].parts[0].features.padding[0]","BOOL",[1,2,2],"BOOL",-1],'
    '["[0].parts[0].features.padding[1]","BOOL",[1,1,1],"BOOL",-1]],false]'
)


def first_version():
    """Knowledge of the kinds that caches of the first version hold, with layout, start and digest of their bytes."""
    masks = (torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool))
    features = Features((torch.arange(8.0).view(1, 2, 2, 2), torch.tensor([[[[-0.5]], [[0.5]]]])), (8, 16), masks)
    ones, cells = torch.ones(1, 2, 4), torch.tensor([[0, 0], [0, 0]])
    dense = Dense(torch.ones(1, 2, 3), ones, ones + 1, ones + 2, torch.tensor([0, 1]), cells, torch.tensor([0, 0]))
    decoded = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 4) / 2, torch.ones(1, 1, 2, 6)
    queries = Queries(*decoded, QuerySeed(torch.zeros(1, 2, 6)))
    together = TaughtTogether((Observation(features), Observation(features, prediction=queries), None))
    return [
        (Observation(features), "float32", OBSERVATION_V1, "f18ddc5ee66ae319e061a54e67ba544458be29559d65de78c7ac3b9582141a51"),
        (
            Observation(features, features, dense),
            "int8",
            DENSE_V1,
            "d6f4a14e8d95da2b8e4072f609acaf452bf9c6af29133e659c2b29d9ab37d29a",
        ),
        (together, "float16", QUERIES_V1, "5bd1f01afde9cfe8a94188437f539bda9e0625d86b521067e7ad3d4ef23b2c0a"),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_records_are_to_the_letter_what_the_first_version_wrote(kind):
    knowledge, store, layout, digest = first_version()[kind]
    record = encode((knowledge,), store)
    assert record.layout == layout
    assert hashlib.sha256(record.data).hexdigest() == digest
    (back,) = decode(layout, bytearray(record.data))
    if store == "float32":
        assert_same(back, knowledge, "")
        assert back.towers == ()
    else:
        assert type(back) is type(knowledge)


def test_a_field_that_came_later_is_written_where_it_is_used():
    @dataclass(frozen=True)
    class Grown(Taught):
        first: torch.Tensor
        later: torch.Tensor | None = field(default=None, metadata=ADDED)
        kind: str = field(default="plain", metadata={**ADDED, **SHARED})

    ones = torch.ones(1, 2)
    fields = json.loads(encode(Grown(ones), "float32").layout)[0]["fields"]
    assert fields == {"first": {"t": 0}}
    back = again(Grown(ones))
    assert (back.first.tolist(), back.later, back.kind) == ([[1.0, 1.0]], None, "plain")
    used = again(Grown(ones, torch.zeros(1, 3), "other"))
    assert used.later.tolist() == [[0.0] * 3]
    assert used.kind == "other"


def test_classes_are_named_by_their_package():
    def named(value):
        return json.loads(encode(value, "float32").layout)[0]["is"]

    assert named(Tower((torch.ones(1, 1, 1, 1),), (torch.ones(1, 1, 1, 1),), 0, (8,))) == "detdistill.structures:Tower"
    assert named(QuerySeed(torch.ones(1, 1, 1))) == "detdistill.structures:QuerySeed"
    zeros = torch.zeros(1, 1, 1)
    assert named(UniKDTaught(zeros, zeros, zeros, zeros, zeros, zeros, zeros)) == "detdistill.methods.unikd:UniKDTaught"


def test_a_method_may_become_a_folder_and_reads_its_old_records():
    @dataclass(frozen=True)
    class Said(Taught):
        ones: torch.Tensor

    Said.__module__, Said.__qualname__ = "detdistill.methods.foldered", "Said"
    record = encode(Said(torch.ones(1, 2)), "float32")
    for room in ("parts", "method", "loss"):
        Said.__module__ = f"detdistill.methods.foldered.{room}"
        assert encode(Said(torch.ones(1, 2)), "float32").layout == record.layout
        assert type(decode(record.layout, bytearray(record.data))) is Said


def test_slots_lie_aligned():
    record = encode(taught(TinyRegions)[1], "int8")
    position = 0
    for slot in slots_of(record):
        assert position % {"F32": 4, "F64": 8, "I64": 8, "I16": 2}.get(slot.stored, 1) == 0
        position += slot.nbytes
    assert position == len(record.data)


# ----------------------------------------------------------------------------------------- different sizes in one batch


def dense_of(rows, columns, softmax=False):
    """One level with two anchors a cell, and a level of one cell; logits tell the place."""
    where = [(0, row, column, anchor) for row in range(rows) for column in range(columns) for anchor in range(2)] + [(1, 0, 0, 0)]
    levels, row, column, anchors = torch.tensor(where).unbind(1)
    number = (100.0 * row + 10 * column + anchors + 1000 * levels)[None, :, None]
    boxes = number.repeat(1, 1, 4)
    logits = number.repeat(1, 1, 3)
    return Dense(
        logits, boxes, boxes, boxes, levels, torch.stack([row, column], 1), anchors, quality=number[..., 0], softmax=softmax
    )


@pytest.mark.parametrize("softmax", [False, True])
def test_dense_predictions_of_different_sizes_are_laid_on_common_cells(softmax):
    tall, wide = dense_of(3, 1, softmax), dense_of(2, 2, softmax)
    both = Dense.stack([tall, wide])
    assert both.logits.shape == (2, 3 * 2 * 2 + 1, 3)
    known = {(0, r, c, a): 100.0 * r + 10 * c + a for r in range(3) for c in range(2) for a in range(2)} | {(1, 0, 0, 0): 1000.0}
    for image, piece in enumerate([tall, wide]):
        mine = set(zip(piece.levels.tolist(), *piece.cells.T.tolist(), piece.anchors.tolist(), strict=True))
        for index, place in enumerate(zip(both.levels.tolist(), *both.cells.T.tolist(), both.anchors.tolist(), strict=True)):
            assert bool(both.padding[image, index]) == (place not in mine)
            if place in mine:
                assert both.logits[image, index].tolist() == [known[place]] * 3
                assert both.boxes_xyxy[image, index, 0] == both.quality[image, index] == known[place]
            else:
                background = (
                    both.logits[image, index].softmax(-1)[-1] > 0.999
                    if softmax
                    else both.logits[image, index].sigmoid().max() < 1e-8
                )
                assert bool(background)
                assert both.boxes_xyxy[image, index].tolist() == [0] * 4
    narrow = Dense.stack([Dense.stack([tall, wide]).split(2)[1], wide])
    assert narrow.padding.sum().item() == 4 + 4, "padding is kept when it is stacked again"
    assert Dense.stack([wide, wide]).padding is None


def test_regions_of_images_are_stacked_with_their_first_stage_on_different_sizes():
    pieces = taught(TinyRegions, 2)
    small = replace(pieces[1].prediction, first=dense_of(2, 1))
    large = replace(pieces[0].prediction, first=dense_of(2, 2))
    both = Regions.stack([large, small])
    assert both.first.padding.sum(dim=1).tolist() == [0, 4]
    assert both.origin.image.unique().tolist() == [0, 1]


def test_what_another_method_was_taught_is_understood_by_a_process_that_does_not_use_it(tmp_path):
    ones = torch.ones(1, 3, 2)
    positive = torch.zeros(1, 3, dtype=torch.bool)
    record = encode(UniKDTaught(ones, ones + 1, positive, ones + 2, ones + 3, positive, torch.rand(1, 3, 4)), "float32")
    (tmp_path / "layout").write_text(record.layout)
    (tmp_path / "data").write_bytes(record.data)
    code = """
import pathlib, sys
from detdistill.cache.encoding import decode
folder = pathlib.Path(sys.argv[1])
assert "detdistill.methods.unikd" not in sys.modules
back = decode((folder / "layout").read_text(), bytearray((folder / "data").read_bytes()))
print(type(back).__name__, back.positional.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["UniKDTaught", "24.0"]
