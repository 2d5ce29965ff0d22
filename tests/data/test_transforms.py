import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detdistill.data.records import Record
from detdistill.data.transforms import ViewSettings, make_mosaic, make_view, turn_hue
from detdistill.errors import DataError, RunError

PLAIN = ViewSettings(size=64, flip=0.0)


def record(height=40, width=60, boxes=((6.0, 8.0, 30.0, 20.0),), crowd=None, segmentation=None, image_id=5):
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    flags = np.zeros(len(array), dtype=bool) if crowd is None else np.array(crowd)
    areas = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    return Record(image_id, Path("image.png"), (height, width), array, np.arange(len(array)), flags, areas, segmentation)


def painted(of, grey=0):
    """White where the first box is."""
    image = torch.full((3, *of.size_hw), grey, dtype=torch.uint8)
    x1, y1, x2, y2 = of.boxes_xyxy[0].astype(int)
    image[:, y1:y2, x1:x2] = 255
    return image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bright_box(pixels):
    """Box of what is brighter than half, so good to half a pixel."""
    bright = pixels.mean(0) > 0.5
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


@pytest.mark.parametrize(
    ("settings", "size_hw", "box"),
    [
        # 40x60 (h, w): the long side to 64; height 42.67 is rounded to 43, so the vertical scale is 43/40.
        (PLAIN, (43, 64), [6 * 64 / 60, 8 * 43 / 40, 30 * 64 / 60, 20 * 43 / 40]),
        (replace(PLAIN, resize="stretch"), (64, 64), [6 * 64 / 60, 8 * 1.6, 30 * 64 / 60, 20 * 1.6]),
        (replace(PLAIN, resize="short_side"), (64, 96), [6 * 1.6, 8 * 1.6, 30 * 1.6, 20 * 1.6]),
        (replace(PLAIN, resize="short_side", max_size=75), (50, 75), [7.5, 10.0, 37.5, 25.0]),
    ],
)
def test_resize_policies(settings, size_hw, box):
    pixels, target, view = make_view(painted(record()), record(), settings, generator(), train=False)
    assert pixels.dtype == torch.float32
    assert tuple(pixels.shape) == (3, *size_hw) == (3, *view.size_hw)
    assert view.original_hw == (40, 60)
    assert target.boxes_xyxy[0].tolist() == pytest.approx(box, abs=1e-4)
    assert bright_box(pixels) == pytest.approx(box, abs=0.75)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)


def test_padding_is_a_square_for_letterboxes_and_the_largest_image_else():
    assert replace(PLAIN, size=100).padded_hw([(100, 20)]) == (128, 128)
    assert replace(PLAIN, resize="short_side").padded_hw([(64, 97), (80, 64)]) == (96, 128)
    assert replace(PLAIN, resize="stretch").padded_hw([(64, 64)]) == (64, 64)


@pytest.mark.parametrize("resize", ["letterbox", "stretch", "short_side"])
@pytest.mark.parametrize("zooms", [None, (0.3, 0.9), (1.1, 3.0)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_view_undoes_everything(resize, zooms, flip):
    """Boxes come back to a thousandth of a pixel where they were not cut, and pixels lie where the boxes say."""
    for seed in range(8):
        mine = record(97, 131, boxes=((40.0, 30.0, 90.0, 70.0), (3.25, 5.5, 120.0, 91.75)))
        settings = ViewSettings(size=96, resize=resize, scale_jitter=zooms, flip=flip)
        pixels, target, view = make_view(painted(mine), mine, settings, generator(seed), train=True)
        assert view.flip == (flip == 1.0)
        height, width = view.size_hw
        assert tuple(pixels.shape[-2:]) == (height, width)
        back = view.to_original(target.boxes_xyxy.double())
        for box, original, shown in zip(back, target.labels, target.boxes_xyxy, strict=True):
            uncut = torch.tensor([shown[0] > 0, shown[1] > 0, shown[2] < width, shown[3] < height])
            if view.flip:
                uncut = uncut[[2, 1, 0, 3]]
            expected = torch.from_numpy(mine.boxes_xyxy[original])
            assert _largest((box - expected).abs()[uncut]) < 1e-3
        if 0 in target.labels.tolist():
            shown = target.boxes_xyxy[0].tolist()
            if min(shown[2] - shown[0], shown[3] - shown[1]) > 3:
                assert bright_box(pixels) == pytest.approx(shown, abs=1.0 + 0.5 * max(view.scale_xy))


def _largest(values):
    return float(values.max()) if len(values) else 0.0


def test_zoom_out_gives_a_smaller_image_and_zoom_in_a_part_of_the_same_size():
    small = make_view(painted(record()), record(), replace(PLAIN, scale_jitter=(0.5, 0.5)), generator(), train=True)[2]
    assert small.size_hw == (21, 32)
    assert small.offset_xy == (0.0, 0.0)
    offsets = set()
    for seed in range(20):
        large = make_view(painted(record()), record(), replace(PLAIN, scale_jitter=(2.0, 2.0)), generator(seed), train=True)[2]
        assert large.size_hw == (43, 64)
        assert large.scale_xy == (128 / 60, 85 / 40)
        assert -64 <= large.offset_xy[0] <= 0
        assert -42 <= large.offset_xy[1] <= 0
        offsets.add(large.offset_xy)
    assert len(offsets) > 15


def test_evaluation_is_plain_and_keeps_every_box():
    tiny = record(boxes=((6.0, 8.0, 30.0, 20.0), (1.0, 1.0, 1.5, 30.0), (0.0, 0.0, 60.0, 40.0)), crowd=[False, False, True])
    everything = ViewSettings(size=64, flip=1.0, colour=1.0, scale_jitter=(2.0, 3.0), mosaic=1.0)
    source = generator()
    before = source.get_state()
    pixels, target, view = make_view(painted(tiny), tiny, everything, source, train=False)
    assert torch.equal(source.get_state(), before)
    assert (view.flip, view.photometric, view.offset_xy) == (False, (), (0.0, 0.0))
    assert target.labels.tolist() == [0, 1, 2]
    assert target.crowd.tolist() == [False, False, True]
    trained = make_view(painted(tiny), tiny, PLAIN, generator(), train=True)[1]
    assert trained.labels.tolist() == [0, 2]  # box 1 is 0.53 pixels wide
    assert trained.crowd.tolist() == [False, True]
    torch.testing.assert_close(pixels, make_view(painted(tiny), tiny, PLAIN, generator(), train=True)[0])


def test_boxes_are_cut_at_the_border_of_a_crop():
    full = record(boxes=((0.0, 0.0, 60.0, 40.0),))
    _, target, view = make_view(painted(full), full, replace(PLAIN, scale_jitter=(2.0, 2.0)), generator(), train=True)
    assert target.boxes_xyxy.tolist() == [[0.0, 0.0, 64.0, 43.0]]
    empty = record(boxes=())
    _, target, _ = make_view(torch.zeros(3, 40, 60, dtype=torch.uint8), empty, PLAIN, generator(), train=True)
    assert (target.boxes_xyxy.shape, target.labels.shape, target.crowd.dtype) == ((0, 4), (0,), torch.bool)
    assert view.size_hw == (43, 64)


def test_an_image_resized_before_gives_the_same_view():
    noise = torch.randint(256, (3, 40, 60), generator=generator(9), dtype=torch.uint8)
    once = make_view(noise, record(), PLAIN, generator(), train=False)
    kept = (once[0] * 255).round().to(torch.uint8)
    twice = make_view(kept, record(), PLAIN, generator(), train=False)
    assert torch.equal(once[0], twice[0])
    assert once[2] == twice[2]


def test_a_turn_of_the_hue_keeps_brightness_and_greys():
    noise = torch.randint(64, 192, (3, 8, 8), generator=generator(1), dtype=torch.uint8)  # nothing is cut
    turned = turn_hue(noise, 0.05)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((turned * weights).sum(0), (noise * weights).sum(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(turn_hue(turned, -0.05), noise.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(turn_hue(noise, 1.0), noise.float(), rtol=0, atol=1e-3)
    grey = noise[:1].expand(3, -1, -1)
    torch.testing.assert_close(turn_hue(grey, 0.3), grey.float(), rtol=0, atol=1e-3)
    assert turn_hue(torch.tensor([255.0, 0, 255])[:, None, None], 0.2).amin() >= 0
    red, green, blue = turn_hue(torch.tensor([200.0, 50, 50])[:, None, None], 0.05).flatten().tolist()
    assert red > green > blue  # towards yellow


def test_the_hue_setting_changes_nothing_but_colours():
    noise = torch.randint(256, (3, 43, 64), generator=generator(9), dtype=torch.uint8)
    fast, slow = (
        make_view(noise, record(), replace(PLAIN, colour=0.5, hue=hue), generator(3), train=True) for hue in ("yiq", "hsv")
    )
    assert fast[2] == slow[2]
    assert torch.equal(fast[1].boxes_xyxy, slow[1].boxes_xyxy)
    assert float((fast[0] - slow[0]).abs().mean()) < 0.03


def test_the_view_tells_the_colours_exactly():
    import torchvision.transforms.v2.functional as F

    noise = torch.randint(256, (3, 43, 64), generator=generator(9), dtype=torch.uint8)
    settings = replace(PLAIN, colour=0.5, hue="hsv")
    seen = []
    for seed in range(30):
        pixels, _, view = make_view(noise, record(), settings, generator(seed), train=True)
        brightness, contrast, saturation, hue = view.photometric
        expected = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(noise, brightness), contrast), saturation)
        assert torch.equal(pixels, F.adjust_hue(expected, hue).float() / 255)
        seen.append(view.photometric)
        assert [float(number) for number in view.key.split("photo")[1].split(",")] == pytest.approx(view.photometric, abs=0)
    factors = np.array(seen)
    assert factors[:, :3].min() >= 0.5
    assert factors[:, :3].max() <= 1.5
    assert np.abs(factors[:, 3]).max() <= 0.05
    assert factors[:, :3].std() > 0.2


def test_one_setting_does_not_move_the_others():
    base = make_view(painted(record()), record(), replace(PLAIN, scale_jitter=(1.5, 2.0)), generator(4), train=True)[2]
    more = replace(PLAIN, scale_jitter=(1.5, 2.0), flip=1.0, colour=0.3)
    other = make_view(painted(record()), record(), more, generator(4), train=True)[2]
    assert (base.scale_xy, base.offset_xy) == (other.scale_xy, other.offset_xy)


def test_mosaic_of_four():
    parts = [record(64, 64, boxes=((0.0, 0.0, 64.0, 64.0), (2.0, 2.0, 62.0, 62.0)), image_id=index) for index in range(4)]
    images = [torch.full((3, 64, 64), 50 * (index + 1), dtype=torch.uint8) for index in range(4)]
    pixels, target, view = make_mosaic(images, parts, PLAIN, generator(1))
    x, y = map(int, view.offset_xy)
    assert 16 <= x <= 48
    assert 16 <= y <= 48
    assert view.mosaic == (0, 1, 2, 3)
    quarters = [pixels[:, :y, :x], pixels[:, :y, x:], pixels[:, y:, :x], pixels[:, y:, x:]]
    for index, quarter in enumerate(quarters):
        assert quarter.unique().tolist() == pytest.approx([50 * (index + 1) / 255])
    full = target.boxes_xyxy[target.labels == 0].tolist()
    assert full == [[0, 0, x, y], [x, 0, 64, y], [0, y, x, 64], [x, y, 64, 64]]
    # The corner next to the centre is shown: 2 pixels of each image's margin lie between centre and the inner box.
    inner = target.boxes_xyxy[target.labels == 1].tolist()
    assert inner == [[0, 0, x - 2, y - 2], [x + 2, 0, 64, y - 2], [0, y + 2, x - 2, 64], [x + 2, y + 2, 64, 64]]
    with pytest.raises(ValueError, match="mosaic"):
        view.to_original(target.boxes_xyxy)

    flipped, mirrored, other = make_mosaic(images, parts, replace(PLAIN, flip=1.0), generator(1))
    assert torch.equal(flipped, pixels.flip(-1))
    assert mirrored.boxes_xyxy[target.labels == 0].tolist() == [[64 - c[2], c[1], 64 - c[0], c[3]] for c in full]
    assert other.key != view.key


# --------------------------------------------------------------------------------------------------------------- masks


def runs(mask):
    """Uncompressed run lengths, column by column, zeros first."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [flat.size - 1]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def compressed(mask):
    coco = pytest.importorskip("pycocotools.mask")
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


MASK = np.zeros((40, 60), dtype=bool)
MASK[8:20, 6:30] = True
MASK[8:14, 6:18] = False
POLYGON = [[18.0, 8.0, 30.0, 8.0, 30.0, 20.0, 6.0, 20.0, 6.0, 14.0, 18.0, 14.0]]


@pytest.mark.parametrize("shape", [POLYGON, runs(MASK), compressed(MASK)], ids=["polygon", "runs", "compressed"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_follow_boxes(shape, flip):
    mine = record(segmentation=(shape,))
    settings = ViewSettings(size=60, flip=flip, masks=True)  # scale 1
    pixels, target, _ = make_view(painted(mine), mine, settings, generator(), train=True)
    expected = torch.from_numpy(MASK.copy())
    assert torch.equal(target.masks[0], expected.flip(-1) if flip else expected)
    assert not bool((target.masks[0] & (pixels[0] < 0.5)).any())

    zoomed = replace(settings, scale_jitter=(2.0, 2.0))
    pixels, target, view = make_view(painted(mine), mine, zoomed, generator(2), train=True)
    height, width = view.size_hw
    rows = ((np.arange(height) + 0.5 - view.offset_xy[1]) / 2).astype(int)
    columns = ((np.arange(width) + 0.5 - view.offset_xy[0]) / 2).astype(int)
    looked_up = MASK[rows][:, columns]
    assert np.array_equal(target.masks[0].numpy(), looked_up[:, ::-1] if flip else looked_up)


def test_masks_where_some_or_all_are_missing():
    two = record(boxes=((6.0, 8.0, 30.0, 20.0), (1.0, 2.0, 11.0, 4.0)), segmentation=(POLYGON, None))
    settings = ViewSettings(size=60, flip=0.0, masks=True)
    _, target, _ = make_view(painted(two), two, settings, generator(), train=True)
    assert target.masks.flatten(1).sum(1).tolist() == [int(MASK.sum()), 20]
    assert bool(target.masks[1, 2:4, 1:11].all())
    assert make_view(painted(two), record(), settings, generator(), train=True)[1].masks is None
    assert make_view(painted(two), two, replace(settings, masks=False), generator(), train=True)[1].masks is None


def test_mosaic_masks():
    parts = [record(segmentation=(POLYGON,)) for _ in range(4)]
    settings = ViewSettings(size=60, flip=0.0, masks=True)
    _, target, _ = make_mosaic([painted(part) for part in parts], parts, settings, generator(3))
    assert target.masks.shape[1:] == (40, 60)
    for (x1, y1, x2, y2), mask in zip(target.boxes_xyxy.int().tolist(), target.masks, strict=True):
        inside = mask[y1:y2, x1:x2]
        assert int(inside.sum()) == int(mask.sum())
        assert int(mask.sum()) > 0


def test_wrong_run_lengths_name_the_image():
    wrong = record(segmentation=({"size": [40, 60], "counts": [5, 7]},))
    with pytest.raises(DataError, match=r"image.png: a mask's run lengths sum to 12, not to 60x40"):
        make_view(painted(wrong), wrong, ViewSettings(size=60, masks=True), generator(), train=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resize": "leterbox"},
            r"resize='leterbox' is not known \(did you mean 'letterbox'\?\); use letterbox, stretch, short_side",
        ),
        ({"size": 0}, "size=0 must be a whole number of pixels, at least 32"),
        ({"size": 99.5}, "size=99.5 must be a whole number"),
        ({"max_size": 32, "resize": "short_side"}, "max_size=32 must be .* at least size=64"),
        ({"max_size": 128}, "max_size=128 has no effect with resize='letterbox'"),
        ({"flip": -0.1}, "flip=-0.1 must lie between 0 and 1"),
        ({"colour": math.nan}, "colour=nan must lie between 0 and 1"),
        ({"mosaic": 1.5}, "mosaic=1.5 must lie between 0 and 1"),
        ({"scale_jitter": (0.0, 1.0)}, r"scale_jitter=\(0.0, 1.0\) must be two positive numbers"),
        ({"scale_jitter": (math.nan, 1.0)}, "must be two positive numbers"),
        ({"scale_jitter": (2.0, 1.0)}, "must name the smaller zoom first"),
    ],
)
def test_impossible_settings_are_one_clear_line(changes, message):
    with pytest.raises(RunError, match=message) as caught:
        ViewSettings(**{"size": 64, **changes}).validate()
    assert "\n" not in str(caught.value)
    ViewSettings().validate()
