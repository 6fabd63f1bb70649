"""Federated LoRA fine-tuning of a sentence classifier, as a Flower app."""
