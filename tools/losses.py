"""Write ``src/detdistill/losses.py``, which imports the public functions of all methods for editors and type checkers.

uv run python tools/losses.py           write the file
uv run python tools/losses.py --check   write nothing; exit code 1 if the file is out of date
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src/detdistill"
FILE = PACKAGE / "losses.py"
HEAD = '''"""The pure functions of all methods: tensors in, tensors out, usable in any training loop.

    from detdistill.losses import pkd_loss

Written by ``tools/losses.py`` from the files of the methods; a method's public functions begin with its slug.
"""

'''


def functions() -> dict[str, list[str]]:
    """Names of the public functions of each method's module, in the order of the file."""
    found = {}
    files = {path.stem: (path, path.stem) for path in (PACKAGE / "methods").glob("*.py") if path.stem != "__init__"}
    files |= {path.parent.name: (path, f"{path.parent.name}.loss") for path in (PACKAGE / "methods").glob("*/loss.py")}
    for slug, (path, module) in sorted(files.items()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith(f"{slug}_")]
        if names:
            found[module] = names
    return found


def content() -> str:
    """Text of the file, formatted as by ruff."""
    found = functions()
    imports = [
        "\n".join([f"from detdistill.methods.{module} import (", *(f"    {name}," for name in sorted(names)), ")"])
        for module, names in found.items()
    ]
    public = sorted(name for names in found.values() for name in names)
    listed = "\n".join(["__all__ = [", *(f'    "{name}",' for name in public), "]"])
    return HEAD + "\n".join(imports) + "\n\n" + listed + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        FILE.write_text(content(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != content():
        sys.exit("src/detdistill/losses.py is out of date: run `uv run python tools/losses.py`")


if __name__ == "__main__":
    main()
