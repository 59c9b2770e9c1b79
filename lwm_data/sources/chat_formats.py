"""Chats as others write them, told by their keys, made turns of user and assistant.

UltraChat   {"data": ["Hello!", "Good day.", ...]}
ShareGPT    {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good day."}, ...]}
OpenAI      {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}, ...]}

Roles must alternate, user first. A system message may stand before them. In ShareGPT's dumps a chat may begin in the
middle, with the assistant, or end with a question: such a turn is left out, and that is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lwm_data.sources.json_lines import holds_half_a_pair

FORMATS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # key -> keys of a turn
FIELDS = ("data", *FORMATS, "system")
SPEAKERS = (
    dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
    | dict.fromkeys(("system", "developer"), "system")
)
TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation")


class NotAChat(Exception):
    """What an object is that is no chat: a reason, one of few, and the detail."""


@dataclass(frozen=True)
class Chat:
    """turns: of user and assistant. system: the words before the first turn. left_out: which turns are, as told."""

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    left_out: str = ""


def parse_chat(row: Any) -> Chat:
    """The chat that `row` is, in whichever of the formats. NotAChat."""
    if isinstance(row, dict):
        for name, keys in FORMATS.items():
            if isinstance(row.get(name), list):
                return _of_messages(row, name, *keys)
        if isinstance(row.get("data"), list):
            return _of_list(row["data"])
    raise NotAChat("not a chat", "wanted data: [user, assistant, ...], conversations or messages: [{role, words}, ...]")


def _of_list(data: list[Any]) -> Chat:
    if not data or len(data) % 2:
        raise NotAChat("not a chat", f"data: {len(data)} turns; wanted pairs of user and assistant")
    words = [_words(turn, f"data.{i}") for i, turn in enumerate(data)]
    return Chat(tuple(zip(words[::2], words[1::2], strict=True)))


def _of_messages(row: dict[str, Any], name: str, role_key: str, words_key: str) -> Chat:
    system = row.get("system")
    system = _words(system, "system") if system else None
    said: list[tuple[str, str]] = []
    for i, message in enumerate(row[name]):
        place = f"{name}.{i}"
        if not isinstance(message, dict):
            raise NotAChat("not a chat", f"{place}: got {type(message).__name__}; wanted {{{role_key}, {words_key}}}")
        role = message.get(role_key)
        if role in TOOLS or message.get("tool_calls") or message.get("function_call"):
            raise NotAChat("tool turn", f"{place}: {str(role)[:40]}; chats with tools are not taken")
        speaker = SPEAKERS.get(role) if isinstance(role, str) else None
        if speaker is None:
            raise NotAChat("unknown role", f"{place}.{role_key}: got {role!r:.60}; wanted user, assistant or system")
        if speaker == "assistant" and message.get("weight") not in (None, 1):
            detail = f"{place}.weight: got {message['weight']!r:.20}; the assistant's turns are all trained"
            raise NotAChat("turn not to be trained", detail)
        words = message.get(words_key)
        if speaker == "system":
            if said or system is not None:
                detail = f"{place}: a system message; wanted one, before the turns, or the field system"
                raise NotAChat("roles do not alternate", detail)
            system = _words(words, place) if words else system
            continue
        if said and said[-1][0] == speaker:
            raise NotAChat("roles do not alternate", f"{place}: {speaker} follows {speaker}")
        said.append((speaker, _words(words, f"{place}.{words_key}")))
    left_out = []
    if said and said[0][0] == "assistant":
        said.pop(0)
        left_out.append("the first turn, which is the assistant's")
    if said and said[-1][0] == "user":
        said.pop()
        left_out.append("the last turn, which has no answer")
    if not said:
        raise NotAChat("not a chat", f"{name}: no turn of a user that the assistant answers")
    turns = tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))
    return Chat(turns, system, " and ".join(left_out))


def _words(words: Any, place: str) -> str:
    """The words of a turn: a text, or a list of parts that are texts."""
    if isinstance(words, list):
        parts = []
        for i, part in enumerate(words):
            if isinstance(part, dict) and part.get("type", "text") != "text":
                kind = str(part["type"])[:40]
                raise NotAChat("not text", f"{place}.{i}: got a part of type {kind!r}; wanted text")
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise NotAChat("not a chat", f"{place}.{i}: got {type(text).__name__}; wanted a text")
            parts.append(text)
        words = "".join(parts)
    if words is None or (isinstance(words, str) and not words.strip()):
        raise NotAChat("empty turn", f"{place}: no words")
    if not isinstance(words, str):
        raise NotAChat("not a chat", f"{place}: got {type(words).__name__}; wanted the words of a turn")
    if holds_half_a_pair(words):
        raise NotAChat("not a chat", f"{place}: holds half of a surrogate pair")
    return words
