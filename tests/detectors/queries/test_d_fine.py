import torch
from transformers import RTDetrImageProcessor

from tests.detectors.dense.shared import unequal_batch
from tests.detectors.queries.deformable import FrameTests


class TestDFine(FrameTests):
    family = "d_fine"
    processor = RTDetrImageProcessor
    exact = False  # the library's distances are float32
    # the last layer but one has no loss on its class: the library's auxiliary sets are moved by one
    unreached = ("denoising_class_embed", "class_embed.1", "lqe_layers.1")

    def check_logits(self, mine, theirs):
        # On CPUs without AVX-512 one thread rounds the last digit otherwise (largest difference seen: 9.5e-7).
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)

    def layer_terms(self, prediction):
        return {0: "_aux_1", 2: ""}

    def test_every_layer_shows_what_training_shows(self, detector):
        """In training the library has the layers' outputs (behind the first boxes); ours are the same in eval mode."""
        batch = unequal_batch()
        detector.eval()
        with torch.no_grad():
            mine = detector(batch).prediction
            detector.model.model.decoder.training = True  # the one place that asks
            outputs = detector.model(**self.inputs(detector, batch))
        torch.testing.assert_close(outputs.intermediate_logits[:, 1:].transpose(0, 1), mine.logits, rtol=1e-5, atol=1e-6)
        theirs = outputs.intermediate_reference_points[:, 1:].transpose(0, 1)
        torch.testing.assert_close(theirs, self.boxes_of_library(detector, mine, batch), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs.intermediate_hidden_states, mine.embedding, rtol=1e-5, atol=1e-6)
        sides = torch.stack([layer.sides for layer in detector.own(mine).run.layers], dim=1)
        torch.testing.assert_close(outputs.intermediate_predicted_corners, sides, rtol=1e-5, atol=1e-6)

    def test_the_constants_never_train(self, detector):
        for one in (detector, detector.copy_head(), detector.copy_head(fresh=True), detector.requires_grad_(True)):
            constants = [p for name, p in one.named_parameters() if name.endswith(("decoder.up", "decoder.reg_scale"))]
            assert sorted(float(constant.detach()) for constant in constants) == [0.5, 4.0]
            assert not any(constant.requires_grad for constant in constants)
