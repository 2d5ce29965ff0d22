"""The repository itself: pins, docs, light imports."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from detdistill import cli
from detdistill.cli import commands as table
from detdistill.methods.shared.catalogue import entry
from detdistill.methods.shared.compose import method_slugs

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT).as_posix() for path in DOCS)]
METHOD_PAGES = [path for path in DOCS if path.parent.name == "methods" and path.name != "README.md"]


def pinned():
    """Name and version of every constraint in pyproject.toml."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    return [tuple(entry.partition(" ;")[0].split("==")) for entry in entries]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_the_pins_with_hashes_and_without_addresses(name):
    text = (ROOT / name).read_text()
    required = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^ ;]+)", text, flags=re.MULTILINE)
    assert ("torch", dict(pinned())["torch"]) in required
    assert set(required) <= set(pinned())
    assert not re.search(r"https?:|index-url|find-links", text)
    blocks = re.split(r"^(?=[\w.-]+(?:\[[\w,]+\])?==)", text, flags=re.MULTILINE)
    assert len(blocks) == len(required) + 1
    assert all("--hash=sha256:" in block for block in blocks[1:])


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [entry for group in project["project"]["optional-dependencies"].values() for entry in group]
    direct = [*project["project"]["dependencies"], *extras, *project["dependency-groups"]["dev"]]
    names = {re.match(r"[\w.-]+", entry)[0].lower() for entry in direct}
    assert names <= {name for name, _ in pinned()}


def test_the_pages_count_the_methods():
    """37 published methods, and those that are this library's own (``published = False`` in the class)."""
    published = [slug for slug in method_slugs() if entry(slug).published]
    own = [slug for slug in method_slugs() if slug not in published]
    assert len(published) == 37
    assert own == ["matched", "vfm"]
    assert f"- **Methods**, {len(published)} published ones and {len(own)} of our own" in (ROOT / "README.md").read_text()
    assert f"{len(published)} published methods in all" in (ROOT / "CHANGELOG.md").read_text()
    counted = f"Each of the {len(published)} published methods, and each of the {len(own)} of our own, has a page"
    assert counted in " ".join((ROOT / "docs/methods/README.md").read_text().split())
    for slug in own:
        assert "of this library" in entry(slug).title
        assert f"`{slug}`" in (ROOT / "README.md").read_text()


def test_every_finding_is_listed():
    listed = re.findall(r"^\| `(\w+\.sh)` \|", (ROOT / "findings/README.md").read_text(), flags=re.MULTILINE)
    assert listed == sorted(path.name for path in (ROOT / "findings").glob("*.sh"))


def test_the_list_of_losses_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "tools/losses.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run tools/losses.py: {done.stdout}{done.stderr}"


def test_functions_have_at_most_70_lines():
    """Docstring and signature included."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 70, f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines"


def test_every_method_has_a_loss_that_can_be_imported():
    from detdistill import losses

    for slug in method_slugs():
        mine = [name for name in losses.__all__ if name.startswith(f"{slug}_")]
        assert mine, f"{slug} has no public function"
        for name in mine:
            function = getattr(losses, name)
            assert function.__name__ == name
            assert function.__module__.removeprefix("detdistill.methods.").partition(".")[0] == slug
            assert function.__doc__, name


def sections(page):
    """Headings of a page and the text below each, without its tables."""
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))


def test_every_method_has_a_page_with_the_same_sections():
    assert [page.stem for page in METHOD_PAGES] == list(method_slugs())
    first, *others = METHOD_PAGES
    tables = [re.findall(r"<!-- table: (\w+) -->", page.read_text()) for page in METHOD_PAGES]
    assert all(found == ["about", "requirements", "losses", "hyperparameters", "recipes"] for found in tables)
    assert all(list(sections(page)) == list(sections(first)) for page in others)
    for page in METHOD_PAGES:
        assert [name for name, text in sections(page).items() if not text.strip()] == []


@pytest.mark.parametrize("script", sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")]), ids=lambda path: path.stem)
def test_every_script_finds_the_names_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    assert runpy.run_path(str(script), run_name="imported")["__doc__"]


def test_the_command_line_imports_nothing_heavy():
    code = """
import sys, detdistill, detdistill.cli, detdistill.api, detdistill.compare
print(*{name.partition(".")[0] for name in sys.modules})
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "torchvision", "timm", "lightning", "sklearn", "skimage", "matplotlib", "scipy", "numpy"}
    assert "detdistill" in loaded
    assert not heavy & set(loaded)


def anchors(page):
    """Names of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_docs_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
    places = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text())
    assert [f"{link}#{place}" for link, place in places if place not in anchors(path.parent / link if link else path)] == []


def commands(page):
    """Whole commands of a page; capitals and dots stand for something that the reader fills in."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"^ *(?:.*uv run |\.venv/bin/)?(detdistill [a-z].*)$", text, flags=re.MULTILINE)
    found += re.findall(r"`(?:uv run )?(detdistill [^`]+)`", text)
    whole = [command.partition("  #")[0].strip() for command in found]
    return [command for command in whole if not re.search(r"\b[A-Z]+\b|\.\.\.|--config|--help|`", command)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_docs_are_understood(page, monkeypatch, capsys):
    verbs = {name: (describe, lambda chosen: None, text) for name, (describe, _, text) in cli.VERBS.items()}
    monkeypatch.setattr(table, "VERBS", verbs)
    monkeypatch.setattr(table, "check_paths", lambda chosen: None)  # what the pages name is not there
    for command in commands(page):
        arguments = shlex.split(command)[1:]
        if arguments not in (["distill"], ["train"], ["cache"], ["teach"], ["doctor"]):  # a bare name in running text
            cli.main(arguments)
    assert capsys.readouterr().err == ""
    assert page != "README.md" or len(commands(page)) >= 6
