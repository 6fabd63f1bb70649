"""A module's name taken apart: which layer it is in, and what it does there."""

from __future__ import annotations

import re


def split_name(module: str) -> tuple[str, str]:
    """A module's layer, up to the first number in its name, and its projection, the rest.

    >>> split_name("model.layers.11.self_attn.q_proj")
    ('model.layers.11', 'self_attn.q_proj')
    >>> split_name("lm_head")
    ('', 'lm_head')
    """
    found = re.match(r"(?:(.*?\b\d+)\.)?(.+)", module)
    return (found[1] or "", found[2]) if found else ("", module)
