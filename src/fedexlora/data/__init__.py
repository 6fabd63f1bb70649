"""Data sets, their division among clients, and the tasks that models are trained on.

Only ``fedexlora.data.config`` is light; the other modules load ``datasets`` or ``transformers``.
"""
