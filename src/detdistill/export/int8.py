"""Static quantisation to int8: weights per output channel, activations by their range on training images."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detdistill.errors import ModelError, RunError
from detdistill.export.about import KEY, About
from detdistill.export.file_detector import FileDetector
from detdistill.export.runtimes import require
from detdistill.export.write import save_openvino
from detdistill.structures import Batch

QUANTISED = ("Conv", "MatMul", "Gemm")
"""Operators that become int8 in ONNX. The rest, such as the decoding of boxes, stays float32."""


def quantise(path: Path, out: Path, batches: Sequence[Batch]) -> About:
    """Write the int8 form of an exported file.

    Args:
        path: float32 file, ONNX or OpenVINO.
        out: the new file.
        batches: training images for the ranges of the activations.

    Returns:
        The description in the new file.

    Raises:
        RunError: there are no images, or a package is missing.
        ModelError: the file cannot be quantised.
    """
    if not batches:
        raise RunError("int8: no training images to calibrate with; give --calibration 1 or more and data with a train split")
    whole = FileDetector(path)
    writers = {"onnx": _onnx, "openvino": _openvino}
    if whole.about.format not in writers:
        raise ModelError(f"{path}: int8 is there for onnx and openvino, not for {whole.about.format}; use --format onnx")
    about = replace(whole.about, int8=True)
    feeds = [feed for batch in batches for feed in _feeds(whole, batch)]
    try:
        writers[about.format](path, out, feeds, about)
    except (ModelError, RunError):
        raise
    except Exception as error:  # the quantisers fail with errors of any kind on operators that they do not know
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: cannot be quantised ({type(error).__name__}: {reason[:200]}); leave out --int8") from error
    return about


Feed = dict[str, np.ndarray[Any, Any]]


def _feeds(whole: FileDetector, batch: Batch) -> list[Feed]:
    images, sizes = whole.prepared(batch)
    if "batch" in whole.about.free:
        return [{"images": images, "sizes": sizes}]
    return [{"images": images[one : one + 1], "sizes": sizes[one : one + 1]} for one in range(len(images))]


def _onnx(path: Path, out: Path, feeds: Sequence[Feed], about: About) -> None:
    onnx = require("onnx")
    quantization = require("onnxruntime.quantization")
    preprocess = require("onnxruntime.quantization.shape_inference")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".int8-") as scratch, _quiet():
        prepared, made = Path(scratch, "prepared.onnx"), Path(scratch, out.name)
        preprocess.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        known = {one.name for one in onnx.load(str(prepared), load_external_data=False).graph.input}

        class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]
            """Hands out one feed after the other."""

            def __init__(self) -> None:
                self.waiting = iter(feeds)

            def get_next(self) -> Feed | None:
                feed = next(self.waiting, None)
                return None if feed is None else {name: value for name, value in feed.items() if name in known}

        quantization.quantize_static(
            str(prepared),
            str(made),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits of the weights: without VNNI, a processor's sums of 8 bits saturate
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=list(QUANTISED),
        )
        model = onnx.load(str(made))
        del model.metadata_props[:]
        entry = model.metadata_props.add()
        entry.key, entry.value = KEY, about.to_text()
        onnx.save(model, str(made))
        os.replace(made, out)


def _openvino(path: Path, out: Path, feeds: Sequence[Feed], about: About) -> None:
    openvino, nncf = require("openvino"), require("nncf")
    model = openvino.Core().read_model(str(path))
    with _quiet():
        made = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds))
    save_openvino(openvino, made, about, out)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the quantisers' notes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
