"""The messages of a conversation: code shared by the chat formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from higgs_ds.data.formats.checks import LAYOUT_TOKENS, Reading, check_keys, kind_of, shown, text_of
from higgs_ds.model.sample import ASSISTANT, AudioClip, Message

TEXT_KEYS = ("type", "text")
MESSAGE_KEYS = ("role", "content", "recipient")


@dataclass(frozen=True)
class Dialect:
    """How one format writes its messages: the roles, the keys of an audio part, and the reader of an audio part."""

    roles: tuple[str, ...]
    audio_keys: tuple[str, ...]
    clip_of: Callable[[dict[str, Any], str, Reading], AudioClip | None]
    forbidden: dict[str, tuple[str, ...]]  # tokens forbidden in a text, by role; LAYOUT_TOKENS for other roles


def messages_of(raw: Any, dialect: Dialect, reading: Reading, key: str = "messages") -> tuple[Message, ...]:
    """Return the messages under a key of a sample, one for each raw message, and report their faults."""
    if not isinstance(raw, list) or not raw:
        reading.report(key, f"must be a list of one or more messages, but is {kind_of(raw)}")
        return ()
    return tuple([_message(message, f"{key}[{i}]", dialect, reading) for i, message in enumerate(raw)])


def object_of(raw: Any, reading: Reading) -> dict[str, Any] | None:
    """Return a sample of a chat format if it is an object; else report it and return None."""
    if isinstance(raw, dict):
        return raw
    reading.report("sample", f"must be an object with 'messages', but is {kind_of(raw)}")
    return None


def role_of(raw: dict[str, Any], where: str, roles: tuple[str, ...], reading: Reading) -> str:
    role = raw.get("role")
    if role not in roles:
        reading.report(f"{where}.role", f"{shown(role)} is not a role; allowed: {', '.join(roles)}")
    return str(role) if role in roles else ""


def _message(raw: Any, where: str, dialect: Dialect, reading: Reading) -> Message:
    if not isinstance(raw, dict):
        reading.report(where, f"must be an object with 'role' and 'content', but is {kind_of(raw)}")
        return Message("", ())
    check_keys(raw, MESSAGE_KEYS, f"{where}.", reading)
    role = role_of(raw, where, dialect.roles, reading)
    content = raw.get("content")
    if content == []:
        reading.report(f"{where}.content", "is an empty list; add text or audio")
    if isinstance(content, list):
        parts = [_part(part, f"{where}.content[{i}]", role, dialect, reading) for i, part in enumerate(content)]
    else:
        parts = [_part(content, f"{where}.content", role, dialect, reading)]
    return Message(role, tuple([part for part in parts if part is not None]), _recipient(raw, where, role, reading))


def _recipient(raw: dict[str, Any], where: str, role: str, reading: Reading) -> str | None:
    recipient = raw.get("recipient")
    if recipient is None:
        return None
    if not isinstance(recipient, str) or role != ASSISTANT:
        what = f"must be a string in an assistant message, but is {shown(recipient)} in a {role!r} message"
        reading.report(f"{where}.recipient", what)
        return None
    return text_of(recipient, f"{where}.recipient", reading, allow_blank=True)


def _part(raw: Any, where: str, role: str, dialect: Dialect, reading: Reading) -> str | AudioClip | None:
    forbidden = dialect.forbidden.get(role, LAYOUT_TOKENS)
    if isinstance(raw, str):
        return text_of(raw, where, reading, forbidden)
    if not isinstance(raw, dict):
        reading.report(where, f"must be a string, an object with 'type', or a list of these, but is {kind_of(raw)}")
        return None
    kind = raw.get("type")
    if kind == "text":
        check_keys(raw, TEXT_KEYS, f"{where}.", reading)
        return text_of(raw.get("text"), f"{where}.text", reading, forbidden)
    if kind == "audio":
        check_keys(raw, dialect.audio_keys, f"{where}.", reading)
        return dialect.clip_of(raw, where, reading)
    reading.report(f"{where}.type", f"{shown(kind)} is not a content type; allowed: text, audio")
    return None
