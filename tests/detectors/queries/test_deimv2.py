import torch
from transformers import RTDetrImageProcessor

from tests.detectors.dense.shared import unequal_batch
from tests.detectors.queries.deformable import FrameTests


class TestDeimv2(FrameTests):
    family = "deimv2"
    processor = RTDetrImageProcessor
    exact = False  # the library's distances are float32
    classification = "loss_mal"
    unreached = ("denoising_class_embed", "class_embed.1", "lqe_layers.1")  # as D-FINE

    # boxes are trained on the union of all matches, not on the ones given
    test_foreign_matches_go_through_the_librarys_formula = None

    def layer_terms(self, prediction):
        return {0: "_aux_1", 2: ""}

    def test_weights_ignored_and_normalizer(self, detector):
        batch = unequal_batch()
        prediction = detector(batch).prediction
        own = detector.assign(prediction, batch)
        plain = detector.loss(prediction, batch, own).terms
        weights = torch.full(own.matched.shape, 2.0)
        twice = detector.loss(prediction, batch, type(own)(own.matched, weights=weights)).terms
        ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
        for suffix in self.layer_terms(prediction).values():
            for kind in ("loss_mal", "loss_bbox", "loss_giou"):
                torch.testing.assert_close(twice[kind + suffix], 2 * plain[kind + suffix], rtol=1e-5, atol=1e-6)
            assert 0 < float(ignored["loss_mal" + suffix].detach()) < float(plain["loss_mal" + suffix].detach())
