import pytest
import torch
from transformers import RTDetrImageProcessor

from detdistill.detectors.build import build_detector
from detdistill.errors import ModelError
from tests.detectors.queries.deformable import SMALL, FrameTests


class TestRTDetr(FrameTests):
    family = "rt_detr"
    processor = RTDetrImageProcessor


class TestRTDetrV2(FrameTests):
    family = "rt_detr_v2"
    processor = RTDetrImageProcessor


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2"])
def test_options(family):
    detector = build_detector(f"{family}:{SMALL},points=2,denoising=7", ["a", "b"])
    config = detector.config
    assert (config.decoder_n_points, config.num_denoising, config.num_queries, config.decoder_layers) == (2, 7, 30, 3)
    norms = [m for name, m in detector.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    with pytest.raises(ModelError, match="dim=30 must be a multiple of heads=4"):
        build_detector(f"{family}:resnet10t,dim=30,heads=4", ["a"])
    with pytest.raises(ModelError, match="has no option 'two_stage'"):
        build_detector(f"{family}:resnet10t,two_stage=true", ["a"])
    with pytest.raises(ModelError, match="none of stride 64"):
        build_detector(f"{family}:resnet10t,levels=3-6", ["a"])
