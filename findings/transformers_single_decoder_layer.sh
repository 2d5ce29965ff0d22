#!/usr/bin/env bash
# transformers 5.23.0: several DETR families cannot be built with one decoder layer, though their configurations accept it.
#
# Expected: config.decoder_layers = 1 gives a model with one layer, as for DETR and RT-DETR. Seen: ValueError about
# `tie_weights_keys`, because outputs that are shared between the layers have no second layer to be shared with, for Deformable
# DETR, RT-DETRv2, D-FINE and DEIMv2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import transformers
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers import DFineConfig, DFineForObjectDetection, RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

stages = ["stage2", "stage3", "stage4"]
sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
shared = {"d_model": 32, "decoder_layers": 1, "num_queries": 5, "decoder_attention_heads": 4, "encoder_attention_heads": 4}
hybrid = {
    **shared,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}


def builds(model_class, config_class, backbone, arguments) -> bool:
    try:
        model_class(config_class(backbone_config=backbone, **arguments))
    except ValueError as error:
        assert "tie_weights_keys" in str(error), error
        return False
    return True


plain = {"encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
found = {
    "DETR": builds(DetrForObjectDetection, DetrConfig, ResNetConfig(**sizes, out_features=stages[-1:]), {**shared, **plain}),
    "Deformable DETR": builds(
        DeformableDetrForObjectDetection, DeformableDetrConfig, ResNetConfig(**sizes, out_features=stages), {**shared, **plain}
    ),
    "RT-DETR": builds(RTDetrForObjectDetection, RTDetrConfig, RTDetrResNetConfig(**sizes, out_features=stages), hybrid),
    "RT-DETRv2": builds(RTDetrV2ForObjectDetection, RTDetrV2Config, RTDetrResNetConfig(**sizes, out_features=stages), hybrid),
    "D-FINE": builds(DFineForObjectDetection, DFineConfig, RTDetrResNetConfig(**sizes, out_features=stages), hybrid),
}
for family, built in found.items():
    print(f"transformers {transformers.__version__}: {family} with one decoder layer: {'built' if built else 'ValueError'}")
expected = {"DETR": True, "Deformable DETR": False, "RT-DETR": True, "RT-DETRv2": False, "D-FINE": False}
assert found == expected, "changed"
print("as found")
PYTHON
