"""Read an exported file back and run it: ONNX by onnxruntime, OpenVINO, TorchScript, and torch.export's archive (pt2)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from detdistill.errors import ModelError, RunError
from detdistill.export.about import KEY, About
from detdistill.export.formats import SUFFIXES

EXTRAS = {"onnx": "export", "onnxruntime": "export", "onnxscript": "export", "openvino": "openvino", "nncf": "openvino"}

Arrays = list[np.ndarray[Any, Any]]


class Runtime(Protocol):
    """An opened file."""

    def __call__(self, images: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Arrays:
        """Run the file; the results are in the order of ``About.outputs``."""
        ...


def require(package: str) -> ModuleType:
    """Import a package of an extra.

    Raises:
        RunError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        extra = EXTRAS[package.partition(".")[0]]
        raise RunError(f"the package {error.name} is missing: pip install 'detdistill[{extra}]'") from error


def open_file(path: Path, device: str = "cpu", threads: int = 0) -> tuple[About, Runtime]:
    """Open a file in its runtime.

    Args:
        path: file written by ``detdistill export``.
        device: cpu or cuda; cuda needs a runtime built for it.
        threads: threads of the runtime; 0: its default.

    Raises:
        ModelError: the file cannot be read, or ``detdistill export`` did not write it.
        RunError: the runtime is not installed, or does not know the device.
    """
    opened = {"onnx": _onnx, "openvino": _openvino, "torchscript": _torchscript, "pt2": _pt2}[SUFFIXES[path.suffix]]
    try:
        text, runtime = opened(path, device, threads)
    except (ModelError, RunError):
        raise
    except Exception as error:  # each runtime has errors of its own
        raise ModelError(f"{path}: cannot be opened: {str(error).splitlines()[0]}") from error
    if not text:
        raise ModelError(f"{path}: `detdistill export` did not write it (no entry {KEY!r} in its metadata)")
    return About.from_text(text, path), runtime


Opened = tuple[str, Runtime]


def _onnx(path: Path, device: str, threads: int) -> Opened:
    ort = require("onnxruntime")
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise RunError(f"{path}: this onnxruntime has no CUDA; install onnxruntime-gpu, or use --device cpu")
        providers.insert(0, "CUDAExecutionProvider")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # its warnings are about shapes that the tracing guessed
    session = ort.InferenceSession(str(path), options, providers=providers)
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    known = {one.name for one in session.get_inputs()}

    def run(images: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Arrays:
        given = {"images": images, "sizes": sizes}
        return list(session.run(None, {name: value for name, value in given.items() if name in known}))

    return text, run


def _openvino(path: Path, device: str, threads: int) -> Opened:
    openvino = require("openvino")
    if device.startswith("cuda"):
        raise RunError(f"{path}: OpenVINO does not run on NVIDIA GPUs; use --device cpu, or the ONNX file")
    core = openvino.Core()
    model = core.read_model(str(path))
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else ""
    settings = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Arrays:
        given = {"images": images, "sizes": sizes}
        found = compiled({one.any_name: given[one.any_name] for one in compiled.inputs})
        return [found[one] for one in compiled.outputs]

    return text, run


def _torchscript(path: Path, device: str, threads: int) -> Opened:
    extra = {KEY: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch advises its newer format
        module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    text = extra[KEY]
    return text.decode() if isinstance(text, bytes) else text, _torch_runner(module, device)


def _pt2(path: Path, device: str, threads: int) -> Opened:
    extra = {KEY: ""}
    program = torch.export.load(path, extra_files=extra)
    text: Any = extra[KEY]
    module = program.module().to(device)
    return text.decode() if isinstance(text, bytes) else text, _torch_runner(module, device)


def _torch_runner(module: Any, device: str) -> Runtime:
    @torch.no_grad()
    def run(images: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Arrays:
        found: Sequence[torch.Tensor] = module(torch.from_numpy(images).to(device), torch.from_numpy(sizes).to(device))
        return [one.cpu().numpy() for one in found]

    return run
