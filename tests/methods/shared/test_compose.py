from pathlib import Path

import pytest

import detdistill
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method, check_teacher_size, method_class, method_slugs, parse_methods
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.hyper_parameters import MethodError, hyper_parameters
from detdistill.methods.shared.needs import PairError
from tests.tiny import TinyDense, TinyRegions


def values(text):
    """Of the hyper-parameters that are not as by default."""
    ((method, found),) = parse_methods(text)
    usual = {name: parameter.default for name, parameter in hyper_parameters(method).items()}
    assert found.keys() == usual.keys()
    return {name: value for name, value in found.items() if value != usual[name]}


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
    assert values("pkd,levels=-2/-1") == {"levels": (-2, -1)}
    assert parse_methods("pkd,levels=none") == parse_methods("pkd")
    assert values("cwd,on=logits") == {"on": "logits"}
    assert values("fitnet,half=true,warm_iters=500") == {"half": True, "warm_iters": 500}
    assert values("fkd,channel_mask=true,feature_weight=0.5") == {"channel_mask": True, "feature_weight": 0.5}
    assert values("pkd,weight=3") == {"weight": 3.0}
    assert isinstance(values("pkd,weight=3")["weight"], float)


def test_several_methods_each_with_their_own_values():
    parsed = parse_methods("fgd,temperature=8e-1+pkd,weight=1e+2,levels=1")
    assert [found.slug for found, _ in parsed] == ["fgd", "pkd"]
    assert parsed[0][1]["temperature"] == 0.8
    assert parsed[1][1] == {"weight": 100.0, "levels": (1,), "resize_student": True}


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
        ("pkd,weight=nan", "pkd: weight=nan is not a number, 0 or more"),
        ("pkd,weight=inf", "pkd: weight=inf is not a number, 0 or more"),
        ("pkd,weight=-1", "pkd: weight=-1 is not a number, 0 or more"),
        ("cwd,temperature=0", "cwd: temperature=0 is not a number above 0"),
        ("detrdistill,gamma=1.5", "detrdistill: gamma=1.5 is not a number from 0 to 1"),
        ("pkd,levels=0/x", "pkd: levels=0/x is not a list, each a whole number, or none"),
        ("pkd,levels=0/1.5", "pkd: levels=0/1.5 is not a list, each a whole number, or none"),
        ("fitnet,warm_iters=-1", "fitnet: warm_iters=-1 is not a whole number, 0 or more"),
        ("pkd,resize_student=1", "pkd: resize_student=1 is not true or false"),
        ("fitnet,warm_iters=2.5", "fitnet: warm_iters=2.5 is not a whole number, 0 or more"),
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
    with pytest.raises(PairError, match="pkd: it needs a teacher; give one with --teacher"):
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


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("lad", "lad: the teacher assigns labels to its own cells"),
        ("pkd+gid", "gid: box_distance=l1 compares boxes as the heads encode them"),
        ("d3etr", "d3etr: it compares the teacher's attention to cells"),
        ("kd_detr", "kd_detr: it runs the teacher on the student's images when it learns"),
        ("ld,match=objects", "ld: it compares distributions over distances in pixels"),
        ("defeat,head=regions,regions=teacher", "defeat: the teacher proposes regions on its own maps"),
    ],
)
def test_methods_that_need_images_of_one_size_say_why(method, reason):
    with pytest.raises(MethodError) as error:
        check_teacher_size(method)
    assert str(error.value) == f"teacher_size: {reason}, so teacher and student must see images of one size"


def test_methods_on_maps_predictions_and_queries_allow_a_teacher_of_another_size():
    for method in ("pkd", "fgd", "bckd+fgfi", "vfm+matched", "kd_detr,general_points=0", "mgd+labelenc", "unikd"):
        check_teacher_size(method)
    with pytest.raises(MethodError, match="teacher_size: labelenc has no teacher"):
        check_teacher_size("labelenc")
