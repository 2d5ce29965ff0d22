import os
import unicodedata

import pytest

from detdistill.data.paths import folders_below, match_listed, outside, split_parts


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def find(root, *names, depth=3):
    found = match_listed(names, [root, root / "images"], folders_below(root, 1), lambda: folders_below(root, depth))
    return [None if path is None else path.relative_to(root).as_posix() for path in found]


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        ("a.png", ["a.png"]),
        ("./x//a.png", ["x", "a.png"]),
        ("/data/x/a.png", ["data", "x", "a.png"]),
        ("C:\\data\\x\\a.png", ["data", "x", "a.png"]),
        ("x\\a.png", ["x", "a.png"]),
        ("http://host/x/a.png", ["host", "x", "a.png"]),
        ("s3://bucket/x/a.png", ["bucket", "x", "a.png"]),
        ("/", [""]),
    ],
)
def test_parts(listed, parts):
    assert split_parts(listed) == parts


@pytest.mark.parametrize("prefix", ["", "images/", "/somewhere/images/", "D:\\old\\images\\", "renamed/deep/", "gs://b/images/"])
def test_the_end_of_a_path_decides_between_equal_names(tmp_path, prefix):
    put(tmp_path, "images/cam1/0.png", "images/cam2/0.png")
    assert find(tmp_path, f"{prefix}cam2/0.png", f"{prefix}cam1/0.png") == ["images/cam2/0.png", "images/cam1/0.png"]


def test_a_missing_file_is_not_replaced_by_its_namesake(tmp_path):
    put(tmp_path, "images/cam1/0.png", "images/cam1/1.png", "images/cam2/0.png")
    assert find(tmp_path, "/x/cam1/0.png", "/x/cam2/0.png", "/x/cam2/1.png") == ["images/cam1/0.png", "images/cam2/0.png", None]
    assert find(tmp_path, "cam1/1.png", "cam2/1.png") == ["images/cam1/1.png", None]
    assert find(tmp_path, "cam3/0.png") == [None]
    assert find(tmp_path, "gone/1.png", "lost/1.png") == [None, None]


def test_a_lone_name_serves_if_it_is_the_only_one(tmp_path):
    put(tmp_path, "images/0.png", "thumbs/1.png", "crops/1.png", "crops/2.png")
    assert find(tmp_path, "/old/0.png", "other/2.png", "more/1.png") == ["images/0.png", "crops/2.png", None]
    # Names without folders: the root and images go first, then a folder that is the only one.
    assert find(tmp_path, "0.png", "2.png", "1.png") == ["images/0.png", "crops/2.png", None]


def test_folders_far_below_are_searched_only_where_needed(tmp_path):
    put(tmp_path, "train/patch0/a.jpg", "train/patch1/b.jpg", "train/patch1/a.jpg")
    assert find(tmp_path, "images/v1/patch0/a.jpg", "images/v2/patch1/b.jpg") == ["train/patch0/a.jpg", "train/patch1/b.jpg"]
    assert find(tmp_path, "b.jpg", "a.jpg") == ["train/patch1/b.jpg", None]


def test_many_folders_are_put_in_one_table(tmp_path):
    put(tmp_path, *(f"p{index}/{index}.png" for index in range(40)), "p0/7.png")
    assert find(tmp_path, "5.png", "7.png", "39.png") == ["p5/5.png", None, "p39/39.png"]


def test_names_are_equal_after_unquoting_and_normalisation(tmp_path):
    name = unicodedata.normalize("NFD", "\u00e4 b.png")
    put(tmp_path, name, "c%20d.png", "e f.png")
    assert find(tmp_path, "\u00e4%20b.png", "c d.png", "e%20f.png") == [name, "c%20d.png", "e f.png"]


@pytest.mark.parametrize("name", ["a\0.png", "x/\0/a.png", "n" * 300 + ".png", "\ud800.png", "../" * 30 + "a", "sub", ""])
def test_impossible_names_are_missing(tmp_path, name):
    put(tmp_path, "sub/b.png")
    assert find(tmp_path, name) == [None]


def test_an_absolute_path_elsewhere_is_found_if_the_root_has_none(tmp_path):
    put(tmp_path, "root/images/a/0.png", "away/a/0.png", "away/a/1.png")
    found = match_listed([f"{tmp_path}/away/a/1.png"], [tmp_path / "root"], folders_below(tmp_path / "root", 1), list)
    assert found == [tmp_path / "away/a/1.png"]
    assert find(tmp_path / "root", f"{tmp_path}/away/a/0.png") == ["images/a/0.png"]


def test_folders_below_end_though_links_go_round(tmp_path):
    put(tmp_path, "a/b/x.png", ".hidden/y.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [place.relative_to(tmp_path).as_posix() for place in folders_below(tmp_path, 5)] == ["a", "a/b"]


def test_outside(tmp_path):
    put(tmp_path, "root/a.png", "root/sub/b.png", "away/c.png", "away/d.png")
    (tmp_path / "root" / "c.png").symlink_to(tmp_path / "away" / "c.png")
    (tmp_path / "root" / "in.png").symlink_to(tmp_path / "root" / "a.png")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "away")
    names = ["a.png", "sub/b.png", "c.png", "in.png", "folder/d.png", "../away/d.png", "gone.png"]
    found = outside([tmp_path / "root" / name for name in names], tmp_path / "root")
    assert [os.path.relpath(path, tmp_path / "root") for path in found] == ["c.png", "folder/d.png", "../away/d.png"]
