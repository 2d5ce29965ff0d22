import pytest

from detdistill.data.text import read_text, read_yaml
from detdistill.errors import DataError

XML = '<?xml version="1.0" encoding="{}"?>\n<annotation>é 猫</annotation>'


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("UTF-8", "utf-8"),
        ("gb2312", "gbk"),
        ("GBK", "gbk"),
        ("gb18030", "gb18030"),
        ("utf-8", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("UTF-16", "utf-8"),  # as .NET writes it
        ("gb2312", "utf-16"),  # the mark is right, the declaration was copied
    ],
)
def test_xml_is_decoded_as_declared(tmp_path, name, codec):
    text = XML.format(name).replace("é", "中")
    (tmp_path / "a.xml").write_bytes(text.encode(codec))
    assert read_text(tmp_path / "a.xml") == text


def test_latin_1_is_decoded_where_it_is_declared(tmp_path):
    text = XML.format("ISO-8859-1").replace("猫", "ü")
    (tmp_path / "a.xml").write_bytes(text.encode("latin-1"))
    assert read_text(tmp_path / "a.xml") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (XML.format("ansi").encode(), "its XML declaration says ansi, which is no known encoding; save it as UTF-8"),
        (XML.format("base64").encode(), "says base64, which is no known encoding"),
        (XML.format("utf-8").encode("gbk", "replace"), "not utf-8 text at byte"),
        (XML.format("ascii").encode("latin-1", "replace"), "not utf-8 text at byte"),
        ("é".encode("latin-1"), r"not utf-8 text at byte 0 \(without a byte order mark or an XML encoding it must be UTF-8\)"),
        ("ab".encode("utf-16-le"), "has NUL characters"),
        (b"\xff\xfea", "not utf-16 text at byte 2"),
        (None, "a folder, where a file is expected"),
    ],
)
def test_other_bytes_are_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "a.xml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_text(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.txt: there is no such file"):
        read_text(tmp_path / "gone.txt")


def test_yaml_texts_stay_as_written_and_merges_work(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("base: &base {a: no, b: 007}\nmore: {<<: *base, b: ~}\nlist: [1.10, 'x', 2024-01-01, on]\n")
    assert read_yaml(file) == {
        "base": {"a": "no", "b": "007"},
        "more": {"a": "no", "b": "~"},
        "list": ["1.10", "x", "2024-01-01", "on"],
    }
