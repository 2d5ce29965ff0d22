from transformers import DetrImageProcessor

from tests.detectors.queries import QueryDetectorTests


class TestDetr(QueryDetectorTests):
    family = "detr"
    processor = DetrImageProcessor
