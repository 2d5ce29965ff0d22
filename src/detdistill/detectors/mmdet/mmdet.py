"""A detector of MMDetection from its checkpoint, mmdet:FILE.pth, as one of this package's own detectors.

    mmdet:gfl_r50_fpn_1x_coco.pth                       all of its classes
    mmdet:FILE.pth,detector=gfl,style=pytorch           a file without a configuration inside

The checkpoint says what it is: its configuration is parsed (never executed), its tensors are read without importing or running
anything that the file names, and MMDetection is not needed. The result is an ordinary ``gfl``, ``retinanet``, ``faster_rcnn`` ...
that teaches, trains, is saved and exported as any other. MMDetection is licensed under Apache-2.0; no code of it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detdistill.detectors.adapters import adapter
from detdistill.detectors.contract import Detector
from detdistill.detectors.mmdet.shared import dense, detr, two_stage
from detdistill.detectors.mmdet.shared.checkpoint import Checkpoint, read_checkpoint
from detdistill.detectors.mmdet.shared.options import MMDetOptions
from detdistill.detectors.mmdet.shared.plan import Plan, check_all_used, load_state, picked, renamed
from detdistill.errors import ClassCountError, ModelError, name_list

TINY = None
"""None: this adapter only loads files, so there is no tiny model for ``probe``."""
OPTIONS = MMDetOptions
PLANS: Mapping[str, Callable[[Checkpoint, MMDetOptions], Plan]] = {
    "gfl": dense.plan_gfl,
    "atss": dense.plan_atss,
    "retinanet": dense.plan_retinanet,
    "fcos_scales": dense.plan_fcos,
    "reppoints": dense.plan_reppoints,
    "faster_rcnn": two_stage.plan_two_stage,
    "mask_rcnn": two_stage.plan_two_stage,
    "cascade_rcnn": two_stage.plan_cascade,
    "cascade_mask_rcnn": two_stage.plan_cascade,
    "deformable_detr": detr.plan_deformable,
    "conditional_detr": detr.plan_conditional,
    "dab_detr": detr.plan_dab,
}
HEADS = {
    "GFLHead": "gfl",
    "LDHead": "gfl",
    "ATSSHead": "atss",
    "RetinaHead": "retinanet",
    "FCOSHead": "fcos_scales",
    "RepPointsHead": "reppoints",
    "DeformableDETRHead": "deformable_detr",
    "ConditionalDETRHead": "conditional_detr",
    "DABDETRHead": "dab_detr",
}
"""Our detector for each type of ``bbox_head`` in a configuration."""
MARKS = {
    "gfl": "bbox_head.gfl_cls.weight",
    "atss": "bbox_head.atss_cls.weight",
    "retinanet": "bbox_head.retina_cls.weight",
    "fcos_scales": "bbox_head.conv_centerness.weight",
    "reppoints": "bbox_head.reppoints_cls_out.weight",
    "cascade_mask_rcnn": "roi_head.mask_head.0.conv_logits.weight",
    "cascade_rcnn": "roi_head.bbox_head.0.fc_cls.weight",
    "mask_rcnn": "roi_head.mask_head.conv_logits.weight",
    "faster_rcnn": "roi_head.bbox_head.fc_cls.weight",
    "deformable_detr": "decoder.layers.0.cross_attn.sampling_offsets.weight",
    "dab_detr": "decoder.ref_anchor_head.layers.0.weight",
    "conditional_detr": "decoder.layers.0.cross_attn.qpos_sine_proj.weight",
}
"""A tensor by which a checkpoint of each detector is known; the first that is there counts."""
OLD = {"bbox_head.transformer.": "2 (DETRs)", "bbox_head.fc_cls.": "1"}
"""Beginnings of names that newer versions do not have."""


def build(backbone: str, classes: Sequence[str], options: MMDetOptions) -> Detector:
    """Load a checkpoint to train it: classes that its file does not have are learnt anew.

    If ``classes`` are classes of the file, this is ``load``. Otherwise the outputs that depend on classes are newly initialised,
    and all other weights are kept.

    Raises:
        ModelError: as ``load``.
    """
    return _loaded(backbone, classes, options, new=True)


def load(backbone: str, classes: Sequence[str] | None, options: MMDetOptions) -> Detector:
    """Load a checkpoint as one of our detectors.

    Args:
        backbone: path of the .pth file.
        classes: names of the classes, all of them classes of the file: outputs of its other classes are left out; of two-stage
            detectors they count as background. None: those of the file.
        options: of the model string; what they say goes before what the file says.

    Raises:
        ClassCountError: the file lacks some of the classes.
        ModelError: the file cannot be read, is of a kind that cannot be loaded, does not say what is needed and no option says
            it, or does not fit what it says.
    """
    return _loaded(backbone, classes, options, new=False)


def _loaded(backbone: str, classes: Sequence[str] | None, options: MMDetOptions, *, new: bool) -> Detector:
    """Load a checkpoint; ``new``: classes that it lacks get new outputs, and so do all others then."""
    checkpoint = read_checkpoint(Path(backbone))
    kind = kind_of(checkpoint, options)
    plan = PLANS[kind](checkpoint, options)
    own = own_classes(checkpoint, plan, classes, options)
    names = own if classes is None else tuple(classes)
    lacking = [name for name in names if name not in own]
    if lacking and not new:
        raise ClassCountError(f"{backbone}: has {len(own)} classes ({name_list(own)}), but not {name_list(lacking)}")
    state, unknown = renamed(checkpoint, plan.names)
    check_all_used(checkpoint, unknown, kind)
    state, fresh = plan.convert(state), tuple(plan.repeats) if lacking else ()
    outputs = own if plan.background and not lacking else names
    if not lacking and not plan.background:
        state = picked(state, plan, [own.index(name) for name in names])
    model = plan.build(outputs)
    if plan.description is None:
        load_state(model.model, detr.placed(state, model.model.state_dict()), checkpoint, kind, fresh)
        found: Detector = model
        return found
    load_state(model, state, checkpoint, kind, fresh)
    columns = [1 + own.index(name) for name in names] if outputs is own and plan.background else plan.columns(len(names))
    text = options.name or f"mmdet:{backbone}"
    detector: Detector = adapter(kind).wrap_model(model, names, text, columns, plan.description(len(outputs)))
    return detector


def kind_of(checkpoint: Checkpoint, options: MMDetOptions) -> str:
    """Our detector that a checkpoint becomes.

    Raises:
        ModelError: it is of a kind that cannot be loaded, its file does not say which and no option does, or both differ.
    """
    path, marked = checkpoint.path, next((name for name, tensor in MARKS.items() if tensor in checkpoint.state), None)
    for beginning, version in OLD.items():
        if any(name.startswith(beginning) for name in checkpoint.state) and marked is None:
            raise ModelError(f"{path}: its tensors have the names of MMDetection {version}; upgrade it there, or train it anew")
    if not checkpoint.model:
        if options.detector is None:
            hint = "" if marked is None else f" (its tensors look like detector={marked})"
            raise ModelError(
                f"{path}: has no configuration inside, so it does not say what it is; add detector={marked or '...'}{hint}"
            )
        return options.detector
    head = checkpoint.model.at("bbox_head").get("type")
    said = marked if checkpoint.model.at("roi_head") else HEADS.get(head)
    if options.detector is not None and said not in (None, options.detector):
        raise ModelError(f"{path}: its configuration says {said}, not detector={options.detector}")
    if (said or options.detector) is None:
        kind = checkpoint.model.get("type", "unknown")
        what = f"a {kind}" + (f" with {head}" if head else "")
        raise ModelError(f"{path}: holds {what}, which cannot be loaded; known: {', '.join(PLANS)}")
    return str(options.detector or said)


def own_classes(checkpoint: Checkpoint, plan: Plan, classes: Sequence[str] | None, options: MMDetOptions) -> tuple[str, ...]:
    """Names of the checkpoint's classes: of the option ``names``, of the file, or, if both are missing, the wanted ones.

    Raises:
        ModelError: there are none, or not as many as outputs.
    """
    path, found, source = checkpoint.path, checkpoint.classes, "it"
    if options.names is not None:
        source = options.names
        try:
            lines = Path(options.names).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{options.names}: cannot be read as names of classes: {error}") from error
        found = tuple(line.strip() for line in lines if line.strip())
    if found is None and classes is not None and len(classes) == plan.classes:
        return tuple(classes)
    if found is None:
        raise ModelError(f"{path}: has {plan.classes} classes but not their names; add names=FILE, a text with one in a line")
    if len(found) != plan.classes or len(set(found)) != len(found):
        raise ModelError(f"{path}: has outputs of {plan.classes} classes, but {source} names {len(set(found))} different ones")
    return found
