"""What a node may say of a fault: a code of a closed set, and never a text.

A node's texts (paths, column names, labels, what a library says of a row) stay in its own log. The
server has a sentence for every code.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum, unique
from types import MappingProxyType


@unique
class NodeFault(StrEnum):
    """Every fault that a node names to a server."""

    NOT_CONFIGURED = "not-configured"
    """Its SuperNode was started without a ``node.toml``."""
    CONFIGURATION_INVALID = "configuration-invalid"
    """Its ``node.toml`` cannot be read, or is wrong."""
    REQUEST_INVALID = "request-invalid"
    """The server's message cannot be read, or is none."""
    RELEASE_DIFFERS = "release-differs"
    """The server runs another release of this package."""
    RECIPE_INVALID = "recipe-invalid"
    """The recipe has a key or a value that no recipe has, or that a server may not set."""
    LIMIT_EXCEEDED = "limit-exceeded"
    """The recipe asks for more than ``[limits]``."""
    TASK_REFUSED = "task-refused"
    """Not allowed, not there, or unfit: one answer, so that asking for columns tells nothing."""
    MODEL_REFUSED = "model-refused"
    """The model is not one of ``[models]``, or not at that revision."""
    MODEL_UNFIT = "model-unfit"
    """The model cannot be loaded, or not be adapted as the recipe says."""
    BASE_DIFFERS = "base-differs"
    """The base model has other weights than the server's."""
    VERSION_MISSING = "version-missing"
    """It does not hold the version that the message continues: it needs the total."""
    OUT_OF_MEMORY = "out-of-memory"
    """Of the processor or the accelerator."""
    TRAINING_FAILED = "training-failed"
    """Local training raised an error."""
    WORKER_LOST = "worker-lost"
    """The node's own worker did not start, or went while it worked."""
    INTERNAL = "internal"
    """Anything else."""


_LOG = "its own log says what"
FAULT_TEXTS: Mapping[NodeFault, str] = MappingProxyType(
    {
        NodeFault.NOT_CONFIGURED: (
            "its SuperNode has no node configuration: start it with "
            "--node-config 'fedexlora-node=\"/path/to/node.toml\"'"
        ),
        NodeFault.CONFIGURATION_INVALID: f"its node.toml cannot be read or is wrong; {_LOG}",
        NodeFault.REQUEST_INVALID: "what reached it is not a message of fedexlora",
        NodeFault.RELEASE_DIFFERS: (
            "it runs another release of fedexlora: install the same version on both sides"
        ),
        NodeFault.RECIPE_INVALID: (
            f"the recipe has a key or a value that it refuses from a server; {_LOG}"
        ),
        NodeFault.LIMIT_EXCEEDED: f"the recipe asks for more than its [limits] allow; {_LOG}",
        NodeFault.TASK_REFUSED: (
            "it does not train this task: its [task] does not allow the kind, a column or the "
            f"labels, or its rows do not fit; {_LOG}"
        ),
        NodeFault.MODEL_REFUSED: (
            "the recipe's model, at the recipe's revision, is not one of its [models]"
        ),
        NodeFault.MODEL_UNFIT: (
            f"the model cannot be loaded there, or not be adapted as the recipe says; {_LOG}"
        ),
        NodeFault.BASE_DIFFERS: "its base model has other weights than the server's",
        NodeFault.VERSION_MISSING: "it does not hold the version that the pieces continue",
        NodeFault.OUT_OF_MEMORY: "it ran out of memory",
        NodeFault.TRAINING_FAILED: f"its training failed; {_LOG}",
        NodeFault.WORKER_LOST: f"its worker did not start, or has gone; {_LOG}",
        NodeFault.INTERNAL: f"it failed; {_LOG}",
    }
)
"""The server's words for every code."""
_UNKNOWN = "it gave a reason that is none of the agreed codes"


def fault_text(code: object) -> str:
    """The server's sentence for what a node gave as its fault.

    Nothing of an unknown value is repeated: it is somebody else's text.

    >>> fault_text("out-of-memory")
    'it ran out of memory'
    >>> fault_text("column 'diagnosis' not found")
    'it gave a reason that is none of the agreed codes'
    """
    if not isinstance(code, str):
        return _UNKNOWN
    try:
        return FAULT_TEXTS[NodeFault(code)]
    except ValueError:
        return _UNKNOWN
