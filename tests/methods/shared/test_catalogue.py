"""Methods as their files describe them, and the texts that name methods and teachers."""

import pytest

from detdistill.methods.shared import catalogue
from detdistill.methods.shared.catalogue import Entry, entry, method_slugs, named_teachers, split_methods, split_turns
from detdistill.methods.shared.compose import method_class
from detdistill.methods.shared.hyper_parameters import MethodError


def test_the_grammar():
    text = "pkd@a,weight=1e+1+fkd@b>cwd"
    assert split_methods(text) == [["pkd", "weight=1e+1"], ["fkd"], ["cwd"]]
    assert named_teachers(text) == ["a", "b", ""]
    assert split_turns(text) == ["pkd@a,weight=1e+1+fkd@b", "cwd"]


def test_spaces_do_not_count():
    text = " pkd @ a , weight = 2 + fkd > cwd "
    assert split_methods(text) == [["pkd", "weight = 2"], ["fkd"], ["cwd"]]
    assert named_teachers(text) == ["a", "", ""]
    assert split_turns(text) == ["pkd @ a , weight = 2 + fkd", "cwd"]


@pytest.mark.parametrize(("text", "name"), [("pkd+fkd@", ""), ("fkd@2nd", "2nd"), ("fkd@a b", "a b")])
def test_a_teacher_needs_a_name(text, name):
    with pytest.raises(MethodError) as error:
        named_teachers(text)
    assert str(error.value).endswith(f"{name!r} is no name of a teacher; write e.g. fkd@a")


def test_entries_say_what_the_classes_say():
    for slug in method_slugs():
        kind = method_class(slug)
        assert entry(slug) == Entry(kind.slug, kind.title, kind.bibtex, kind.published)


FILE = """
class Helper:
    title = "helps"


class Method:
    slug = "{slug}"
    title = "On {slug}"
    bibtex = "@article"
    levels = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of methods: a file, a folder with a ``method.py``, a file whose class has another slug, and what is no method."""
    for name in ("alpha", "shared"):
        (tmp_path / name).mkdir()
    (tmp_path / "alpha/method.py").write_text(FILE.format(slug="alpha") + "    published = False\n")
    (tmp_path / "shared/contract.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "beta.py").write_text(FILE.format(slug="beta"))
    (tmp_path / "gamma.py").write_text(FILE.format(slug="gama"))
    monkeypatch.setattr(catalogue, "METHODS", tmp_path)
    monkeypatch.setattr(catalogue, "method_slugs", method_slugs.__wrapped__)  # without what was read before


def test_methods_are_files_and_folders(folder):
    read = entry.__wrapped__
    assert catalogue.method_slugs() == ("alpha", "beta", "gamma")
    assert read("alpha") == Entry("alpha", "On alpha", "@article", published=False)
    assert read("beta") == Entry("beta", "On beta", "@article", published=True)
    with pytest.raises(MethodError, match=r"gamma\.py has no class with slug = 'gamma'"):
        read("gamma")
    with pytest.raises(MethodError) as error:
        read("bta")
    assert str(error.value) == "no method 'bta' (did you mean 'beta'?); methods: alpha, beta, gamma"
