"""Conversations as people store them: messages with roles, or ShareGPT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from fedexlora.exchange.untrusted import short

Message: TypeAlias = dict[str, str]
"""``role`` and ``content``, and for some tools ``name`` and ``tool_call_id``."""

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
_PASSED_ON = ("name", "tool_call_id")
_UNREAD = {
    "tool_calls": "write the call into the content",
    "function_call": "write the call into the content",
    "reasoning_content": "write the reasoning into the content",
    "reasoning": "write the reasoning into the content",
    "thinking": "write the reasoning into the content",
    "weight": "every assistant's turn is a target; remove the others' rows, or the key",
}


def read_conversation(value: object) -> tuple[list[Message], list[str]]:
    """One row's messages, and what is wrong with them.

    Args:
        value: a list of messages; each has ``role`` and ``content``, or ``from`` and ``value``.

    Returns:
        The messages with the roles ``system``, ``user``, ``assistant`` and ``tool``; and every
        fault, with the number of its message from 1. Without faults there is a user's turn, an
        assistant's after it, and a text in every one of the assistant's.
    """
    found = _listed(value)
    if found is None:
        return [], [f"expected a list of messages, found {short(value)}"]
    messages: list[Message] = []
    faults: list[str] = []
    for number, given in enumerate(found, 1):
        message, fault = _read_message(given)
        messages.append(message)
        if fault is not None:
            faults.append(f"message {number}: {fault}")
    if not faults:
        faults = _order_faults([message["role"] for message in messages])
    return messages, faults


def _listed(value: object) -> list[object] | None:
    """The messages of a row, also where they are stored as a list of every key."""
    if isinstance(value, Mapping) and value and all(isinstance(x, list) for x in value.values()):
        columns: list[list[object]] = list(value.values())
        if len({len(x) for x in columns}) > 1:
            return None
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return list(value) if isinstance(value, list) and value else None


def _read_message(given: object) -> tuple[Message, str | None]:
    if not isinstance(given, Mapping):
        return {}, f"expected a role and a content, found {short(given)}"
    # A table has all keys in every row, with nothing in those that a row does not have.
    found = {key: value for key, value in given.items() if value is not None}
    sharegpt = "role" not in found and "from" in found
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    roles = _SHAREGPT_ROLES if sharegpt else _ROLES
    named, text = found.get(role_key), found.get(text_key)
    role = roles.get(named) if isinstance(named, str) else None
    if role is None:
        shown = "none" if named is None else short(named)
        return {}, f"`{role_key}`: expected one of {', '.join(roles)}; found {shown}"
    for key, way_out in _UNREAD.items():
        if found.get(key) not in (None, [], ""):
            return {}, f"`{key}` is not read; {way_out}"
    if not isinstance(text, str):
        shown = "none" if text is None else short(text)
        return {}, f"`{text_key}`: expected text, found {shown}"
    if role == "assistant" and not text.strip():
        return {}, "expected an assistant's answer, found an empty one"
    more = {key: found[key] for key in _PASSED_ON if isinstance(found.get(key), str)}
    return {"role": role, "content": text, **more}, None


def _order_faults(roles: list[str]) -> list[str]:
    faults = [
        f"expected a turn of the {role}, found none"
        for role in ("user", "assistant")
        if role not in roles
    ]
    if not faults and roles.index("assistant") == 0:
        faults.append("message 1: expected a turn before the assistant's, found none")
    return faults
