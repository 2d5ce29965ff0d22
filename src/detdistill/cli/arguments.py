"""Reading the words of a command and its settings file into the values that its function takes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from jsonargparse import ArgumentParser, Namespace

from detdistill.errors import DetdistillError, nearest
from detdistill.settings import RENAMED, meant, renamed
from detdistill.values import choices, in_words

if TYPE_CHECKING:
    pass


ALIASES = {"distill_model": "teacher", "distill-model": "teacher", **RENAMED}
"""Names of flags in other tools or earlier versions, and our name for each."""


RANGE = re.compile(r"\b(\d+)-(\d+)\b")
"""``0-2`` in a list of numbers."""


class Parser(ArgumentParser):
    """A parser that reports each mistake in one line, with the nearest known name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake in one line and exit with code 2."""
        text = " ".join(str(message).split()) or "wrong arguments"
        text = re.sub(r"^the following arguments are required:", "missing, but required:", text)
        hint = ""
        flags = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        unknown = re.search(r"(?:[Uu]nrecognized arguments:\s*-*|Option '(?=[\w.]+' is not accepted))([\w./-]+)", text)
        value = re.match(r"Parser key \"(\w+)\": .*(?:Got|Given) value: (.+)$", text)
        if value:
            name, given = value.group(1), value.group(2).strip("[]")
            kind = next(getattr(action, "_typehint", None) for action in self._actions if action.dest == name)
            if len(get_args(kind)) == 2 and get_args(kind)[1] is Ellipsis:  # for a list, the message shows the type of an item
                kind = get_args(kind)[0]
            text = f"{name}: {given!r} is not {in_words(kind)}"
            hint = nearest(given, choices(kind))
            if name == "device" and re.fullmatch(r"(cuda:|gpu:?)?\d+", given):
                hint = " (did you mean 'cuda'? the environment variable CUDA_VISIBLE_DEVICES chooses among GPUs)"
        elif unknown:
            name = unknown.group(1).partition("=")[0]
            text, hint = self._about_unknown(name, flags)
        sys.stderr.write(f"{self.prog}: {text}{hint}\n")
        sys.exit(2)

    def _about_unknown(self, name: str, flags: Sequence[str]) -> tuple[str, str]:
        """What to say of a word that is no flag, and what may be meant."""
        positional = [action.dest for action in self._actions if not action.option_strings]
        if name in positional:
            return f"{name} is given without --{name}", f"; write `{self.prog} {name.upper()}`"
        if "/" in name or os.path.exists(name):
            flag = next((flag for flag in ("model", "data", "images") if flag in flags), None)
            return f"{name!r} stands without a flag", f" (did you mean --{flag} {name}?)" if flag else ""
        hint = meant(name, flags) or f"; `{self.prog} --help` lists what there is"
        return f"no flag or key {name!r}", hint


def normalized(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """Rewrite the typed arguments into the form that jsonargparse reads.

    ``key=value`` becomes ``--key=value``, ``--baseline`` becomes ``--baseline=true``, ``--seeds 0,1,2`` or
    ``--seeds 0-2`` becomes ``--seeds=[0,1,2]``, and ``--recipe NAME`` becomes ``--config=FILE``. Names of other tools and dashes
    inside names are replaced. Files are moved to the front, so that a typed value overrides a file's, wherever it is typed.
    """
    types = {action.dest: getattr(action, "_typehint", str) for action in parser._actions}
    positional = any(not action.option_strings for action in parser._actions)
    several = {option.lstrip("-") for action in parser._actions if action.nargs == "+" for option in action.option_strings}
    files: list[str] = []
    normal: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if re.match(r"^[a-z_]+=", argument):
            argument = f"--{argument}"
        match = re.match(r"^--([\w-]+)(?:=(.*))?$", argument, re.DOTALL)
        if not match:
            normal.append(argument)
            continue
        name, value = ALIASES.get(match.group(1), match.group(1)).replace("-", "_"), match.group(2)
        wanted = types.get(name)
        flag = wanted is bool
        # In a command with positional arguments, the word after a flag is the flag's value only if it is true or false.
        alone = flag and positional and waiting[:1] not in (["true"], ["false"])
        if value is None and waiting and not waiting[0].startswith("--") and not alone:
            value = waiting.pop(0)
        if name in several:  # ``--model A B``: all words up to the next flag
            normal += [f"--{name}", *([] if value is None else [value])]
            while waiting and not re.match(r"^--|^[a-z_]+=", waiting[0]):
                normal.append(waiting.pop(0))
        elif name == "recipe" and name in types:
            files.append(f"--config={recipe_path(value or '')}")
        elif name == "config" and value:
            files.append(f"--config={_checked_config(parser, Path(value))}")
        elif value is None:
            normal.append(f"--{name}=true" if flag else f"--{name}")
        elif value in ("none", "null") and type(None) in get_args(wanted):
            normal.append(f"--{name}=null")
        elif "tuple[" in str(wanted) and not value.startswith("["):
            normal.append(f"--{name}=[{'' if value == 'none' else re.sub(RANGE, _numbers, value)}]")
        else:
            normal.append(f"--{name}={value}")
    return files + normal


def _numbers(found: re.Match[str]) -> str:
    """The numbers of a range such as ``0-2``, ends included: ``0,1,2``; a range that runs backwards stays as it is."""
    first, last = int(found[1]), int(found[2])
    return ",".join(map(str, range(first, min(last, first + 1000) + 1))) or found[0]


def _checked_config(parser: Parser, path: Path) -> str:
    """Check a settings file.

    Returns:
        What jsonargparse reads: the path of the file, or, if the file has names of earlier versions, its text with today's names.

    Raises:
        DetdistillError: the file is missing, is not YAML, holds no settings, or has a key that the command does not have.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DetdistillError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DetdistillError(f"config: {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise DetdistillError(f"config: {path} holds no settings; write lines such as `epochs: 12`")
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config", "recipe")]
    content = {"on" if key is True else key: value for key, value in content.items()}  # in YAML 1.1, the word on is true
    today = renamed(content)
    for key in today:
        if key not in known:
            raise DetdistillError(f"config: {path}: no key {key!r}{meant(str(key), known)}")
    return str(path) if today == content and "on" not in today else yaml.safe_dump(today)


def recipe_path(name: str) -> Path:
    """Path of a recipe's YAML file.

    Raises:
        DetdistillError: there is no recipe of this name.
    """
    folder = Path(__file__).parents[1] / "recipes"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if not name:
        raise DetdistillError(f"recipe: needs a name; recipes: {', '.join(names)}")
    if name not in names:
        raise DetdistillError(f"no recipe {name!r}{nearest(name, names)}; recipes: {', '.join(names)}")
    return folder / f"{name}.yaml"


def device_flag(parser: Parser, default: str = "auto") -> None:
    """Add ``--device`` to a command that runs a detector."""
    devices = Literal["auto", "cpu", "cuda"]
    parser.add_argument("--device", type=devices, default=default, help="where the detector runs; auto: cuda if there is a GPU")


def json_flag(parser: Parser, more: str = "") -> None:
    """Add ``--json``; ``more`` continues its help."""
    parser.add_argument("--json", type=bool, default=False, help=f"print one JSON document and nothing else on stdout{more}")


def plain(chosen: Namespace) -> dict[str, Any]:
    """The chosen values as keyword arguments for a Python function."""
    return {key: value for key, value in vars(chosen).items() if key not in ("config", "json", "recipe", "__path__")}
