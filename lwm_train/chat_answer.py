"""What OpenAI's chat/completions and completions answer.

ids so far -> AnswerText: text up to a stop string, finish_reason; a piece is told when no later token can change it
           -> AnswerForm: one object, or the chunks of a stream

chunks   role   pieces of text ...   finish_reason   usage, where it is asked for
"""

from __future__ import annotations

import secrets
import time
from bisect import bisect_left
from typing import Any, Literal

import numpy as np

from lwm_data.format.vocab import TextTokenizer
from lwm_train.chat_protocol import Question, ServedModel


class AnswerText:
    """The text of an answer, as its tokens come."""

    def __init__(self, tokenizer: TextTokenizer, question: Question) -> None:
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer, self._question = tokenizer, question

    def add(self, ids: list[int], finished: bool) -> str:
        """What is new in the text of `ids`, all tokens so far. Nothing more comes once there is a finish_reason."""
        text, sent = self._decoded(ids), len(self.text)
        places = [place for stop in self._question.stop if (place := text.find(stop)) >= 0]
        self.num_tokens = len(ids)
        if places:
            text, self.finish_reason = text[: min(places)], "stop"
            self.num_tokens = bisect_left(range(len(ids)), True, key=lambda n: self._has_stop(ids[:n]))
        elif finished:
            self.finish_reason = "stop" if len(ids) < self._question.draw.num_tokens else "length"
        else:  # a later token may complete a character, or a stop string
            held = max(map(len, self._question.stop), default=1) - 1
            text = text[: max(0, len(text) - held)].rstrip("\ufffd")
        self.text = text if len(text) > sent else self.text
        return text[sent:]

    def usage(self) -> dict[str, int]:
        read = len(self._question.prompt)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.num_tokens,
            "total_tokens": read + self.num_tokens,
        }

    def _has_stop(self, ids: list[int]) -> bool:
        text = self._decoded(ids)
        return any(stop in text for stop in self._question.stop)

    def _decoded(self, ids: list[int]) -> str:
        before = [] if self._question.before is None else [self._question.before]  # so that a blank after it is kept
        decode = self._tokenizer.decode
        return decode(np.array(before + ids, np.int32))[len(decode(np.array(before, np.int32))) :]


class AnswerForm:
    """The objects of one answer; they share its id and time."""

    def __init__(self, served: ServedModel, question: Question) -> None:
        self._chat = question.is_chat
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"step-{served.step}",
        }

    def whole(self, answer: AnswerText) -> dict[str, Any]:
        """The answer in one object."""
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": answer.text}} if self._chat else {"text": answer.text}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": [choice], "usage": answer.usage()}

    def chunk(self, text: str, finish_reason: str | None = None, role: bool = False) -> dict[str, Any]:
        """One piece of a stream; of a chat the first has the role, and the last nothing but a finish_reason."""
        delta = ({"role": "assistant"} if role else {}) | ({} if finish_reason else {"content": text})
        said: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}])

    def usage_chunk(self, answer: AnswerText) -> dict[str, Any]:
        return self._chunk([]) | {"usage": answer.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": choices,
        }
