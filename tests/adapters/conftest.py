"""The runs of ``tests/rounds``, for what works on finished ones."""

from tests.rounds.conftest import data_folder, document, whole

__all__ = ["data_folder", "document", "whole"]
