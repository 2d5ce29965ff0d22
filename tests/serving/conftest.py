"""The trained teacher of the tests of runs."""

from tests.training.conftest import one_thread, teacher

__all__ = ["one_thread", "teacher"]
