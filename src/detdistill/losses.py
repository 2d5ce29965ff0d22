"""The pure functions of all methods: tensors in, tensors out, usable in any training loop.

    from detdistill.losses import pkd_loss

Written by ``tools/losses.py`` from the files of the methods; a method's public functions begin with its slug.
"""

from detdistill.methods.bckd import (
    bckd_box_loss,
    bckd_class_loss,
    bckd_weights,
)
from detdistill.methods.crosskd.loss import (
    crosskd_align,
    crosskd_box_loss,
    crosskd_centerness_loss,
    crosskd_class_loss,
    crosskd_distribution_loss,
    crosskd_moments,
    crosskd_scores,
)
from detdistill.methods.cwd import (
    cwd_logit_map,
    cwd_loss,
)
from detdistill.methods.d3etr.loss import (
    d3etr_loss,
    d3etr_match,
    d3etr_terms,
)
from detdistill.methods.defeat.loss import (
    defeat_backbone_masks,
    defeat_decay,
    defeat_head_terms,
    defeat_map_terms,
    defeat_masks,
)
from detdistill.methods.detrdistill.loss import (
    detrdistill_contrastive_loss,
    detrdistill_feature_loss,
    detrdistill_layers,
    detrdistill_logits_loss,
    detrdistill_masks,
    detrdistill_match,
    detrdistill_quality,
    detrdistill_quality_weights,
    detrdistill_query_weights,
    detrdistill_split_loss,
    detrdistill_targets,
)
from detdistill.methods.dicod.loss import (
    dicod_classification_loss,
    dicod_localization_loss,
    dicod_pooled,
    dicod_sample,
)
from detdistill.methods.drkd import (
    drkd_instance_loss,
    drkd_pixel_loss,
    drkd_regions,
)
from detdistill.methods.dsig.loss import (
    dsig_box_loss,
    dsig_class_loss,
    dsig_edge_loss,
    dsig_feature_loss,
    dsig_mine,
    dsig_node_losses,
)
from detdistill.methods.fgd import (
    fgd_loss,
    fgd_masks,
    fgd_terms,
)
from detdistill.methods.fgfi import (
    fgfi_loss,
    fgfi_masks,
    fgfi_virtual_anchors,
)
from detdistill.methods.fitnet import (
    fitnet_loss,
    fitnet_modified_loss,
    fitnet_normalized_loss,
)
from detdistill.methods.fkd import (
    fkd_attention,
    fkd_channel_loss,
    fkd_feature_loss,
    fkd_loss,
    fkd_relation_loss,
    fkd_spatial_loss,
)
from detdistill.methods.frs import (
    frs_class_loss,
    frs_feature_loss,
    frs_richness,
)
from detdistill.methods.g_detkd.loss import (
    g_detkd_blend,
    g_detkd_box_loss,
    g_detkd_ckd_loss,
    g_detkd_class_loss,
    g_detkd_level_weights,
    g_detkd_sgfi_loss,
    g_detkd_units,
)
from detdistill.methods.gid import (
    gid_feature_loss,
    gid_instances,
    gid_relation_loss,
    gid_response_loss,
)
from detdistill.methods.glamd.loss import (
    glamd_attention,
    glamd_box_loss,
    glamd_channel_loss,
    glamd_class_loss,
    glamd_feature_loss,
    glamd_spatial_loss,
)
from detdistill.methods.head.loss import (
    head_ckd_loss,
    head_layer_loss,
    head_neck_loss,
    head_neck_mask,
)
from detdistill.methods.icd.loss import (
    icd_auxiliary_losses,
    icd_queries,
    icd_value_loss,
    icd_value_weights,
)
from detdistill.methods.kd_detr import (
    kd_detr_loss,
    kd_detr_terms,
    kd_detr_weights,
)
from detdistill.methods.labelenc import (
    labelenc_distance,
)
from detdistill.methods.lad.loss import (
    lad_label_terms,
    lad_region,
    lad_soft_terms,
    lad_switched_costs,
)
from detdistill.methods.ld.loss import (
    ld_box_loss,
    ld_class_loss,
    ld_general_instances,
    ld_imitation_loss,
    ld_rebinned,
    ld_valuable_region,
)
from detdistill.methods.lgd import (
    lgd_loss,
)
from detdistill.methods.matched import (
    matched_log_odds,
    matched_pairs,
    matched_sides_loss,
    matched_terms,
)
from detdistill.methods.mgd import (
    mgd_keep,
    mgd_loss,
)
from detdistill.methods.mimic import (
    mimic_loss,
    mimic_prediction_loss,
)
from detdistill.methods.mimicdet import (
    mimicdet_loss,
)
from detdistill.methods.odkd import (
    odkd_box_loss,
    odkd_class_loss,
    odkd_hint_loss,
    odkd_worse,
)
from detdistill.methods.pgd.loss import (
    pgd_background,
    pgd_box_terms,
    pgd_candidates,
    pgd_class_terms,
    pgd_loss,
    pgd_normalized,
    pgd_weights,
)
from detdistill.methods.pkd import (
    pkd_loss,
)
from detdistill.methods.rm_pfi import (
    rm_pfi_feature_loss,
    rm_pfi_prediction_gap,
    rm_pfi_rank_loss,
)
from detdistill.methods.scalekd.loss import (
    scalekd_box_loss,
    scalekd_class_loss,
    scalekd_feature_loss,
    scalekd_region_class_loss,
)
from detdistill.methods.skd import (
    skd_loss,
    skd_scaled,
    skd_ssim,
)
from detdistill.methods.ssd_det.loss import (
    ssd_det_bag,
    ssd_det_focal,
    ssd_det_merge,
    ssd_det_random_boxes,
)
from detdistill.methods.tadf import (
    tadf_box_gate,
    tadf_box_loss,
    tadf_class_gate,
    tadf_class_loss,
    tadf_decay,
    tadf_feature_loss,
    tadf_masks,
)
from detdistill.methods.tbd import (
    tbd_feature_loss,
    tbd_harmony,
    tbd_harmony_loss,
    tbd_task_weights,
)
from detdistill.methods.unikd.loss import (
    unikd_boxes,
    unikd_loss,
)
from detdistill.methods.vfm import (
    vfm_cosine_loss,
    vfm_levels,
    vfm_smooth_loss,
)

__all__ = [
    "bckd_box_loss",
    "bckd_class_loss",
    "bckd_weights",
    "crosskd_align",
    "crosskd_box_loss",
    "crosskd_centerness_loss",
    "crosskd_class_loss",
    "crosskd_distribution_loss",
    "crosskd_moments",
    "crosskd_scores",
    "cwd_logit_map",
    "cwd_loss",
    "d3etr_loss",
    "d3etr_match",
    "d3etr_terms",
    "defeat_backbone_masks",
    "defeat_decay",
    "defeat_head_terms",
    "defeat_map_terms",
    "defeat_masks",
    "detrdistill_contrastive_loss",
    "detrdistill_feature_loss",
    "detrdistill_layers",
    "detrdistill_logits_loss",
    "detrdistill_masks",
    "detrdistill_match",
    "detrdistill_quality",
    "detrdistill_quality_weights",
    "detrdistill_query_weights",
    "detrdistill_split_loss",
    "detrdistill_targets",
    "dicod_classification_loss",
    "dicod_localization_loss",
    "dicod_pooled",
    "dicod_sample",
    "drkd_instance_loss",
    "drkd_pixel_loss",
    "drkd_regions",
    "dsig_box_loss",
    "dsig_class_loss",
    "dsig_edge_loss",
    "dsig_feature_loss",
    "dsig_mine",
    "dsig_node_losses",
    "fgd_loss",
    "fgd_masks",
    "fgd_terms",
    "fgfi_loss",
    "fgfi_masks",
    "fgfi_virtual_anchors",
    "fitnet_loss",
    "fitnet_modified_loss",
    "fitnet_normalized_loss",
    "fkd_attention",
    "fkd_channel_loss",
    "fkd_feature_loss",
    "fkd_loss",
    "fkd_relation_loss",
    "fkd_spatial_loss",
    "frs_class_loss",
    "frs_feature_loss",
    "frs_richness",
    "g_detkd_blend",
    "g_detkd_box_loss",
    "g_detkd_ckd_loss",
    "g_detkd_class_loss",
    "g_detkd_level_weights",
    "g_detkd_sgfi_loss",
    "g_detkd_units",
    "gid_feature_loss",
    "gid_instances",
    "gid_relation_loss",
    "gid_response_loss",
    "glamd_attention",
    "glamd_box_loss",
    "glamd_channel_loss",
    "glamd_class_loss",
    "glamd_feature_loss",
    "glamd_spatial_loss",
    "head_ckd_loss",
    "head_layer_loss",
    "head_neck_loss",
    "head_neck_mask",
    "icd_auxiliary_losses",
    "icd_queries",
    "icd_value_loss",
    "icd_value_weights",
    "kd_detr_loss",
    "kd_detr_terms",
    "kd_detr_weights",
    "labelenc_distance",
    "lad_label_terms",
    "lad_region",
    "lad_soft_terms",
    "lad_switched_costs",
    "ld_box_loss",
    "ld_class_loss",
    "ld_general_instances",
    "ld_imitation_loss",
    "ld_rebinned",
    "ld_valuable_region",
    "lgd_loss",
    "matched_log_odds",
    "matched_pairs",
    "matched_sides_loss",
    "matched_terms",
    "mgd_keep",
    "mgd_loss",
    "mimic_loss",
    "mimic_prediction_loss",
    "mimicdet_loss",
    "odkd_box_loss",
    "odkd_class_loss",
    "odkd_hint_loss",
    "odkd_worse",
    "pgd_background",
    "pgd_box_terms",
    "pgd_candidates",
    "pgd_class_terms",
    "pgd_loss",
    "pgd_normalized",
    "pgd_weights",
    "pkd_loss",
    "rm_pfi_feature_loss",
    "rm_pfi_prediction_gap",
    "rm_pfi_rank_loss",
    "scalekd_box_loss",
    "scalekd_class_loss",
    "scalekd_feature_loss",
    "scalekd_region_class_loss",
    "skd_loss",
    "skd_scaled",
    "skd_ssim",
    "ssd_det_bag",
    "ssd_det_focal",
    "ssd_det_merge",
    "ssd_det_random_boxes",
    "tadf_box_gate",
    "tadf_box_loss",
    "tadf_class_gate",
    "tadf_class_loss",
    "tadf_decay",
    "tadf_feature_loss",
    "tadf_masks",
    "tbd_feature_loss",
    "tbd_harmony",
    "tbd_harmony_loss",
    "tbd_task_weights",
    "unikd_boxes",
    "unikd_loss",
    "vfm_cosine_loss",
    "vfm_levels",
    "vfm_smooth_loss",
]
