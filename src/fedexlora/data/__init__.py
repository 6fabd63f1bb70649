"""Data sets, their division among clients, and the tasks that models are trained on.

``config``, ``score``, ``text_metrics`` and ``answers`` are light; the other modules load
``datasets`` or ``transformers``.
"""
