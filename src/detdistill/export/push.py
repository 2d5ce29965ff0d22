"""Upload a student folder or an exported file to the Hugging Face hub, by the hub's own library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from detdistill.errors import RunError
from detdistill.export.formats import SUFFIXES
from detdistill.export.run import NOTES
from detdistill.files import FOLDER_CHECKSUMS, folder_damage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def push(model: Path, to: str, *, private: bool, message: str) -> str:
    """Upload a model; see ``api.push``."""
    kind, _, name = to.partition(":")
    if kind != "hub" or not NAME.fullmatch(name):
        raise RunError(f"to: {to!r} must be hub:NAME or hub:OWNER/NAME")
    folder, patterns = what_to_upload(model)
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=made.repo_id, folder_path=str(folder), allow_patterns=patterns, commit_message=message)
    except Exception as error:  # errors of the hub's library, of its HTTP library and of the system
        raise RunError(f"to: {to}: {_reason(error)}") from error
    return str(done)


def what_to_upload(model: Path) -> tuple[Path, list[str] | None]:
    """The folder to upload and the names in it; None: all of them.

    Raises:
        RunError: there is no model at this path, or it is damaged.
    """
    if model.is_file():
        if model.suffix not in SUFFIXES:
            raise RunError(f"model: {model} is no exported file; give a run folder, a student folder, or {', '.join(SUFFIXES)}")
        names = [model.name, NOTES, "README.md"]
        return model.parent, [*names, model.with_suffix(".bin").name] if model.suffix == ".xml" else names
    for folder in (model, model / "student"):
        if (folder / "student.json").is_file():
            if wrong := folder_damage(folder):
                raise RunError(f"model: {folder}: {wrong}; save the student again, or delete {FOLDER_CHECKSUMS}")
            return folder, None
    raise RunError(
        f"model: no student in {model} (student.json is missing); give a finished run, its student/, or an exported file"
    )


def _reason(error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    kind = type(error).__name__
    if kind == "LocalTokenNotFoundError" or status == 401:
        return "no valid token; run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there; create one with write access, or upload to a name of your own"
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it to upload"
    if status is None and ("Connect" in kind or "Timeout" in kind or isinstance(error, OSError)):
        return f"the hub cannot be reached ({kind}); check the network and try again"
    text = str(error).strip()
    return f"the hub refused ({text.splitlines()[0] if text else kind})"
