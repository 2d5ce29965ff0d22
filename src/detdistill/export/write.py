"""Write a graph into a file: ONNX, OpenVINO, TorchScript, or torch.export's archive (pt2).

ONNX files are traced by torch's TorchScript-based exporter (``dynamo=False``). With torch 2.15 it takes about a second of CPU
time where the newer one takes half a minute, its files run with any number and size of images, and it knows every operator of the
detectors here. What tracing can get wrong, constants in place of sizes, the proof finds at a second batch and size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.save import installed_versions
from detdistill.errors import ModelError
from detdistill.export.about import KEY, About
from detdistill.export.graphs import INPUTS, Graph
from detdistill.export.runtimes import require
from detdistill.files import write_atomically
from detdistill.functional.modes import evaluating, frozen

DEFAULT_OPSET, DEFORMABLE_OPSET, LARGEST_OPSET = 17, 19, 20
"""ONNX operator sets: the default, the first with deformable convolutions, and the last that the exporter knows."""

FREE_AXES = {"images": {"batch": {0: "batch"}, "size": {2: "height", 3: "width"}}, "sizes": {"batch": {0: "batch"}}}


def least_opset(graph: Graph) -> int:
    """The smallest opset that holds the operators of a graph."""
    kinds = {type(module).__name__ for module in graph.modules()}
    return DEFORMABLE_OPSET if "DeformableConv" in kinds else DEFAULT_OPSET


def check_opset(graph: Graph, opset: int | None) -> int:
    """The opset to use.

    Raises:
        ModelError: ``opset`` is too old for the detector, or newer than the exporter knows.
    """
    least = least_opset(graph)
    if opset is None:
        return least
    if not least <= opset <= LARGEST_OPSET:
        name = graph.detector.spec.name
        raise ModelError(f"opset={opset}: {name} needs an opset from {least} to {LARGEST_OPSET}; leave out --opset for {least}")
    return opset


def write(graph: Graph, about: About, example: tuple[Tensor, Tensor], path: Path) -> About:
    """Write a graph into a file; the file appears complete or not at all.

    Args:
        graph: of the detector.
        about: description for the file; ``versions`` is filled in here.
        example: images and sizes to trace with.
        path: the file; with OpenVINO, the weights lie beside it as ``.bin``.

    Returns:
        The description as written.

    Raises:
        ModelError: the detector cannot be written in this format.
        RunError: a package is missing.
    """
    about = replace(about, versions=installed_versions())
    writers = {"onnx": _onnx, "openvino": _openvino, "torchscript": _torchscript, "pt2": _pt2}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), evaluating(graph), frozen(graph), torch.no_grad():
        try:
            writers[about.format](graph, about, example, path)
        except ModelError:
            raise
        except (RuntimeError, TypeError, NotImplementedError, AssertionError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            other = "--format onnx" if about.format != "onnx" else "--format torchscript"
            name = about.spec.name
            raise ModelError(f"{name}: cannot be written as {about.format} ({reason[:200]}); try {other}") from error
    return about


def _onnx(graph: Graph, about: About, example: tuple[Tensor, Tensor], path: Path) -> None:
    onnx = require("onnx")
    axes: dict[str, dict[int, str]] = {
        name: {place: word for key in about.free for place, word in kinds.get(key, {}).items()}
        for name, kinds in FREE_AXES.items()
    }
    for name in graph.outputs:
        final = "labels" in graph.outputs
        axes[name] = {0: "detections"} if final else {0: "predictions"} if name == "levels" else {0: "batch", 1: "predictions"}

    def save(temporary: Path) -> None:
        with _more_operators():
            torch.onnx.export(
                graph,
                example,
                str(temporary),
                dynamo=False,
                opset_version=about.opset,
                input_names=list(INPUTS),
                output_names=list(graph.outputs),
                dynamic_axes={name: axis for name, axis in axes.items() if axis},
            )
        model = onnx.load(str(temporary))
        entry = model.metadata_props.add()
        entry.key, entry.value = KEY, about.to_text()
        onnx.save(model, str(temporary))

    write_atomically(path, save)


@contextlib.contextmanager
def _more_operators() -> Iterator[None]:
    """Teach the exporter ``exp2`` (AdaMixer) and deformable convolutions (RepPoints)."""

    def power(graph: Any, exponent: Any) -> Any:
        return graph.op("Pow", graph.op("Constant", value_t=torch.tensor(2.0)), exponent)

    def deformable(graph: Any, images: Any, weight: Any, offset: Any, mask: Any, bias: Any, *rest: Any) -> Any:
        down, right, pad_y, pad_x, dilation_y, dilation_x, groups, offset_groups, with_mask = (
            one.node().t("value") for one in rest
        )
        if with_mask:
            raise ModelError("deformable convolutions with a mask are not written")
        return graph.op(
            "DeformConv",
            *(images, weight, offset, bias),
            strides_i=[int(down), int(right)],
            pads_i=[int(pad_y), int(pad_x), int(pad_y), int(pad_x)],
            dilations_i=[int(dilation_y), int(dilation_x)],
            group_i=int(groups),
            offset_group_i=int(offset_groups),
        )

    known: dict[str, tuple[Any, int]] = {"aten::exp2": (power, 9), "torchvision::deform_conv2d": (deformable, DEFORMABLE_OPSET)}
    for name, (symbolic, opset) in known.items():
        torch.onnx.register_custom_op_symbolic(name, symbolic, opset)
    try:
        yield
    finally:
        for name, (_, opset) in known.items():
            torch.onnx.unregister_custom_op_symbolic(name, opset)


def _openvino(graph: Graph, about: About, example: tuple[Tensor, Tensor], path: Path) -> None:
    openvino = require("openvino")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".openvino-") as scratch:
        middle = Path(scratch, "model.onnx")
        _onnx(graph, replace(about, opset=least_opset(graph)), example, middle)
        model = openvino.Core().read_model(str(middle))
        save_openvino(openvino, model, about, path)


def save_openvino(openvino: Any, model: Any, about: About, path: Path) -> None:
    """Write an OpenVINO model with its description: the ``.bin`` first, so that the ``.xml`` never stands alone."""
    model.set_rt_info(about.to_text(), [KEY])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".openvino-") as scratch:
        openvino.save_model(model, str(Path(scratch, path.name)), compress_to_fp16=False)
        os.replace(Path(scratch, path.name).with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(Path(scratch, path.name), path)


def _torchscript(graph: Graph, about: About, example: tuple[Tensor, Tensor], path: Path) -> None:
    traced = torch.jit.trace(graph, example, check_trace=False)
    write_atomically(path, lambda temporary: torch.jit.save(traced, str(temporary), _extra_files={KEY: about.to_text()}))


def _pt2(graph: Graph, about: About, example: tuple[Tensor, Tensor], path: Path) -> None:
    dim = torch.export.Dim
    images: dict[int, Any] = {}
    if "batch" in about.free:
        images[0] = dim.DYNAMIC
    if "size" in about.free:
        largest = 8192 // about.multiple
        sides = [about.multiple * dim(name, min=2, max=largest) for name in ("height", "width")]
        images |= {2: sides[0], 3: sides[1]}
    shapes = {"images": images, "sizes": {0: dim.DYNAMIC} if "batch" in about.free else {}}
    program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)

    def save(temporary: Path) -> None:
        archive = temporary.with_name(f"{temporary.name}.pt2")  # torch warns of other suffixes
        try:
            torch.export.save(program, archive, extra_files={KEY: about.to_text()})
            os.replace(archive, temporary)
        finally:
            archive.unlink(missing_ok=True)

    write_atomically(path, save)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' warnings, and the dumps of whole graphs that torch's C++ part writes to the process's stdout."""
    logger = logging.getLogger("torch.onnx")
    before, kept, nothing = logger.level, os.dup(1), os.open(os.devnull, os.O_WRONLY)
    logger.setLevel(logging.CRITICAL)
    sys.stdout.flush()
    os.dup2(nothing, 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
        logger.setLevel(before)
