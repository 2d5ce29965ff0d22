#!/usr/bin/env bash
# obstore 0.12.1: its fsspec file system overwrites a file that `mode="create"` must leave alone, and cannot read to the end.
#
# Expected: fsspec's `pipe_file(path, value, mode="create")` raises FileExistsError if the file exists, as fsspec's own memory file
# system does; that is how two writers of one place are told apart. `cat_file` takes a start without an end. Seen: the second
# `create` replaces the first one's content without a word, although the store below has a conditional write (`obstore.put` with
# `mode="create"`), and a start alone is NotImplementedError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet obstore==0.12.1 fsspec==2026.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import fsspec
import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.fsspec import FsspecStore
from obstore.store import MemoryStore


def created_twice(files, path: str) -> str:
    files.pipe_file(path, b"of the first writer", mode="create")
    try:
        files.pipe_file(path, b"of the second writer", mode="create")
    except FileExistsError:
        return "FileExistsError"
    return files.cat_file(path).decode()


def tail(files, path: str) -> str:
    try:
        return files.cat_file(path, start=7).decode()
    except NotImplementedError:
        return "NotImplementedError"


theirs, own = FsspecStore("memory"), fsspec.filesystem("memory")
both = (("obstore", theirs), ("fsspec", own))
found = {name: (created_twice(files, "/runs/list"), tail(files, "/runs/list")) for name, files in both}
for name, (after, rest) in found.items():
    print(f"file system of {name}: the file after a second create: {after}; its content from byte 7: {rest}")
store = MemoryStore()
obstore.put(store, "list", b"first", mode="create")
try:
    obstore.put(store, "list", b"second", mode="create")
except AlreadyExistsError:
    print("obstore.put of the same store: AlreadyExistsError")
else:
    raise SystemExit("changed")
assert found == {
    "obstore": ("of the second writer", "NotImplementedError"),
    "fsspec": ("FileExistsError", "first writer"),
}, "changed"
print("as found")
PYTHON
