"""Knowledge distillation of object detectors: any teacher, any student, and a fair proof of the gain.

import detdistill

result = detdistill.distill("runs/teacher", "fcos:resnet18", "coco/data.yaml", "pkd", baseline=True, seeds=(0, 1, 2))
print(result.gains[0], result.report)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

_WHERE = {
    "train": "api", "distill": "api", "doctor": "api", "evaluate": "api", "predict": "api", "detect": "api",
    "compare": "api", "report": "api", "schedules": "api", "find": "api", "teach": "api", "label": "api",
    "export": "api", "bench": "api", "push": "api", "export_student": "api",
    "inspect_data": "api", "demo": "demo", "TrainSettings": "settings", "DistillSettings": "settings",
    "load_data": "data.discover", "build_detector": "detectors.build", "load_detector": "detectors.load",
    "wrap": "detectors.wrap", "Detector": "detectors.contract", "Teacher": "detectors.contract",
    "Method": "methods.shared.contract", "Composition": "methods.shared.contract", "build_method": "methods.shared.compose",
    "Batch": "structures", "Target": "structures", "View": "structures", "Detections": "structures",
    "Losses": "structures", "Clock": "structures",
    "DetdistillError": "errors",
}  # fmt: skip
"""Public names and the module of each; loaded when first used, so that importing the package costs nothing."""

__all__ = ["__version__", *_WHERE]


class _Package(ModuleType):
    """The package as a module in which ``detdistill.compare`` stays the function after its module of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets an imported submodule as an attribute of its package.
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"detdistill.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'detdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
