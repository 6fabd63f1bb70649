"""The runs of ``tests/rounds``, for what trains their clients."""

from tests.rounds.conftest import data_folder, document, whole

__all__ = ["data_folder", "document", "whole"]
