"""Federated LoRA fine-tuning whose aggregation is exact, and measured."""

__version__ = "0.1.0"
