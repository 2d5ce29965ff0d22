"""Annotation files as text: their encodings, and YAML without silent losses.

A file is decoded as it says itself: by its byte order mark, by the ``encoding`` of its XML declaration, else as UTF-8. There is
no guessing: a wrong guess turns one class name into another. YAML mappings with a repeated key are refused, because all
values but the last would be lost.
"""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

from detdistill.errors import DataError

# The marks of UTF-32 go first: that of UTF-32 little endian begins with that of UTF-16 little endian.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DECLARATION = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']+)["']""")
MAX_YAML_BYTES = 1_000_000
"""PyYAML reads about 300 kB a second; a ``data.yaml`` with 20,000 classes has about 500 kB."""


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
        DataError: it does not exist, is no file (but a folder, a pipe, a device), or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: {'a folder' if path.is_dir() else 'no regular file'}, where a file is expected; remove it")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}; check its permissions") from error


def read_text(path: Path) -> str:
    """Text of a file, decoded by its byte order mark, by its XML declaration, or as UTF-8.

    Raises:
        DataError: as ``read_bytes``; or the bytes are no text of that encoding, or the encoding is unknown.
    """
    content = read_bytes(path)
    for mark, codec in MARKS:
        if content.startswith(mark):
            return _decode(path, content, codec, f"its byte order mark says {codec.removesuffix('-sig')}")
    declared = DECLARATION.match(content[:400])
    if declared:
        name = declared[1].decode("ascii", "replace").strip()
        # A declaration that is legible byte by byte is no UTF-16; .NET writes it so into UTF-8 files.
        if name.lower().replace("_", "-") not in ("utf-8", "utf8", "ascii", "us-ascii") and not name.lower().startswith("utf-16"):
            # Files that say gb2312 often have characters of its supersets, as every browser knows.
            codec = "gb18030" if name.lower().replace("_", "-") in ("gb2312", "gbk", "x-gbk") else name
            return _decode(path, content, codec, f"its XML declaration says {name}")
    return _decode(path, content, "utf-8", "without a byte order mark or an XML encoding it must be UTF-8")


def _decode(path: Path, content: bytes, codec: str, why: str) -> str:
    try:
        text = content.decode(codec)
    except LookupError as error:
        raise DataError(f"{path}: {why}, which is no known encoding; save it as UTF-8") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not {codec.removesuffix('-sig')} text at byte {error.start} ({why}); save it as UTF-8"
        ) from error
    except UnicodeError as error:
        raise DataError(f"{path}: cannot be decoded ({why}): {error}; save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path}: has NUL characters, so it is no text or UTF-16 without a byte order mark; save it as UTF-8")
    return text


class _AsWritten(yaml.SafeLoader):
    """Safe YAML in which plain scalars stay as written: ``no``, ``~``, ``1.10``, ``007`` and dates are texts.

    Class names are texts whatever they look like; the reader turns into numbers what has to be a number.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # a tag !!map may stand before anything
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                _repeated(key)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


# Set from outside: the type of the base class's attribute allows no other way.
_AsWritten.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}


def _repeated(key: yaml.ScalarNode) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r:.60} occurs twice", key.start_mark)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file in which every plain scalar is the text as written.

    Raises:
        DataError: as ``read_text``; or it is not valid YAML, a mapping has a key twice, or it is larger than 1 MB.
    """
    text = read_text(path)
    if len(text) > MAX_YAML_BYTES:
        raise DataError(
            f"{path}: has {len(text)} characters, more than the {MAX_YAML_BYTES} of any data.yaml; list images in a text file"
        )
    try:
        return yaml.load(text, _AsWritten)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DataError(f"{path}: not valid YAML{place}: {error.problem}; fix that line") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply to be a data.yaml; write it anew") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        # An explicit tag (!!int, !!timestamp) on a text that is none fails in PyYAML with plain exceptions.
        raise DataError(f"{path}: not valid YAML: {' '.join(str(error).split())}; write plain texts and numbers") from error
