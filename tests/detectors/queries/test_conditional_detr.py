from transformers import ConditionalDetrImageProcessor

from tests.detectors.queries.shared import QueryDetectorTests


class TestConditionalDetr(QueryDetectorTests):
    family = "conditional_detr"
    processor = ConditionalDetrImageProcessor
