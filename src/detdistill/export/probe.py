"""Whether and how a detector can be exported, found by exporting a small one as ONNX and reading the file back."""

from __future__ import annotations

import tempfile
from pathlib import Path

from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Detector
from detdistill.errors import DetdistillError
from detdistill.export.file_detector import FileDetector
from detdistill.export.graphs import graph_of
from detdistill.export.proof import largest_difference
from detdistill.export.run import Wanted, description, example, proof_batches
from detdistill.export.write import write
from detdistill.functional.modes import evaluating

FORMS = {
    ("batch", "size"): "any number and size of images",
    ("batch",): "any number of images, fixed size",
    (): "one image, fixed size",
}
"""What may vary in a file, and the words for it."""
SMALL = 128
"""Side of the probe's images in pixels; the second batch of dense detectors has 96."""
CLOSE_PX, CLOSE_SCORE = 0.05, 1e-3
"""Largest differences of a dense detector's file. Random weights give equal scores, whose order rounding decides, so files of
other detectors only have to run on both batches."""


def probe_export(detector: Detector) -> str:
    """Export a small detector as ONNX and compare the file with it on two batches of noise of different numbers and sizes.

    Returns:
        One of ``FORMS``, or ``no: `` and the reason. Nothing is raised.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch, evaluating(detector):
            wanted, settings = Wanted(Path(scratch, "model.onnx")), ViewSettings(SMALL)
            graph = graph_of(detector)
            about = description(detector, graph, wanted, settings)
            write(graph, about, example(about), wanted.out)
            found = largest_difference(graph, FileDetector(wanted.out), proof_batches(about, settings, None))
            if detector.spec.family == "dense" and (found.boxes_px > CLOSE_PX or found.scores > CLOSE_SCORE):
                return f"no: boxes of the file differ by {found.boxes_px:.2g} pixels, scores by {found.scores:.2g}"
            return FORMS[graph.free]
    except Exception as error:  # any error of a library means that it cannot be exported here
        first = (str(error).strip().splitlines() or [""])[0]
        return (
            f"no: {first.removeprefix(f'{detector.spec.name}: ')}"
            if isinstance(error, DetdistillError)
            else (f"no: {type(error).__name__}: {first}")
        )
