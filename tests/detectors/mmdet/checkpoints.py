"""Files as mmdet writes them, made from what the golden files say of its models."""

import functools
import json
import runpy
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
PARITY = runpy.run_path(str(ROOT / "benchmarks" / "mmdet_parity.py"), run_name="imported")


@functools.cache
def made(names, caffe):
    """The tensors of a list of names; a whole ResNet takes a second."""
    return PARITY["weights"](json.loads(names), caffe)


def weights(golden):
    """The tensors that mmdet had, by its names."""
    return dict(made(json.dumps(golden.meta["names"]), "caffe" in golden.meta["network"]))


def checkpoint(golden, path, **changes):
    """Write the file that mmdet wrote, with other entries in its ``meta``; None leaves an entry out."""
    meta = {"cfg": golden.meta["config"], "dataset_meta": {"classes": golden.meta["classes"]}, "epoch": 12} | changes
    state = weights(golden)
    torch.save({"meta": {key: value for key, value in meta.items() if value is not None}, "state_dict": state}, path)
    return path
