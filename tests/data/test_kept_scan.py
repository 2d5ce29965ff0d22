"""The second start takes the scan that was kept, and sees every file that changed, came or went."""

import os
import time

import numpy as np
import pytest

from detdistill.data import discover, kept_scan
from detdistill.data.discover import load_data, read_sets
from tests.data.forms import make_coco, make_voc, make_yolo

MAKERS = {"coco": make_coco, "yolo": make_yolo, "voc": make_voc}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_scan, "QUIET_SECONDS", -1000.0)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often files are read."""
    found = []
    read = discover._read
    monkeypatch.setattr(discover, "_read", lambda path: found.append(path) or read(path))
    return found


@pytest.fixture(params=MAKERS)
def data(request, tmp_path):
    return MAKERS[request.param](tmp_path / "data")


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_kept_scan_is_what_was_read(data, reads):
    first, again = load_data(data), load_data(data)
    assert len(reads) == 1
    assert first.notes == again.notes
    for mine, theirs in zip(again.sets, first.sets, strict=True):
        for name in ("name", "form", "root", "classes", "defects", "fingerprint"):
            assert getattr(mine, name) == getattr(theirs, name)
        for one, other in zip(mine.records, theirs.records, strict=True):
            assert (one.id, one.path, one.size_hw, one.segmentation) == (other.id, other.path, other.size_hw, other.segmentation)
            for name in ("boxes_xyxy", "labels", "crowd", "areas"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
                assert getattr(one, name).dtype == getattr(other, name).dtype


def test_a_changed_an_added_and_a_removed_file_are_seen(data, reads):
    root = data if data.is_dir() else data.parent
    load_data(data)
    image = next(path for path in files(root) if path.suffix == ".jpg")
    os.utime(image, (1, 1))
    load_data(data)
    assert len(reads) == 2
    (root / "new.txt").write_text("")
    load_data(data)
    assert len(reads) == 3
    (root / "new.txt").unlink()
    load_data(data)
    assert len(reads) == 4
    load_data(data)
    assert len(reads) == 4


def test_same_size_and_same_time_of_modification_but_another_content(data, reads):
    root = data if data.is_dir() else data.parent
    load_data(data)
    file = next(path for path in files(root) if path.suffix in (".txt", ".json", ".xml"))
    before = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    load_data(data)
    assert len(reads) == 2  # the time of the inode's change tells


def test_rescan_reads_every_file(data, reads):
    load_data(data)
    load_data(data, rescan=True)
    assert len(reads) == 2


def test_other_versions_read_again(data, reads, monkeypatch):
    load_data(data)
    monkeypatch.setattr(kept_scan, "software", lambda: "another")
    load_data(data)
    assert len(reads) == 2


def test_data_that_were_just_written_are_not_kept(data, reads, monkeypatch):
    monkeypatch.setattr(kept_scan, "QUIET_SECONDS", 1000.0)
    load_data(data)
    load_data(data)
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"x" * 1000])
def test_a_broken_kept_file_is_replaced(content, data, reads, tmp_path):
    load_data(data)
    (kept,) = (tmp_path / "cache" / "scans").glob("*.npz")
    whole = kept.read_bytes()
    kept.write_bytes(content or whole[: len(whole) // 2])
    load_data(data)
    load_data(data)
    assert len(reads) == 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(data, reads, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "file"))
    load_data(data)
    load_data(data)
    assert len(reads) == 2
    assert capsys.readouterr() == ("", "")


def test_data_with_images_elsewhere_are_not_kept(reads, tmp_path):
    file = make_yolo(tmp_path / "data")
    file = file if file.is_file() else file / "data.yaml"
    moved = tmp_path / "elsewhere" / "data.yaml"
    moved.parent.mkdir()
    moved.write_text(f"path: {file.parent}\n" + "\n".join(x for x in file.read_text().splitlines() if not x.startswith("path")))
    read_sets(moved)
    read_sets(moved)
    assert len(reads) == 2


def test_links_that_make_a_circle(data, reads):
    root = data if data.is_dir() else data.parent
    (root / "circle").symlink_to(root, target_is_directory=True)
    started = time.monotonic()
    load_data(data)
    load_data(data)
    assert len(reads) == 1
    assert time.monotonic() - started < 60
