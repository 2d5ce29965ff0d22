from transformers import ConditionalDetrImageProcessor

from tests.detectors.queries.shared import QueryDetectorTests


class TestDabDetr(QueryDetectorTests):
    family = "dab_detr"
    processor = ConditionalDetrImageProcessor
