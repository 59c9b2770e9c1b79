"""What OpenAI's chat/completions and completions ask, as far as the model can.

    {"model": ..., "messages": [...], "max_tokens": 9}  ->  Question: ids of the prompt, draw, stop strings
    {"top_p": 0.9, ...}                                 ->  Refusal: a status and OpenAI's error object

A field that would change the answer and that we cannot serve is refused, never passed over.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lwm_data.format.prompt import SYSTEM, chat_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_train.generate import Draw

# Fields that ask for what is not there, and their values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1,), "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",), "echo": (False,),
    "suffix": ("",), "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (),
    "verbosity": (), "web_search_options": (),
}  # fmt: skip
CHANGE_NOTHING = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


class Refusal(Exception):
    """A request that is not answered: the status, and what OpenAI's error object says."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def described(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else "")
        return {
            "error": {
                "message": str(self),
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(_Model):
    type: Literal["text"]
    text: str


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # an answer here is sent in few pieces, whose lengths tell little


class _Request(_Model):
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class _ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class _CompletionRequest(_Request):
    prompt: str


@dataclass(frozen=True)
class ServedModel:
    """What is served. context: tokens of prompt and answer; max_tokens: of an answer, and where none are asked for."""

    name: str
    tokenizer: TextTokenizer
    step: int
    context: int
    max_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    encoding: threading.Lock = field(default_factory=threading.Lock)  # a long text takes 60 times its bytes for a while

    def described(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lwm",
            "max_model_len": self.context,
        }


@dataclass(frozen=True)
class Question:
    """What is asked. before: the prompt's last text id, where the answer goes on with its text."""

    prompt: list[int]
    draw: Draw
    stop: tuple[str, ...]
    is_chat: bool
    stream: bool
    include_usage: bool
    before: int | None


def read_question(body: bytes, is_chat: bool, served: ServedModel) -> Question:
    """The question that `body` asks. Refusal where it cannot be answered."""
    request = _request(body, _ChatRequest if is_chat else _CompletionRequest)
    if request.model != served.name:
        raise Refusal(404, "model_not_found", f"model: no such model here; this server has {served.name!r}", "model")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if "" in stop:
        raise Refusal(400, "invalid_value", "stop: an empty string", "stop")
    with served.encoding:
        if isinstance(request, _ChatRequest):
            prompt = chat_ids(served.tokenizer, request.messages)
            asked = request.max_completion_tokens or request.max_tokens
            before = None
        else:
            assert isinstance(request, _CompletionRequest)
            prompt = [served.tokenizer.bos, *served.tokenizer.encode(request.prompt).tolist()]
            asked = request.max_tokens
            before = prompt[-1] if len(prompt) > 1 else None
    num_tokens = _num_tokens(len(prompt), asked, served)
    seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
    temperature = 1.0 if request.temperature is None else request.temperature
    usage = request.stream_options is not None and bool(request.stream_options.include_usage)
    return Question(prompt, Draw(num_tokens, temperature, seed), stop, is_chat, bool(request.stream), usage, before)


def chat_ids(tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of the chat as training has them, BOS included, up to where the assistant's answer begins."""
    num_system = next((i for i, message in enumerate(messages) if message.role in ("user", "assistant")), len(messages))
    system = "\n".join(message.text for message in messages[:num_system]) if num_system else SYSTEM
    spoken = messages[num_system:]
    if len(spoken) % 2 == 0 or any(m.role != ("user", "assistant")[i % 2] for i, m in enumerate(spoken)):
        raise Refusal(
            400,
            "invalid_value",
            "messages: wanted system messages (or none), then user and assistant in turn, a user's last",
            "messages",
        )
    texts = [*(message.text for message in spoken), ""]
    runs = chat_runs(tokenizer, list(zip(texts[::2], texts[1::2], strict=True)), system)
    return [int(i) for i in np.concatenate([run.tokens for run in runs[:-1]])]  # without the EOS of the empty answer


def _request(body: bytes, kind: type[_ChatRequest | _CompletionRequest]) -> _ChatRequest | _CompletionRequest:
    try:
        said = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(said, dict):
        raise Refusal(400, "invalid_json", "the body: wanted a JSON object")
    for name, neutral in UNSUPPORTED.items():
        value = said.pop(name, None)
        same = [other for other in neutral if value == other and isinstance(value, bool) == isinstance(other, bool)]
        if value is not None and not same:
            remedy = f"leave it out, or say {neutral[0]!r}" if neutral else "leave it out"
            raise Refusal(400, "unsupported", f"{name}: unsupported by this server; {remedy}", name)
    for name in CHANGE_NOTHING:
        said.pop(name, None)
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        unknown = first["type"] == "extra_forbidden"
        code = "unknown_parameter" if unknown else "invalid_value"
        raise Refusal(400, code, f"{where}: {'unknown' if unknown else first['msg']}", where) from None


def _num_tokens(num_prompt: int, asked: int | None, served: ServedModel) -> int:
    """Tokens that the answer may have."""
    if asked is not None and asked > served.max_tokens:
        message = f"max_tokens: got {asked:,}; this server writes at most {served.max_tokens:,}"
        raise Refusal(400, "invalid_value", message, "max_tokens")
    if num_prompt + (asked or 1) > served.context:
        raise Refusal(
            400,
            "context_length_exceeded",
            f"a prompt of {num_prompt:,} tokens, and {asked or 1:,} to write; the model's longest row has "
            f"{served.context:,} tokens: send less, or ask for less",
            "messages",
        )
    return asked if asked is not None else min(served.max_tokens, served.context - num_prompt)
