"""The methods, one published rule per file, and the table that names them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedexlora.methods.fedex import FEDEX
from fedexlora.methods.fedit import FEDIT
from fedexlora.methods.ffa import FFA
from fedexlora.methods.method import Method

METHODS: Mapping[str, Method] = MappingProxyType({m.name: m for m in (FEDEX, FEDIT, FFA)})
"""Every method by the name that recipes use."""

__all__ = ["METHODS", "Method"]
