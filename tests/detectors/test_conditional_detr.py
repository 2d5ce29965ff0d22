from transformers import ConditionalDetrImageProcessor

from tests.detectors.queries import QueryDetectorTests


class TestConditionalDetr(QueryDetectorTests):
    family = "conditional_detr"
    processor = ConditionalDetrImageProcessor
