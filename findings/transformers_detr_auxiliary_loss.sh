#!/usr/bin/env bash
# transformers 5.23.0: the predictions of DETR and Conditional DETR depend on `auxiliary_loss`, a setting of their training loss.
#
# Expected: the flag decides which losses are computed; logits and boxes of the same weights and image stay. Seen: with
# auxiliary_loss=True every decoder layer reads the layer-normalised output of the layer before it, and the last output is normalised
# twice, also in evaluation mode. As long as the norm is fresh this is next to nothing; with trained weights of the norm the same
# weights give other classes and boxes, so a detector that is trained one way and run the other way is another one, without a message.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

stages = ["stage1", "stage2", "stage3", "stage4"]
backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages[-1:])
sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6}
image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def difference(model_class, config_class) -> float:
    """Largest difference of the logits of two models that differ in the flag alone."""
    found, state = [], None
    for flag in (False, True):
        torch.manual_seed(0)
        model = model_class(config_class(backbone_config=backbone, auxiliary_loss=flag, **sizes)).eval()
        if state is None:
            norm = model.model.decoder.layernorm
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # as after training; a fresh norm leaves normalised values as they are
            state = model.state_dict()
        model.load_state_dict(state)
        with torch.no_grad():
            found.append(model(pixel_values=image).logits)
    return float((found[0] - found[1]).abs().max())


found = {
    "DETR": difference(DetrForObjectDetection, DetrConfig),
    "Conditional DETR": difference(ConditionalDetrForObjectDetection, ConditionalDetrConfig),
}
for family, largest in found.items():
    print(f"transformers {transformers.__version__}: {family}, logits with and without auxiliary_loss differ by {largest:.1e}")
assert min(found.values()) > 1e-3, "changed"
print("as found")
PYTHON
