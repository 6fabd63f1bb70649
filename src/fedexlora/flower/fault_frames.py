"""A fault of a node as the frame that leaves it, and as lines of its own log."""

from __future__ import annotations

import logging

from fedexlora.errors import NodeError
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.flower.frames import Frame
from fedexlora.texts import printable

_log = logging.getLogger(__name__)
_HEAD, _TAIL = 1000, 2800
"""Characters that are kept of an entry that is too long."""
_MOST = 4000
"""Characters of an entry once it is escaped."""


def fault_frame(error: Exception) -> Frame:
    """The reply to a request that failed: a code. What happened goes into the log."""
    if isinstance(error, NodeError):
        _log.error("%s: %s", error.code, error)
        return Frame({"failure": str(error.code)})
    _log.error("a request failed", exc_info=error)
    return Frame({"failure": str(NodeFault.INTERNAL)})


class LogFormatter(logging.Formatter):
    """Entries that no text of a server can forge, hide or flood.

    Control characters are escaped, further lines are indented, the middle of a long entry is cut.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One entry."""
        text = super().format(record)
        if len(text) > _HEAD + _TAIL:
            text = f"{text[:_HEAD]} ... {text[-_TAIL:]}"
        return printable(text, _MOST).replace("\n", "\n    ")
