import time

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageOps

from detdistill.data.loader import DetectionLoader, collate, read_image
from detdistill.data.records import DetectionSet, Record
from detdistill.data.transforms import ViewSettings
from detdistill.errors import DataError, RunError
from detdistill.structures import Target, View

SETTINGS = ViewSettings(size=32, flip=0.5, colour=0.2)


def write_set(folder, sizes):
    """Smooth images (so that compression and resizing hardly matter); image i has i % 3 boxes."""
    folder.mkdir(exist_ok=True)
    records = []
    for index, (height, width) in enumerate(sizes):
        rows, columns = np.mgrid[0:height, 0:width]
        pixels = np.stack([rows * 3 % 200 + index, columns * 2 % 200, np.full((height, width), index * 7 % 256)], axis=-1)
        path = folder / f"{index:03d}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        boxes = np.array([[2.0 + box, 3.0, 12.0 + box, 20.0] for box in range(index % 3)]).reshape(-1, 4)
        labels, crowd = np.arange(index % 3), np.arange(index % 3) == 1
        records.append(Record(100 + index, path, (height, width), boxes, labels, crowd, np.full(index % 3, 170.0)))
    return DetectionSet.of("train", "coco", folder, ("a", "b"), records)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), [(32, 32), (40, 30), (24, 48), (32, 64), (50, 50)] * 4 + [(33, 31)])


def loader(data, **changes):
    return DetectionLoader(data, **{"settings": SETTINGS, "batch_size": 4, "train": True, **changes})


def ids(batches):
    return [image_id for batch in batches for image_id in batch.ids]


def assert_equal(first, second):
    assert len(first) == len(second)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.ids == theirs.ids
        assert mine.views == theirs.views
        torch.testing.assert_close(mine.images, theirs.images, rtol=0, atol=0)
        torch.testing.assert_close(mine.sizes, theirs.sizes, rtol=0, atol=0)
        for one, other in zip(mine.targets, theirs.targets, strict=True):
            torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=0)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.crowd, other.crowd)


def test_collate_pads_with_zeros_to_a_multiple_of_32():
    def sample(height, width, boxes, image_id):
        target = Target(torch.ones(boxes, 4), torch.arange(boxes), torch.zeros(boxes, dtype=torch.bool))
        return torch.ones(3, height, width), target, View((height, width), (height, width)), image_id

    batch = collate([sample(33, 20, 2, 7), sample(10, 64, 0, 9)], ViewSettings(size=32, resize="short_side"))
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.sum(dim=(1, 2, 3)).tolist() == [3 * 33 * 20, 3 * 10 * 64]
    assert batch.images[0, :, :33, :20].eq(1).all()
    assert batch.sizes.dtype == torch.int64
    assert batch.sizes.tolist() == [[33, 20], [10, 64]]
    assert batch.ids == (7, 9)
    assert [len(target) for target in batch.targets] == [2, 0]
    assert batch.targets[0].boxes_xyxy.dtype == torch.float32
    assert batch.targets[1].boxes_xyxy.shape == (0, 4)
    # A letterbox is always the same square, however the images lie.
    square = collate([sample(33, 20, 2, 7)], ViewSettings(size=100))
    assert square.images.shape == (1, 3, 128, 128)


def test_masks_are_padded_with_their_image():
    masks = torch.ones(1, 10, 20, dtype=torch.bool)
    target = Target(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), masks)
    batch = collate([(torch.ones(3, 10, 20), target, View((10, 20), (10, 20)), 0)], ViewSettings(size=32))
    assert batch.targets[0].masks.shape == (1, 32, 32)
    assert int(batch.targets[0].masks.sum()) == 200
    assert bool(batch.targets[0].masks[0, :10, :20].all())


def test_training_shows_every_image_once_in_an_order_of_seed_and_epoch(data):
    mine = loader(data)
    assert len(mine) == 6
    first, second = list(mine), list(mine)
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 1]
    assert sorted(ids(first)) == sorted(ids(second)) == [100 + index for index in range(21)]
    assert ids(first) != ids(second)
    again = loader(data)
    again.set_epoch(1)
    assert_equal(list(again), second)
    assert ids(loader(data, seed=1)) != ids(first)
    # Views change from epoch to epoch, too.
    views = [{i: view for batch in epoch for i, view in zip(batch.ids, batch.views, strict=True)} for epoch in (first, second)]
    assert any(views[0][i].flip != views[1][i].flip for i in views[0])


def test_evaluation_keeps_order_and_colours(data):
    batches = list(loader(data, train=False))
    assert ids(batches) == [100 + index for index in range(21)]
    assert not any(view.flip or view.photometric for batch in batches for view in batch.views)
    pixels = torch.from_numpy(np.array(Image.open(data.records[0].path))).permute(2, 0, 1) / 255
    torch.testing.assert_close(batches[0].images[0], pixels)
    assert batches[0].targets[2].boxes_xyxy[1].tolist() == pytest.approx([2.0, 2.0, 13 * 32 / 48, 20 * 32 / 48])
    assert batches[0].targets[2].crowd.tolist() == [False, True]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("settings", [SETTINGS, ViewSettings(size=32, scale_jitter=(0.5, 2.0), mosaic=0.5)])
def test_neither_workers_nor_memory_change_a_batch(data, train, settings):
    plain = loader(data, train=train, settings=settings)
    expected = [list(plain), list(plain)]
    state = torch.get_rng_state()
    for changes in ({"workers": 2}, {"in_memory": True}, {"workers": 1, "in_memory": True}):
        other = loader(data, train=train, settings=settings, **changes)
        for epoch in expected:
            assert_equal(list(other), epoch)
    assert torch.equal(torch.get_rng_state(), state)  # a model made afterwards starts from the same weights


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_goes_on_with_exactly_the_remaining_batches(data, workers, done):
    whole = loader(data)
    epochs = [list(whole) for _ in range(3)]
    stopped = loader(data, workers=workers)
    stopped.set_epoch(1)
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(done)]
    assert stopped.state_dict() == {"epoch": 1, "batches_done": done}

    resumed = loader(data, workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    iter(resumed)  # trainers do this; it must not cost a batch
    assert resumed.state_dict() == stopped.state_dict()
    if done == len(whole):
        assert_equal(list(resumed), epochs[2])
        return
    resumed.set_epoch(1)  # told again, as in on_train_epoch_start
    assert_equal(seen + list(resumed), epochs[1])
    assert_equal(list(resumed), epochs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_is_told_one_batch_before_it_is_returned(data, workers):
    told, seen = [], []
    ahead = loader(data, workers=workers, ahead=told.append)
    for batch in ahead:
        seen.append(batch)
        assert len(told) == min(len(seen) + 1, len(ahead))
        assert ahead.state_dict()["batches_done"] == len(seen), "those that were returned, not those that were told"
    assert_equal(seen, list(loader(data)))
    assert_equal(told, seen)
    ahead.load_state_dict({"epoch": 0, "batches_done": 4})
    assert_equal(list(ahead), seen[4:])
    assert_equal(told[len(seen) :], seen[4:])


def test_a_pass_left_early_starts_again(data):
    mine = loader(data, workers=1)
    first = next(iter(mine))
    second = list(mine)
    assert_equal([first], second[:1])
    assert len(second) == 6
    mine.set_epoch(0)
    assert_equal(list(mine), second)


@pytest.mark.parametrize("world", [1, 2, 4, 5])
def test_ranks_share_the_images(data, world):
    train = [ids(loader(data, rank=rank, world=world)) for rank in range(world)]
    assert len({len(mine) for mine in train}) == 1
    assert set().union(*train) == {100 + index for index in range(21)}
    assert sum(map(len, train)) < 21 + world
    whole = ids(loader(data))
    assert [image for row in zip(*train, strict=True) for image in row][:21] == whole
    evaluation = [ids(loader(data, rank=rank, world=world, train=False)) for rank in range(world)]
    assert sorted(image for mine in evaluation for image in mine) == [100 + index for index in range(21)]
    assert sum(len(loader(data, rank=rank, world=world, train=False, batch_size=1)) for rank in range(world)) == 21


def test_more_ranks_than_images(tmp_path):
    small = write_set(tmp_path, [(32, 32)] * 2)
    train = [ids(loader(small, rank=rank, world=5)) for rank in range(5)]
    assert [len(mine) for mine in train] == [1] * 5
    assert set().union(*train) == {100, 101}
    assert [ids(loader(small, rank=rank, world=5, train=False)) for rank in range(5)] == [[100], [101], [], [], []]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_clear_line(tmp_path, workers):
    broken = write_set(tmp_path / "set", [(32, 32)] * 3)
    path = broken.records[1].path
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        list(loader(broken, workers=workers, train=False))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: the image cannot be decoded (")
    assert f"detdistill data inspect {broken.root} --deep" in message


def test_an_image_of_another_size_is_refused(tmp_path):
    wrong = write_set(tmp_path / "set", [(32, 32)])
    Image.new("RGB", (32, 40)).save(wrong.records[0].path)
    with pytest.raises(DataError, match="the image has 32x40 pixels, but 32x32 were expected"):
        list(loader(wrong))


def test_impossible_numbers_are_refused(data):
    for changes, words in (
        ({"batch_size": 0}, "batch=0"),
        ({"workers": -1}, "workers=-1"),
        ({"rank": 2, "world": 2}, "rank 2 does not exist among 2"),
        ({"settings": ViewSettings(size=32, flip=2.0)}, "flip=2.0"),
    ):
        with pytest.raises(RunError, match=words):
            loader(data, **changes)
    with pytest.raises(RunError, match="batch 7: an epoch has 6 batches"):
        loader(data).load_state_dict({"epoch": 0, "batches_done": 7})


def test_files_of_all_kinds_are_read(tmp_path):
    grey16 = np.array([[0, 256 * 5 + 3], [65535, 256 * 200]], dtype=np.uint16)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    assert read_image(tmp_path / "grey16.png")[1].tolist() == [[0, 5], [255, 200]]
    palette = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png")[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]
    turned = Image.new("L", (4, 2), 7)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)


def test_is_fast_enough_to_feed_a_small_detector(tmp_path):
    images = write_set(tmp_path, [(128, 128)] * 64)
    mine = loader(images, settings=ViewSettings(size=128), batch_size=8, in_memory=True)
    list(mine)
    passes = []
    for _ in range(8):
        start = time.perf_counter()
        list(mine)
        passes.append(time.perf_counter() - start)
    # 5500 images a second were measured on one quiet core; the best pass may be ten times slower on a busy machine.
    assert 64 / min(passes) > 550


# ---------------------------------------------------------------------------------------------------------- Lightning


class Sees(lightning.LightningModule):
    """Trains one number and notes which images it has seen."""

    def __init__(self, stop_at=None, **changes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.stop_at, self.changes = [], stop_at, changes

    def training_step(self, batch, index):
        if self.global_step == self.stop_at:
            raise RuntimeError("power cut")
        self.seen.append((self.current_epoch, batch.ids))
        return (self.weight - batch.images.mean()) ** 2

    def validation_step(self, batch, index):
        pass

    def on_train_epoch_start(self):
        if self.changes.get("tell_epoch"):
            self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, train, val, resume=None, **when):
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **when)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=3, callbacks=[checkpoint], **quiet)
    trainer.fit(module, train, val, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("tell_epoch", [False, True])
@pytest.mark.parametrize(
    ("workers", "when", "saved"),
    [
        (0, {"every_n_train_steps": 2}, 2),
        (2, {"every_n_train_steps": 8}, 8),
        (0, {"every_n_train_steps": 6}, 6),
        (2, {"every_n_train_steps": 12}, 12),
        (0, {"every_n_epochs": 1}, 6),
        (0, {"every_n_epochs": 1, "save_on_train_epoch_end": True}, 12),
    ],
)
def test_lightning_loses_and_repeats_nothing(data, tmp_path, workers, when, saved, tell_epoch):
    """Six batches an epoch: saved within an epoch, at its very end and after validation; the run breaks off one step later."""

    def loaders(workers):
        return loader(data, workers=workers), loader(data, train=False)

    whole = Sees(tell_epoch=tell_epoch)
    fit(whole, tmp_path / "whole", *loaders(0), every_n_train_steps=100)
    assert len(whole.seen) == 18

    broken = Sees(stop_at=saved + 1, tell_epoch=tell_epoch)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, tmp_path / "broken", *loaders(workers), **when)
    assert len(broken.seen) == saved + 1

    resumed = Sees(tell_epoch=tell_epoch)
    file = tmp_path / "broken" / f"step={saved}.ckpt"
    fit(resumed, tmp_path / "resumed", *loaders(workers), resume=file, every_n_train_steps=100)
    assert broken.seen[:saved] + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_jpeg_and_png_are_decoded_to_the_pixels_of_pil(tmp_path, mode, turn):
    pixels = np.random.default_rng(0).integers(0, 255, (7, 11, 3), dtype=np.uint8).repeat(5, 0).repeat(3, 1)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = turn
    names = ["a.jpg", "b.jpg"] + ["c.png"] * (mode != "CMYK")
    for name in names:
        options = {"progressive": True} if name == "b.jpg" else {}
        image.convert(mode).save(tmp_path / name, exif=exif, **options)
        with Image.open(tmp_path / name) as file:
            expected = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        assert np.array_equal(read_image(tmp_path / name).permute(1, 2, 0).numpy(), expected)
