"""The methods, one published rule per file, and the table that names them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedexlora.methods.centralised import CENTRALISED
from fedexlora.methods.fedadam_factored import FEDADAM_FACTORED
from fedexlora.methods.fedavgm import FEDAVGM
from fedexlora.methods.fedex import FEDEX
from fedexlora.methods.fedit import FEDIT
from fedexlora.methods.fedmomentum import FEDMOMENTUM
from fedexlora.methods.fedrot import FEDROT
from fedexlora.methods.fedsa import FEDSA
from fedexlora.methods.fedsvd import FEDSVD
from fedexlora.methods.ffa import FFA
from fedexlora.methods.flexlora import FLEXLORA
from fedexlora.methods.flora import FLORA
from fedexlora.methods.florist import FLORIST
from fedexlora.methods.frlora import FRLORA
from fedexlora.methods.hetlora import HETLORA
from fedexlora.methods.local_only import LOCAL_ONLY
from fedexlora.methods.lora_a2 import LORA_A2
from fedexlora.methods.lorafair_ridge import LORAFAIR_RIDGE
from fedexlora.methods.method import Method
from fedexlora.methods.rbla import RBLA
from fedexlora.methods.rolora import ROLORA
from fedexlora.methods.rule import Rule

_TABLE = {
    m.name: m
    for m in (
        FEDEX,
        FEDIT,
        FFA,
        ROLORA,
        FEDSA,
        FEDROT,
        FEDAVGM,
        FLORA,
        FLORIST,
        FLEXLORA,
        RBLA,
        HETLORA,
        FEDMOMENTUM,
        FEDSVD,
        FEDADAM_FACTORED,
        LORAFAIR_RIDGE,
        FRLORA,
        LORA_A2,
        CENTRALISED,
        LOCAL_ONLY,
    )
}
METHODS: Mapping[str, Method] = MappingProxyType(_TABLE)
"""Every method by the name that recipes use."""

__all__ = ["METHODS", "Method", "Rule"]
