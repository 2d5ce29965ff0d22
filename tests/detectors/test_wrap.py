import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.detectors.wrap import wrap
from detdistill.errors import ModelError
from detdistill.methods.pkd import PKD
from detdistill.structures import Clock, Detections, Features, Look, Observation
from tests.tiny import TinyDense, tiny_batch


class Net(nn.Module):
    """Strides 8 and 16, and an image-wide answer: is there a big box?"""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, stride=8)
        self.down = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2))
        self.head = nn.Linear(6, 1)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return {"score": self.head(self.down(self.stem(images)).mean(dim=(2, 3)))}


def loss(output, batch):
    wanted = torch.tensor([[float(len(target))] for target in batch.targets])
    return {"count": F.mse_loss(output["score"], wanted)}


def detect(output, batch):
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    return [Detections(boxes, score.sigmoid(), torch.zeros(1, dtype=torch.int64)) for score in output["score"]]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_five_lines_make_a_student_that_follows_a_teacher(net):
    student = wrap(net, taps=["stem", "down"], loss=loss)
    teacher = Teacher(TinyDense(channels=(8, 8), strides=(8, 16)))
    method = PKD(teacher, student)
    optimizer = torch.optim.Adam([*student.parameters(), *method.parameters()], lr=0.02)
    batch, totals = tiny_batch(count=4), []
    for step in range(25):
        losses = method.step(student, batch, method.teach(batch), Clock(step, 25))
        optimizer.zero_grad()
        losses.total().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        optimizer.step()
        totals.append({name: value.item() for name, value in losses.terms.items()})
    assert set(totals[0]) == {"count", "pkd"}
    assert totals[-1]["pkd"] < 0.6 * totals[0]["pkd"]
    assert totals[-1]["count"] < 0.6 * totals[0]["count"]


def test_spec_is_measured_and_checked(net):
    net.train()
    wrapped = wrap(net, taps=["down", "stem"])
    # Finest first, whatever the order of the taps; measuring leaves the mode alone.
    assert (wrapped.spec.channels, wrapped.spec.strides, wrapped.spec.name) == ((4, 6), (8, 16), "Net")
    assert net.training
    assert wrap(net, taps=["stem", "down"], channels=(4, 6), strides=(8, 16)).spec.strides == (8, 16)
    with pytest.raises(
        ModelError, match=r"strides=\[4, 16\], but an image of 256x256 gives maps of 32x32, 16x16, strides \[8, 16\]"
    ):
        wrap(net, taps=["stem", "down"], strides=(4, 16))
    with pytest.raises(ModelError, match=r"channels=\[4\], but the maps have \[4, 6\]"):
        wrap(net, taps=["stem", "down"], channels=(4,))
    with pytest.raises(ModelError, match=r"no submodule 'stm' \(did you mean 'stem'\?\)"):
        wrap(net, taps=["stm"])
    with pytest.raises(ModelError, match=r"tap 'head' gives a tensor of shape \[1, 1\], not maps"):
        wrap(net, taps=["head"])


def test_one_run_gives_maps_and_output(net):
    wrapped = wrap(net, taps=["stem", "down"], loss=loss, detect=detect)
    batch = tiny_batch()
    net.calls = 0
    seen = wrapped(batch)
    losses, detections = wrapped.loss(seen.prediction, batch), wrapped.detect(seen.prediction, batch)
    assert net.calls == 1
    images = wrapped.normalized(batch)
    assert torch.equal(seen.features.maps[0], net.stem(images))
    assert torch.equal(seen.features.maps[1], net.down(net.stem(images)))
    assert torch.equal(losses.terms["count"], loss(net(images), batch)["count"])
    assert torch.equal(detections[1].scores, net(images)["score"][1].sigmoid())
    # Image 1 is 48 pixels high: the lower two of eight rows show padding.
    assert seen.features.padding[0][1].sum(dim=1).tolist() == [0, 0, 0, 0, 0, 0, 8, 8]
    assert not seen.features.padding[0][0].any()


def test_no_run_leaves_anything_behind(net):
    wrapped = wrap(net, taps=["stem", "down"])
    net(torch.rand(1, 3, 32, 32))
    assert wrapped.features(tiny_batch()).maps[0].shape == (2, 4, 8, 8)
    assert sum(len(module._forward_hooks) for module in net.modules()) == 2


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda wrapped: pickle.loads(pickle.dumps(wrapped))])
def test_copies_collect_their_own_maps(net, remake):
    wrapped = wrap(net, taps=["stem", "down"], loss=loss)
    twin = remake(wrapped)
    with torch.no_grad():
        twin.model.stem.weight.zero_()
        twin.model.stem.bias.fill_(2.0)
    batch = tiny_batch()
    assert torch.equal(twin.features(batch).maps[0], torch.full((2, 4, 8, 8), 2.0))
    assert torch.equal(wrapped.features(batch).maps[0], net.stem(wrapped.normalized(batch)))


class Pyramid(nn.Module):
    """Its neck returns a dict; one convolution serves both levels."""

    def __init__(self):
        super().__init__()
        self.neck = Neck()

    def forward(self, images):
        return self.neck(images)


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 5, 1)

    def forward(self, images):
        return {f"p{level}": self.shared(F.avg_pool2d(images, 2**level)) for level in (4, 3)}


def test_taps_may_give_dicts_and_be_called_more_than_once():
    net, batch = Pyramid(), tiny_batch()
    for taps in ("neck", ["neck"], ["neck.shared"]):
        wrapped = wrap(net, taps=taps)
        assert (wrapped.spec.channels, wrapped.spec.strides) == ((5, 5), (8, 16))
        maps = wrapped.features(batch).maps
        assert torch.equal(maps[0], net.neck(wrapped.normalized(batch))["p3"])


def test_a_function_may_run_the_model():
    net, batch = Pyramid(), tiny_batch()
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    wrapped = wrap(net, lambda model, images: model.neck(images * 2), loss=lambda maps, batch: {"p3": maps["p3"].mean()}, **plain)
    seen = wrapped(batch)
    assert torch.equal(seen.features.maps[0], net.neck(batch.images * 2)["p3"])
    assert torch.equal(wrapped.loss(seen.prediction, batch).total(), seen.features.maps[0].mean())


def test_what_a_wrapped_model_cannot_do_is_said(net):
    wrapped = wrap(net, taps=["stem", "down"])
    batch = tiny_batch()
    seen = wrapped(batch)
    with pytest.raises(ModelError, match="Net was wrapped without a loss, so it can only teach"):
        wrapped.loss(seen.prediction, batch)
    with pytest.raises(ModelError, match="without decoding"):
        wrapped.detect(seen.prediction, batch)
    with pytest.raises(ModelError, match="exposes features only and has no assignment; use a method on features"):
        wrapped.assign(seen.prediction, batch)
    with pytest.raises(ModelError, match="cannot predict from the features of another model"):
        wrapped.predict(Features(seen.features.maps, (8, 16)), batch)
    bad = wrap(net, taps=["stem"], loss=lambda output, batch: output["score"], name="mine")
    with pytest.raises(ModelError, match="mine: the loss given to wrap must return a dict"):
        bad.loss(bad(batch).prediction, batch)


def test_knowledge_of_a_wrapped_teacher_is_split_and_stacked(net):
    teacher = Teacher(wrap(net, taps=["stem", "down"]))
    observed = teacher.observe(tiny_batch(), Look(prediction=True))
    pieces = observed.split(2)
    assert type(pieces[0].features) is Features
    assert pieces[0].prediction.own is None
    again = Observation.stack(pieces)
    assert torch.equal(again.features.maps[1], observed.features.maps[1])
    assert torch.equal(again.features.padding[1], observed.features.padding[1])


def test_export_loads_into_the_bare_model(net, tmp_path):
    wrap(net, taps=["stem", "down"]).export(tmp_path)
    twin = Net()
    load_model(twin, tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(twin(images)["score"], net(images)["score"])
    assert "load_model(model, " in (tmp_path / "README.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.txt", "model.safetensors"]
