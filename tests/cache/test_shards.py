import errno
import json
import os

import pytest
import torch
from safetensors import safe_open

from detdistill.cache import retries
from detdistill.cache.encoding import decode, encode
from detdistill.cache.shards import FOLDER, ShardIndex, ShardWriter
from detdistill.cache.storage import SECRET_URL, CacheError, LocalFolder, StoreError, masked, storage
from detdistill.errors import DetdistillWarning
from detdistill.structures import Features

CACHE = "fingerprint"


def record(number, width=3):
    maps = torch.full((1, 2, 2, width), float(number))
    return Features((maps, maps[..., :1].contiguous()), (8, 16), (maps[:, 0] > 1e9, maps[:, 0, :, :1] > 1e9))


def write(folder, keys, **options):
    writer = ShardWriter(folder, CACHE, **options)
    for key in keys:
        writer.add(key, encode(record(int(key.split("/")[0]), 3 + int(key.split("/")[0]) % 2), "float32"))
    writer.flush()
    return writer


def read(index, key):
    layout, data = index.read(key)
    return decode(layout, data)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return (
        storage(str(tmp_path / "cache")) if request.param == "local" else storage(f"memory://{tmp_path.name}/{request.node.name}")
    )


def test_records_are_found_in_any_order_from_all_shards_of_all_writers(folder):
    keys = [f"{number}/64x64" for number in range(10)]
    first = write(folder, keys[:7], writer="0of2", max_records=3)
    assert first.written == 7
    index = ShardIndex(folder, CACHE)
    assert index.missing(keys) == keys[7:]
    write(folder, keys[7:], writer="1of2")
    with pytest.raises(KeyError):
        index.read(keys[8])
    index.refresh()
    assert index.missing(keys) == []
    for key in reversed(keys):
        assert read(index, key).maps[0].flatten().tolist() == [float(key[0])] * (4 * (3 + int(key[0]) % 2))
    assert len([name for name in folder.sizes(FOLDER) if name.endswith(".json")]) == 4


def test_shards_are_limited_in_bytes_too(folder):
    write(folder, [f"{number}/a" for number in range(6)], max_megabytes=1e-4)
    assert len([name for name in folder.sizes(FOLDER) if name.endswith(".json")]) == 3


def test_any_safetensors_reader_opens_a_shard(tmp_path):
    write(LocalFolder(tmp_path), ["4/64x64", "5/64x64-flip"])
    (shard,) = tmp_path.glob("shards/*.safetensors")
    with safe_open(shard, "pt") as file:
        assert torch.equal(file.get_tensor("4/64x64:maps[0]"), torch.full((1, 2, 2, 3), 4.0))
        assert torch.equal(file.get_tensor("5/64x64-flip:maps[1]"), torch.full((1, 2, 2, 1), 5.0))
        assert file.get_tensor("5/64x64-flip:padding[0]").dtype == torch.bool


def test_every_flipped_bit_of_a_record_is_found_and_named(tmp_path):
    write(LocalFolder(tmp_path), ["1/a", "2/a"])
    index = ShardIndex(LocalFolder(tmp_path), CACHE)
    (shard,) = tmp_path.glob("shards/*.safetensors")
    good = shard.read_bytes()
    place = index.places["2/a"]
    for position in range(place.start, place.end):
        shard.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        with pytest.raises(CacheError, match=r"safetensors: the record of image 2/a is damaged") as caught:
            index.read("2/a")
        assert "\n" not in str(caught.value)
    assert read(index, "1/a").maps[0].unique().tolist() == [1.0], "the other record is not touched"


def test_every_changed_manifest_is_found(tmp_path):
    write(LocalFolder(tmp_path), ["1/a", "2/a"])
    (manifest,) = tmp_path.glob("shards/*.json")
    good = manifest.read_bytes()
    for position in range(0, len(good) - 1, 3):
        changed = good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :]
        manifest.write_bytes(changed)
        with pytest.raises(CacheError, match="damaged"):
            ShardIndex(LocalFolder(tmp_path), CACHE)


def test_truncated_missing_and_foreign_shards_are_named(tmp_path):
    folder = LocalFolder(tmp_path)
    write(folder, ["1/a", "2/a"])
    index = ShardIndex(folder, CACHE)
    (shard,) = tmp_path.glob("shards/*.safetensors")
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) * 6 // 10])
    with pytest.raises(CacheError, match=rf"{shard.name} has {len(good) * 6 // 10} of {len(good)} bytes"):
        ShardIndex(folder, CACHE)
    with pytest.raises(CacheError, match="record of image 2/a is damaged"):
        index.read("2/a")
    shard.unlink()
    with pytest.raises(CacheError, match="is missing"):
        ShardIndex(folder, CACHE)
    with pytest.raises(CacheError, match="is missing"):
        index.read("1/a")
    shard.write_bytes(good)
    with pytest.raises(CacheError, match="belongs to another cache"):
        ShardIndex(folder, "other")


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, monkeypatch):
    folder = LocalFolder(tmp_path)
    space = [2]  # files that still fit

    def full(name, *content, write=folder.write):
        if not space[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        space[0] -= 1
        write(name, *content)

    monkeypatch.setattr(folder, "write", full)
    writer = ShardWriter(folder, CACHE, "0", max_records=2)
    writer.add("1/a", encode(record(1), "float32"))
    writer.add("2/a", encode(record(2), "float32"))
    writer.add("3/a", encode(record(3), "float32"))
    with pytest.raises(OSError, match="No space"):
        writer.add("4/a", encode(record(4), "float32"))
    assert set(ShardIndex(folder, CACHE).places) == {"1/a", "2/a"}
    space[0] = 9
    writer.flush()
    assert set(ShardIndex(folder, CACHE).places) == {"1/a", "2/a", "3/a", "4/a"}
    assert not list(tmp_path.glob("shards/*.tmp"))


def test_what_a_dead_writer_left_is_cleaned_by_its_successor_alone(folder):
    write(folder, ["1/a"], writer="1of2")
    folder.write(f"{FOLDER}/1of2-deadbeef-00007.safetensors", b"half")
    folder.write(f"{FOLDER}/11of2-deadbeef-00007.safetensors", b"somebody else's")
    assert set(ShardIndex(folder, CACHE).places) == {"1/a"}, "without a manifest it is nothing"
    ShardWriter(folder, CACHE, "1of2")
    left = [name for name in folder.sizes(FOLDER) if "deadbeef" in name]
    assert left == ["11of2-deadbeef-00007.safetensors"]


def test_a_record_written_twice_counts_once(folder):
    write(folder, ["1/a"], writer="0")
    write(folder, ["1/a"], writer="1")
    index = ShardIndex(folder, CACHE)
    assert list(index.places) == ["1/a"]
    assert read(index, "1/a").maps[0][0, 0, 0, 0] == 1


def test_a_manifest_is_small_and_shares_layouts(tmp_path):
    write(LocalFolder(tmp_path), [f"{number}/a" for number in range(40)])
    (manifest,) = tmp_path.glob("shards/*.json")
    content = json.loads(manifest.read_text())["content"]
    assert len(content["layouts"]) == 2
    assert manifest.stat().st_size < 40 * 40 + 2000


def test_urls_survive_paths():
    from pathlib import Path

    assert storage(str(Path("memory://a/b"))).url == "memory://a/b"
    assert storage("/x/y").url == "/x/y"
    assert storage("file:///x/y").url == "/x/y"
    with pytest.raises(CacheError, match="nosuch://"):
        storage("nosuch://a")


def test_swapped_files_are_named(tmp_path):
    folder = LocalFolder(tmp_path)
    write(folder, [f"{number}/-" for number in range(4)], max_records=2)
    one, two = sorted((tmp_path / FOLDER).glob("*.safetensors"))
    for kind, said in (
        (".json", r"00000.json describes .*00001.safetensors, so it was renamed"),
        (".safetensors", r"00000.safet"),
    ):
        first, second = one.with_suffix(kind), two.with_suffix(kind)
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        with pytest.raises(CacheError, match=said) as caught:
            ShardIndex(folder, CACHE).read("0/-")
        assert "renamed or swapped" in str(caught.value)
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])
    assert read(ShardIndex(folder, CACHE), "0/-").maps[0][0, 0, 0, 0] == 0


def test_temporary_files_of_dead_writers_are_removed(tmp_path):
    folder = LocalFolder(tmp_path)
    write(folder, ["0/-"])
    mine = tmp_path / FOLDER / "0-abc-00001.safetensors.1234.tmp"
    others = tmp_path / FOLDER / "001of002-abc-00001.safetensors.1234.tmp"
    old = tmp_path / FOLDER / "003of004-abc-00001.safetensors.1234.tmp"
    about = tmp_path / "cache.json.1234.tmp"
    for path in (mine, others, old, about):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ShardWriter(folder, CACHE)
    assert [path.exists() for path in (mine, others, old, about)] == [False, True, False, False]


def test_passwords_of_urls_are_hidden(monkeypatch):
    url = f"memory://me:SECRET/1@host/{id(monkeypatch)}"
    with pytest.warns(DetdistillWarning, match=r"the password in memory://me:\*\*\*@host/.* is hidden") as told:
        folder = storage(url)
    assert "SECRET" not in str(told[0].message)
    assert folder.url == masked(url)
    folder.write("a", b"b")
    with pytest.raises(CacheError, match=r"its password is not stored; give the whole URL, or set DETDISTILL_CACHE_URL"):
        storage(folder.url)
    monkeypatch.setenv(SECRET_URL, url)
    assert storage(folder.url).read("a") == b"b"


def test_errors_of_file_systems_become_one_line(monkeypatch):
    folder = storage("memory://host/x")

    def refuse(*_, **__):
        raise RuntimeError("530 Login of memory://me:SECRET@host failed")

    for name in ("ls", "cat_file", "pipe_file", "exists"):
        monkeypatch.setattr(folder._files, name, refuse, raising=False)
    for action in (
        lambda: folder.sizes(""),
        lambda: folder.read("a"),
        lambda: folder.write("a", b""),
        lambda: folder.remove("a"),
    ):
        with pytest.raises(OSError, match=r"^cannot \w+ memory://host/x.*: 530 Login of memory://me:\*\*\*@host failed; check"):
            action()
    with pytest.raises(CacheError, match=r"x/shards cannot be read: 530 Login"):
        ShardIndex(folder, CACHE)
    with pytest.raises(CacheError, match=r"^cache ftp://127.0.0.1:9/x: "):
        storage("ftp://127.0.0.1:9/x")


def test_a_file_system_of_fsspec_is_tried_again(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    folder = storage(f"memory://host/{id(monkeypatch)}")
    folder.write("a", b"12345")
    errors = iter([TimeoutError(), ConnectionResetError(), OSError(errno.EBUSY, "busy")])
    before = folder._files.cat_file

    def fails(path, *_, **options):
        if (error := next(errors, None)) is not None:
            raise error
        return before(path, **options)

    monkeypatch.setattr(folder._files, "cat_file", fails)
    with pytest.warns(DetdistillWarning, match=r"cannot read memory://host/\d+/a: busy; trying again for up to 120 seconds"):
        assert folder.read("a") == b"12345"
    cut = iter([b"12", b""])
    monkeypatch.setattr(folder._files, "cat_file", lambda *_, **__: next(cut, b"12345"))
    assert folder.read("a") == b"12345", "a file that arrives cut short is read again"
    errors = iter([OSError(errno.ENOSPC, "No space left on device"), None])
    monkeypatch.setattr(folder._files, "pipe_file", fails)
    with pytest.raises(StoreError, match=r"the store is full \(no space left\); make space there and run the same command again"):
        folder.write("b", b"1")
    assert next(errors) is None, "which was not tried again"


def test_a_record_that_arrives_damaged_is_read_again(folder, monkeypatch):
    write(folder, ["0/-", "1/-"])
    index, before, left = ShardIndex(folder, CACHE), folder.read, [1]

    def damaged(name, start=0, end=None):
        content = before(name, start, end)
        if left[0]:
            left[0] -= 1
            content[0] ^= 1
        return content

    monkeypatch.setattr(folder, "read", damaged)
    assert read(index, "1/-").maps[0][0, 0, 0, 0] == 1
    left[0] = 1
    assert ShardIndex(folder, CACHE).missing(["0/-", "1/-"]) == [], "and so is a manifest"
    left[0] = 2
    with pytest.raises(CacheError, match="the record of image 1/- is damaged"):
        read(index, "1/-")
