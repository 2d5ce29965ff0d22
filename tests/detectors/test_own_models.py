"""Models of ours outside of this package, and their divisors over several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detdistill.detectors._dense import OwnDenseDetector
from detdistill.detectors.build import load_detector
from detdistill.detectors.saved import save_student
from tests.detectors import own_dense
from tests.detectors.dense import unequal_batch

KINDS = ("atss", "gfl")

ALONE = """
import importlib.util, sys
from pathlib import Path
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detdistill":
            raise ImportError("detdistill must not be needed")
sys.meta_path.insert(0, Refuse())
import torch
images, sizes = torch.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    spec = importlib.util.spec_from_file_location(f"load_{folder.name}", folder / "load_student.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = script.load(folder)
    with torch.no_grad():
        found = model([image[:, :h, :w] for image, (h, w) in zip(images, sizes.tolist())])
    torch.save(([dict(one) for one in found], list(model.classes)), folder.parent / f"{folder.name}.pt")
"""


def test_saved_folders_load_alone(tmp_path):
    """The folders give the same detections in a process that cannot import this package, and in this one."""
    batch = unequal_batch()
    detectors = {kind: own_dense.spread_out(kind) for kind in KINDS}
    folders = {kind: save_student(detector, tmp_path / kind) for kind, detector in detectors.items()}
    torch.save((batch.images, batch.sizes), tmp_path / "images.pt")
    arguments = [sys.executable, "-c", ALONE, str(tmp_path / "images.pt"), *map(str, folders.values())]
    subprocess.run(arguments, check=True, cwd=tmp_path, timeout=300)
    for kind, detector in detectors.items():
        assert {f"{kind}.py", "dense.py", "__init__.py"} <= {path.name for path in (folders[kind] / "models").iterdir()}
        with torch.no_grad():
            expected = detector.detect(detector(batch).prediction, batch)
        found, labels = torch.load(tmp_path / f"{kind}.pt")
        assert labels == [None, *own_dense.CLASSES]
        for mine, theirs in zip(expected, found, strict=True):
            assert len(mine) > 5
            torch.testing.assert_close(theirs["boxes"], mine.boxes_xyxy, rtol=0, atol=1e-3)
            torch.testing.assert_close(theirs["scores"], mine.scores, rtol=0, atol=1e-5)
            assert torch.equal(theirs["labels"] - 1, mine.labels)

        loaded = load_detector(folders[kind]).eval()
        assert loaded.spec == detector.spec
        assert type(loaded) is type(detector)
        with torch.no_grad():
            again = loaded.detect(loaded(batch).prediction, batch)
        for mine, theirs in zip(expected, again, strict=True):
            assert torch.equal(mine.boxes_xyxy, theirs.boxes_xyxy)
            assert torch.equal(mine.labels, theirs.labels)
        save_student(loaded, tmp_path / "again")
        assert (tmp_path / "again" / "model.json").read_bytes() == (folders[kind] / "model.json").read_bytes()


def _confident(kind: str) -> OwnDenseDetector:
    """Sums of scores above 1, below which the divisor is 1 whatever the batch."""
    detector = own_dense.spread_out(kind)
    detector.model.head.classification_head.cls_logits.bias.data += 5.0
    return detector


def _loss_of_one_image(rank: int, kind: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    detector = _confident(kind)
    mine = own_dense.part(own_dense.equal_batch(), rank)
    with torch.no_grad():
        terms = detector.loss(detector(mine).prediction, mine).terms
    torch.save(dict(terms), Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_average_to_the_loss_of_one(kind, tmp_path):
    detector, batch = _confident(kind), own_dense.equal_batch()
    with torch.no_grad():
        alone = detector.loss(detector(batch).prediction, batch).terms
    arguments = (kind, str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(_loss_of_one_image, arguments, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, term in alone.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, term, rtol=1e-4, atol=1e-5)
        assert float(term) > 0
