"""Commands about a trained model: eval, predict, label, student, export, bench, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from detdistill.cli.arguments import Parser, device_flag, json_flag, plain
from detdistill.cli.output import FRACTIONS, say, show

if TYPE_CHECKING:
    pass


def _view_flags(parser: Parser, whose: str) -> None:
    forms = Literal["letterbox", "stretch", "short_side"] | None
    parser.add_argument("--size", type=int | None, default=None, help=f"side of the images in pixels; none: {whose}")
    parser.add_argument("--resize", type=forms, default=None, help="how images are brought to this size; none: as in training")
    parser.add_argument("--max_size", type=int | None, default=None, help="largest long side in pixels for resize=short_side")


def _strict_flag(parser: Parser) -> None:
    parser.add_argument("--strict", type=bool, default=False, help="refuse data with defects instead of skipping them")


def eval_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="run or student folder, torchvision:NAME,weights=..., .onnx")
    parser.add_argument("--data", type=str, default="digits", help="COCO, YOLO, VOC or Roboflow data, or digits")
    parser.add_argument("--split", type=Literal["val", "test", "train"], default="val", help="which images of the data")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    _view_flags(parser, "the run's size")
    device_flag(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images; 0: none besides")
    _strict_flag(parser)
    parser.add_argument("--out", type=Path | None, default=None, help="also write the numbers to this JSON file")
    json_flag(parser, FRACTIONS)


def evaluate(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill import api
    from detdistill.listing import show_scores

    values = {key: value for key, value in plain(chosen).items() if value is not None}
    out = values.pop("out", None)
    show(chosen, lambda: api.evaluate(**values), show_scores, asdict, out)


def predict_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="run or student folder, torchvision:NAME,weights=..., .onnx")
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of images with its sub-folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for drawn images and detections.json (COCO)")
    parser.add_argument("--score", type=float, default=0.3, help="boxes below this score are neither drawn nor written")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images in pixels; none: the run's size")
    parser.add_argument("--batch", type=int | None, default=None, help="images per batch; none: 8 on a GPU, 1 on a CPU")
    device_flag(parser)


def predict(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.errors import counted

    found = api.predict(**plain(chosen))
    say(f"{counted(found.images, 'image')} with {counted(found.boxes, 'box')} and detections.json are in {found.folder}")
    if found.unreadable:
        sys.stderr.write(f"detdistill: {counted(len(found.unreadable), 'image')} could not be read (named above)\n")
        sys.exit(1)


def label_flags(parser: Parser) -> None:
    parser.add_argument(
        "--teacher", type=str, required=True, help="a detector, or hf:NAME of one that is told by text what to find"
    )
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of images with its sub-folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the COCO data set; it must not exist")
    parser.add_argument("--classes", type=str, default="", help="what to find, e.g. helmet,person; none: all of the detector's")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a box, 0..1")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images in pixels; none: that of the training")
    parser.add_argument("--nms", type=float, default=0.7, help="largest IoU of two boxes of a class, for models told by text")
    parser.add_argument("--review", type=int, default=200, help="number of images on the page review.html")
    device_flag(parser)


def label(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.errors import counted

    values = plain(chosen)
    values["classes"] = [name.strip() for name in values["classes"].split(",") if name.strip()]
    found = api.label(**values)
    for name, count in found.boxes.items():
        say(f"{count:>8}  {name}")
    say(f"{counted(sum(found.boxes.values()), 'box')} on {counted(found.images, 'image')}")
    say(f"data set {found.folder}; look through it: {found.folder / 'review.html'}")
    if found.unreadable:
        sys.exit(1)


def student_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model", type=str, required=True, help="checkpoint (runs/x/checkpoints/best.ckpt), run folder or student folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=str | None, default=None, help="the run's data, if an unfinished run's data have moved")
    _view_flags(parser, "that of the training")
    parser.add_argument("--pt", type=bool, default=False, help="also write best.pt for ultralytics.YOLO or libreyolo.LibreYOLO")


def student(chosen: Namespace) -> None:
    from detdistill import api

    say(f"student folder {api.export_student(**plain(chosen))}")


def export_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=str, required=True, help="run folder, student folder, or torchvision:NAME,weights=...")
    parser.add_argument("--out", type=Path, required=True, help="file: .onnx, .xml (openvino), .torchscript or .pt2")
    parser.add_argument("--data", type=str | None, default=None, help="images for the proof and for int8; none: noise, no AP")
    parser.add_argument("--format", type=Literal["onnx", "openvino", "torchscript", "pt2"], default="onnx", help="of the file")
    parser.add_argument("--int8", type=bool, default=False, help="also write the int8 form, calibrated on training images")
    parser.add_argument("--nms", type=bool, default=False, help="NMS inside the file: dense heads, one image at a time")
    parser.add_argument(
        "--dynamic", type=str, default="all", help="what may vary: batch,size, one of them, none, or all that can"
    )
    parser.add_argument("--opset", type=int | None, default=None, help="of ONNX; none: the smallest that suffices")
    parser.add_argument("--calibration", type=int, default=64, help="number of training images for int8")
    parser.add_argument("--batch", type=int, default=8, help="images per batch of the evaluations")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace files that exist")
    parser.add_argument("--allow_loss", type=bool, default=False, help="exit with 0 although a file lost AP")
    _view_flags(parser, "the run's size")
    _strict_flag(parser)


def export(chosen: Namespace) -> None:
    from detdistill import api
    from detdistill.listing import show_export

    values = plain(chosen)
    allowed, free = values.pop("allow_loss"), values.pop("dynamic")
    values["dynamic"] = None if free == "all" else () if free == "none" else tuple(free.split(","))
    made = api.export(**values)
    show_export(made)
    if not made.passed and not allowed:
        lost = ", ".join(f"{stage.name} lost {stage.lost:.2f} AP" for stage in made.stages if not stage.passed)
        sys.stderr.write(f"detdistill: {lost}, more than allowed; --allow_loss true accepts it\n")
        sys.exit(1)


def bench_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        dest="models",
        nargs="+",
        type=str,
        required=True,
        help="runs, student folders, exported files, model strings",
    )
    parser.add_argument("--data", type=str | None, default=None, help="images of its val split; none: noise")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--rounds", type=int, default=30, help="how often each model runs; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the other runtimes")
    device_flag(parser, "cpu")
    _view_flags(parser, "that of the first model")
    _strict_flag(parser)
    json_flag(parser)


def bench(chosen: Namespace) -> None:
    from dataclasses import asdict

    from detdistill import api
    from detdistill.listing import show_bench

    show(
        chosen,
        lambda: api.bench(**plain(chosen)),
        show_bench,
        lambda found: {name: asdict(timing) for name, timing in found.items()},
    )


def push_flags(parser: Parser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="run folder, student folder, or a file that export wrote")
    parser.add_argument("--to", type=str, required=True, help="hub:NAME or hub:OWNER/NAME")
    parser.add_argument("--private", type=bool, default=True, help="a new repository is private")
    parser.add_argument("--message", type=str, default="Upload by detdistill", help="message of the commit")


def push(chosen: Namespace) -> None:
    from detdistill import api

    say(f"uploaded to {api.push(**plain(chosen))}")
