import dataclasses
import json

import pytest
import torch

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.cache.encoding import encode
from detdistill.cache.identity import in_words, knowledge_of, views_lacking, views_of
from detdistill.cache.knowledge import About, KnowledgeCache
from detdistill.cache.shards import ShardWriter
from detdistill.cache.storage import CacheError
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method, method_class, method_slugs, serving_methods
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import WHOLE_TOWER, Dense, Look, Observation, TaughtTogether
from tests.methods.contract_checks import MIDDLE, assert_same
from tests.methods.offline_checks import one_by_one
from tests.tiny import TinyDense, tiny_batch

VIEWS = views_of(ViewSettings(size=64))


def about(teacher, method="pkd", **changes):
    values = {
        "teacher": "runs/teacher",
        "teacher_fingerprint": teacher.fingerprint,
        "teacher_parameters": 7,
        "spec": teacher.spec,
        "method": method,
        "student": None,
        "knowledge": tuple(knowledge_of(method)),
        "stages": (),
        "data": "coco",
        "data_fingerprint": "d",
        "views": VIEWS,
        "store": "float32",
        "precision": "32",
        "records": 3,
    }
    return About(**{**values, **changes})


def test_methods_that_only_observe_share_one_kind_of_knowledge():
    (pkd,) = knowledge_of("pkd,weight=3")
    assert knowledge_of("fgd+mgd,dropped=0.2+fitnet") == [pkd] * 3
    assert in_words(pkd) == "features"
    assert knowledge_of("cwd,weight=2") == [pkd]
    assert pkd == {"teach": "observation", "backbone": False, "prediction": False}
    (logits,) = knowledge_of("cwd,on=logits")
    assert logits == {"teach": "observation", "backbone": False, "prediction": True}
    assert in_words(logits) == "features and prediction"
    assert knowledge_of("unikd") != knowledge_of("unikd,queries=7")


def test_knowledge_says_which_towers_and_maps_were_looked_at(monkeypatch):
    looks = {"fgd": Look(towers=(2, WHOLE_TOWER)), "mgd": Look(backbone=True, prediction=True, attention=True)}
    for slug, look in looks.items():
        monkeypatch.setattr(method_class(slug), "needs", classmethod(lambda cls, look=look, **settings: Needs(teacher=look)))
    towers, maps = knowledge_of("fgd+mgd")
    assert towers == {"teach": "observation", "backbone": False, "prediction": False, "towers": [2, WHOLE_TOWER]}
    assert maps == {"teach": "observation", "backbone": True, "prediction": True, "attention": True}
    assert in_words(towers) == "features and towers"
    assert in_words(maps) == "features and backbone and prediction and attention"


def test_views_that_no_cache_can_hold_are_all_named():
    with pytest.raises(CacheError, match=r"colour=0\.4 and mosaic=0\.5 make endlessly many views"):
        views_of(ViewSettings(colour=0.4, mosaic=0.5))
    with pytest.raises(CacheError, match=r"^scale_jitter=0\.5,2 makes"):
        views_of(ViewSettings(scale_jitter=(0.5, 2.0)))


def test_a_run_may_draw_less_than_the_cache_has_and_not_more():
    cached = views_of(ViewSettings(size=64, scales=(1.0, 0.5)))
    assert views_lacking(cached, views_of(ViewSettings(size=64, flip=0.0, scales=(0.5,)))) == []
    assert views_lacking(cached, views_of(ViewSettings(size=64))) == [], "no scales is the scale 1"
    assert views_lacking(views_of(ViewSettings(size=64, flip=0.0)), VIEWS) == ["flipped images"]
    wanted = views_of(ViewSettings(size=96, resize="stretch", scales=(2.0,)))
    assert views_lacking(cached, wanted) == [
        "size=96 (the cache has 64)",
        "resize=stretch (the cache has letterbox)",
        "scale 2 (the cache has 0.5,1)",
    ]


@pytest.fixture
def filled(tmp_path):
    """A cache of three images of unequal size, for all methods that observe the features."""
    teacher = Teacher(TinyDense(channels=(16, 16), seed=1))
    batch = tiny_batch(3)
    batch = dataclasses.replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    cache = KnowledgeCache.create(str(tmp_path / "c"), about(teacher))
    writer = ShardWriter(cache.folder, cache.about.fingerprint)
    for _, alone in one_by_one(batch):
        piece = teacher.observe(alone).split(1)
        writer.add(f"{alone.ids[0]}/{alone.views[0].key}", encode(tuple(piece), "float32"))
    writer.flush()
    return teacher, batch, KnowledgeCache.open(str(tmp_path / "c"))


@pytest.mark.parametrize("text", ["pkd", "fgd+mgd", "cwd", "cwd,temperature=2+fitnet,hint_share=1"])
def test_a_source_serves_every_method_whose_knowledge_is_there(filled, text):
    teacher, batch, cache = filled
    cache.check(text, "d", VIEWS, None)
    torch.manual_seed(3)
    student = TinyDense(seed=2)
    method = build_method(text, cache.teacher(), student)
    source = cache.source(text, method)
    taught = source(method, batch)
    assert type(taught) is (TaughtTogether if "+" in text else Observation)
    online = build_method(text, teacher, student)
    online.load_state_dict(method.state_dict())
    for offline_stage, online_stage in zip(method.stages(student), online.stages(student), strict=True):
        torch.manual_seed(4)
        actual = offline_stage.step(batch, source(offline_stage.learns_from, batch), MIDDLE)
        torch.manual_seed(4)
        expected = online_stage.step(batch, teach_by_canvas(online_stage.learns_from, batch), MIDDLE)
        assert_same(actual.terms, expected.terms, "", rtol=1e-6, atol=1e-6)


def test_a_member_of_a_composition_is_given_its_own_part(tmp_path):
    """Records of two kinds of knowledge, in the order of the cache; the run names its methods in another."""
    teacher, batch = Teacher(TinyDense(seed=1)), tiny_batch(2)
    cache = KnowledgeCache.create(str(tmp_path / "c"), about(teacher, "cwd,on=logits+pkd"))
    writer = ShardWriter(cache.folder, cache.about.fingerprint)
    for image, said in enumerate(teacher.observe(batch, Look(prediction=True)).split(2)):
        writer.add(f"{batch.ids[image]}/{batch.views[image].key}", encode((said, said.only(Look())), "float32"))
    writer.flush()
    text = "pkd+cwd,on=logits"
    root = build_method(text, teacher, TinyDense(seed=2))
    source = KnowledgeCache.open(str(tmp_path / "c")).source(text, root)
    pkd, cwd = (source(member, batch) for member in root.methods)
    assert pkd.prediction is None
    pieces = teacher.observe(batch, Look(prediction=True)).split(2)
    assert_same(cwd.prediction, Dense.stack([piece.prediction for piece in pieces]), "")
    together = source(root, batch)
    assert [part.prediction is None for part in together.parts] == [True, False]


def test_every_method_can_be_built_from_a_description_of_the_teacher_or_says_why(filled):
    _, _, cache = filled
    student = TinyDense(seed=2)
    serving = serving_methods(cache.teacher(), student)
    refused = {}
    for slug in method_slugs():
        try:
            build_method(slug, cache.teacher(), student)
        except PairError as error:
            refused[slug] = str(error)
    assert set(serving) == set(method_slugs()) - set(refused)
    assert all(message.startswith(f"{slug}: ") for slug, message in refused.items())
    assert {"pkd", "fitnet", "cwd", "fkd", "fgd", "mgd", "unikd", "dicod"} <= set(serving)


def test_the_stand_in_has_no_weights_and_says_so(filled):
    teacher, batch, cache = filled
    absent = cache.teacher()
    assert absent.spec == teacher.spec
    assert absent.fingerprint == teacher.fingerprint
    assert isinstance(absent, AbsentTeacher)
    assert not list(absent.detector.parameters())
    for ask in (lambda: absent.observe(batch), lambda: absent.detector(batch), lambda: absent.detector.detect(None, batch)):
        with pytest.raises(CacheError, match=r"only its description is in the cache.*--teacher"):
            ask()


def test_what_does_not_fit_is_said_in_one_line(filled):
    teacher, _, cache = filled
    cache.check("fgd+pkd", "d", VIEWS, teacher)
    other = Teacher(TinyDense(channels=(16, 16), seed=9))
    with pytest.raises(CacheError) as caught:
        cache.check("cwd,on=logits", "e", views_of(ViewSettings(size=96)), other)
    assert str(caught.value) == (
        f"cache {cache.folder.url} does not fit: it was made by another teacher (weights of runs/teacher at that time); "
        "cwd,on=logits learns from features and prediction, it holds features; "
        "it was made of other training images or boxes (coco at that time); the run would draw size=96 (the cache has 64)"
    )


def test_an_unfinished_cache_says_how_much_is_missing(filled):
    _, _, cache = filled
    have = list(cache.index.places)
    cache.check_complete(have)
    with pytest.raises(CacheError, match=r"unfinished: 2 of 5 records are missing \(the first: image 8/64x64\).*goes on"):
        cache.check_complete([*have, "8/64x64", "9/64x64"])
    with pytest.raises(CacheError, match="no record of image 8/64x64"):
        cache.read("8/64x64")


def test_a_folder_is_made_once_and_refused_for_anything_else(tmp_path):
    teacher = Teacher(TinyDense(seed=1))
    KnowledgeCache.create(str(tmp_path / "c"), about(teacher))
    again = KnowledgeCache.create(str(tmp_path / "c"), about(teacher, teacher_parameters=8))
    assert again.about.teacher_parameters == 7, "the description that is there counts"
    for changes, words in (
        ({"teacher_fingerprint": "x"}, r"teacher \(other weights"),
        ({"store": "int8"}, r"store \(float32\)"),
        ({"data_fingerprint": "x"}, "training data"),
        ({"views": views_of(ViewSettings(size=96))}, r"views \(it has letterbox 64, unflipped and flipped"),
        ({"knowledge": tuple(knowledge_of("cwd,on=logits"))}, r"methods \(it holds features\)"),
    ):
        with pytest.raises(CacheError, match=f"is a cache of other {words}"):
            KnowledgeCache.create(str(tmp_path / "c"), about(teacher, **changes))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds other files and no cache"):
        KnowledgeCache.create(str(tmp_path / "full"), about(teacher))


def test_what_is_no_cache_is_said(tmp_path):
    for url in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CacheError, match=r"is no cache \(it has no cache.json\)"):
            KnowledgeCache.open(str(url))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="is no cache"):
        KnowledgeCache.open(str(tmp_path / "file"))
    KnowledgeCache.create(str(tmp_path / "c"), about(Teacher(TinyDense(seed=1))))
    path = tmp_path / "c" / "cache.json"
    good = path.read_text()
    path.write_text(good.replace("runs/teacher", "runs/teachex"))
    with pytest.raises(CacheError, match=r"cache.json is damaged"):
        KnowledgeCache.open(str(tmp_path / "c"))
    path.write_text(good[:50])
    with pytest.raises(CacheError, match=r"cache.json is damaged"):
        KnowledgeCache.open(str(tmp_path / "c"))
    assert json.loads(good)["content"]["format"] == 1


def test_the_fingerprint_of_a_teacher_is_of_its_weights_and_classes():
    one = Teacher(TinyDense(seed=1)).fingerprint
    assert Teacher(TinyDense(seed=1)).fingerprint == one
    assert Teacher(TinyDense(seed=2)).fingerprint != one
    assert Teacher(TinyDense(classes=("a", "c"), seed=1)).fingerprint != one
    bent = TinyDense(seed=1)
    next(bent.parameters()).data.view(-1)[0] += 1e-6
    assert Teacher(bent).fingerprint != one
