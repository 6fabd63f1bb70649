"""Adapters that people already have: their exact mean, what averaging loses, smaller and merged."""
