"""Build the website of the documentation: the pages of docs/, and a page for each public module from its docstrings.

    uv run --group site python tools/site.py              write build/site/; a broken link or reference fails
    uv run --group site python tools/site.py --pages      only write the pages, to build/pages/

The pages of docs/ are read on their own too, so their links lead to files of the repository. Here they are copied, and each link
leads to the page that was made of the file, or, if there is none, becomes plain text.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/detdistill"
BUILD = ROOT / "build"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]*)(#[^)]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    "Start": ("index.md", "docs/installing.md", "docs/data.md", "docs/training.md", "docs/runs.md"),
    "Use": (
        "docs/doctor.md",
        "docs/cache.md",
        "docs/serving.md",
        "docs/stores.md",
        "docs/scale.md",
        "docs/clusters.md",
        "docs/several-teachers.md",
        "docs/comparing.md",
        "docs/predicting.md",
        "docs/labelling.md",
        "docs/export.md",
    ),
    "Reference": ("docs/methods/README.md", "docs/detectors.md", "docs/results.md"),
    "Develop": ("docs/writing-a-method.md", "docs/design.md", "CONTRIBUTING.md", "findings/README.md", "CHANGELOG.md"),
}
"""Navigation; files that do not exist are left out, and the methods' and modules' pages follow."""
SETTINGS = """\
[project]
site_name = "detdistill"
site_description = "Knowledge distillation of object detectors"
docs_dir = "pages"
site_dir = "site"
nav = {nav}

[project.theme]
font = false
features = ["navigation.sections", "navigation.top", "content.code.copy", "search.highlight"]
palette = [
  {{ media = "(prefers-color-scheme: light)", scheme = "default", toggle.icon = "lucide/sun", toggle.name = "dark" }},
  {{ media = "(prefers-color-scheme: dark)", scheme = "slate", toggle.icon = "lucide/moon", toggle.name = "light" }},
]

[project.plugins.mkdocstrings.handlers.python]
paths = ["sources"]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
show_source = false
show_root_heading = false
show_signature_annotations = true
separate_signature = true
members_order = "source"
filters = ["!^_"]
heading_level = 2
"""


def main() -> None:
    """Write the pages and build the site."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", action="store_true", help="only write the pages")
    chosen = parser.parse_args()
    pages = BUILD / "pages"
    for old in (pages, BUILD / "site", BUILD / "sources"):
        shutil.rmtree(old, ignore_errors=True)
    places = dict(copied()) | dict(module_pages())
    for source, place in places.items():
        target = pages / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(with_links(source.read_text(encoding="utf-8"), source, places), encoding="utf-8")
        elif source.suffix == ".py":
            target.write_text(module_page(source), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    copy_sources(BUILD / "sources")
    (BUILD / "site.toml").write_text(SETTINGS.format(nav=nav(places)), encoding="utf-8")
    if not chosen.pages:
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(BUILD / "site.toml")]
        raise SystemExit(subprocess.run(command, cwd=BUILD).returncode)


def copied() -> Iterator[tuple[Path, str]]:
    """Pages and pictures that are copied, and their places below the site."""
    yield ROOT / "README.md", "index.md"
    yield from ((ROOT / name, name.lower()) for name in ("CONTRIBUTING.md", "CHANGELOG.md"))
    yield ROOT / "findings/README.md", "findings.md"
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".md", ".png", ".svg"):
            place = path.relative_to(ROOT / "docs").as_posix()
            yield path, place.replace("README.md", "index.md")
    for path in sorted((ROOT / "benchmarks/results").glob("*.md")):
        yield path, f"measured/{path.name}"


def module_pages() -> Iterator[tuple[Path, str]]:
    """Modules with a public name, and the places of their pages; scripts for students' folders stand in docs/ already."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        private = any(part.startswith("_") and part != "__init__.py" for part in inside.parts)
        if not private and "student_files" not in inside.parts and public_names(path):
            yield path, f"modules/{dotted(path)}.md"


def public_names(path: Path) -> list[str]:
    """Classes and functions of a module whose names do not begin with an underscore."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [one.name for one in body if isinstance(one, kinds) and not one.name.startswith("_")]


def dotted(path: Path) -> str:
    """Name of the module in a file."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def module_page(path: Path) -> str:
    """The page of a module: its docstring, then its public classes and functions."""
    return f"# {dotted(path)}\n\n::: {dotted(path)}\n"


def copy_sources(folder: Path) -> None:
    """Copy the package, with the docstrings' ``Example:`` as ``Examples:``, which the site generator shows as code."""
    for path in PACKAGE.rglob("*.py"):
        target = folder / path.relative_to(PACKAGE.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"^( +)Example:$", r"\1Examples:", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def with_links(text: str, source: Path, places: dict[Path, str]) -> str:
    """The text of a page with its links leading to other pages of the site; code is left as it is."""

    def turned(found: re.Match[str]) -> str:
        picture, label, link, anchor = found[1], found[2], found[3], found[4] or ""
        if not link:
            return found[0]
        target = (source.parent / link).resolve()
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: the link {link} leads nowhere")
        if target not in places:
            return label if not picture else ""
        here = Path(places[source]).parent
        return f"{picture}[{label}]({Path(os.path.relpath(places[target], here)).as_posix()}{anchor})"

    parts, last = [], 0
    for block in FENCE.finditer(text):
        parts += [LINK.sub(turned, text[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, LINK.sub(turned, text[last:])])


def nav(places: dict[Path, str]) -> str:
    """The navigation, as TOML."""
    by_source = {source.relative_to(ROOT).as_posix(): place for source, place in places.items()} | {"index.md": "index.md"}
    sections = {name: [by_source[page] for page in pages if page in by_source] for name, pages in SECTIONS.items()}
    sections["Methods"] = [place for place in places.values() if place.startswith("methods/") and not place.endswith("index.md")]
    sections["Modules"] = [place for place in places.values() if place.startswith("modules/")]
    lines = [f'  {{ "{name}" = [{", ".join(_quoted(pages))}] }},' for name, pages in sections.items()]
    return "\n".join(["[", *lines, "]"])


def _quoted(names: list[str]) -> Iterator[str]:
    return (f'"{name}"' for name in names)


if __name__ == "__main__":
    main()
