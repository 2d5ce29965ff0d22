from pathlib import Path

import pytest

import detdistill
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method, method_class, method_slugs, parse_methods
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import PairError
from tests.tiny import TinyDense, TinyRegions


def values(text):
    ((_, found),) = parse_methods(text)
    return found


def test_methods_are_the_files_of_the_folder_and_name_themselves():
    slugs = method_slugs()
    assert {"cwd", "fgd", "fitnet", "fkd", "mgd", "pkd"} <= set(slugs)
    for slug in slugs:
        assert method_class(slug).slug == slug
        assert method_class(slug).title
        assert "@" in method_class(slug).bibtex


def test_each_kind_of_value():
    assert values("pkd") == {}
    assert values("pkd,weight=10") == {"weight": 10.0}
    assert values("pkd,weight=1e-3") == {"weight": 0.001}
    assert values("pkd, weight=1e+1 , resize_student=false") == {"weight": 10.0, "resize_student": False}
    assert values("pkd,levels=0/1/2") == {"levels": (0, 1, 2)}
    assert values("pkd,levels=0") == {"levels": (0,)}
    assert values("pkd,levels=none") == {"levels": None}
    assert values("cwd,on=logits") == {"on": "logits"}
    assert values("fitnet,half=true,warm_iters=500") == {"half": True, "warm_iters": 500}
    assert values("fkd,channel_mask=none,feature_weight=none") == {"channel_mask": None, "feature_weight": None}
    assert values("fkd,channel_mask=true,feature_weight=0.5") == {"channel_mask": True, "feature_weight": 0.5}


def test_several_methods_each_with_their_own_values():
    parsed = parse_methods("fgd,temperature=8e-1+pkd,weight=1e+2,levels=1")
    assert [(found.slug, given) for found, given in parsed] == [
        ("fgd", {"temperature": 0.8}),
        ("pkd", {"weight": 100.0, "levels": (1,)}),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pdk", "no method 'pdk' (did you mean 'pkd'?); methods: "),
        ("", "no method ''; methods: "),
        ("pkd+", "no method ''; methods: "),
        ("pkd,weigth=3", "pkd has no hyper-parameter 'weigth' (did you mean 'weight'?); it has: weight, levels, resize_student"),
        ("pkd,teacher=3", "pkd has no hyper-parameter 'teacher'"),
        ("pkd,weight", "pkd: write weight=VALUE"),
        ("pkd,weight=", "pkd: write weight=VALUE"),
        ("pkd,weight=1,weight=2", "pkd: weight is given twice"),
        ("pkd,weight=heavy", "pkd: weight=heavy is not a number"),
        ("pkd,weight=nan", "pkd: weight=nan must be a finite number, 0 or more"),
        ("pkd,weight=inf", "pkd: weight=inf must be a finite number, 0 or more"),
        ("pkd,weight=-1", "pkd: weight=-1 must be a finite number, 0 or more"),
        ("pkd,levels=0/x", "pkd: levels=x is not a whole number"),
        ("pkd,levels=0/1.5", "pkd: levels=1.5 is not a whole number"),
        ("pkd,levels=-1", "pkd: levels=-1 must be a finite number, 0 or more"),
        ("pkd,resize_student=1", "pkd: resize_student=1 is not true or false"),
        ("fitnet,warm_iters=2.5", "fitnet: warm_iters=2.5 is not a whole number"),
        ("cwd,on=logit", "cwd: on=logit is not one of features, logits (did you mean 'logits'?)"),
        ("fitnet,reduction=sum", "fitnet: reduction=sum is not one of mean, batch, dist"),
        ("fkd,channel_mask=maybe", "fkd: channel_mask=maybe is not true or false or none"),
    ],
)
def test_mistakes_are_named_in_one_line(text, expected):
    with pytest.raises(MethodError) as error:
        parse_methods(text)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_one_method_is_itself_and_several_are_a_composition():
    teacher, student = Teacher(TinyDense()), TinyDense()
    alone = build_method("pkd,weight=3,levels=1", teacher, student)
    assert alone.slug == "pkd"
    assert alone.weight == 3.0
    assert [pair.student for pair in alone.pairs] == [1]
    together = build_method("pkd+fitnet,half=true", teacher, student)
    assert isinstance(together, Composition)
    assert [method.slug for method in together.methods] == ["pkd", "fitnet"]


def test_a_pair_that_cannot_work_is_refused():
    with pytest.raises(PairError, match="cwd: the teacher tinyregions:patches predicts regions"):
        build_method("cwd,on=logits", Teacher(TinyRegions()), TinyDense())
    with pytest.raises(PairError, match="pkd: needs a teacher"):
        build_method("pkd", None, TinyDense())
    with pytest.raises(PairError, match="each method may be named once"):
        build_method("pkd+pkd,weight=1", Teacher(TinyDense()), TinyDense())


def test_all_recipes_name_methods_that_parse():
    import yaml

    recipes = sorted((Path(detdistill.__file__).parent / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        method = yaml.safe_load(path.read_text())["method"]
        assert parse_methods(method)[0][0].slug == path.stem.split("-")[0]
