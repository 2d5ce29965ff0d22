from transformers import DetrImageProcessor

from tests.detectors.queries.shared import QueryDetectorTests


class TestDetr(QueryDetectorTests):
    family = "detr"
    processor = DetrImageProcessor
