"""A model behind a URL: one question, one answer, whatever happens between.

ask -> pause? -> budget? -> POST {url}/chat/completions -> 200  Answer
         ^                                                 429, 5xx, timeout, cut stream, empty answer: wait, again
         |------------------ at most `attempts` times -----|
                                                           401, 403, 404, 402, no quota: RunFailed, at once
                                                           another 4xx: Failed, this chunk alone

The key stands in one header, and in no message: whatever a server says is searched for it, as it is and as JSON may
spell it, before it is kept. Of an answer only a key of SHORT_KEY characters or more is taken out: `EMPTY` is a word.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from types import TracebackType
from typing import Any

import aiohttp

from lwm_data.manifest_qa import Endpoint, Parameters
from lwm_data.qa.answers import SCHEMA
from lwm_data.qa.limits import Pause, backoff, exhausted, retry_after
from lwm_data.qa.prompts import Messages
from lwm_data.qa.spending import Spending
from lwm_data.terminal import RunFailed

MAX_RESPONSE = 8 << 20  # bytes
SHARE_OF_429 = 0.05  # of an attempt: who asks too often among many has not failed, but must not ask for ever
MAX_ERROR = 1 << 14  # bytes of what a server says of an error
TOLD = 300  # characters of it that a message holds
ESCAPED = 9  # characters of which JSON in JSON makes one, at most
SHORT_KEY = 8  # characters; a shorter one is hidden in errors alone
MAX_TOKENS = 1 << 40  # of one answer; a server that tells of more tells nothing
CONNECTS = 3  # attempts while no server was ever there
REMEDIES = {
    401: "the key is wrong or missing; name the environment variable that holds it in endpoint.key_env",
    402: "the account has no credit left",
    403: "the key may not use this model",
    404: "no such model, or no such API there; {url}/models lists the models, and endpoint.url mostly ends in /v1",
    405: "no chat/completions there; endpoint.url mostly ends in /v1",
}
PASSING = (408, 409, 425)  # 4xx that a later attempt may not meet
OF_SCHEMAS = ("response_format", "json_schema", "guided", "grammar", "not implemented", "not support", "unsupported")


@dataclass(frozen=True)
class Answer:
    """What a model wrote, why it ended (`stop`, `length`, ...), and the tokens it read and wrote."""

    text: str
    finish_reason: str
    usage: dict[str, int]
    attempts: int
    structured: bool


@dataclass(frozen=True)
class Failed:
    """No answer. reason: one of few, to be counted; detail: for the person; raw: what came instead."""

    reason: str
    detail: str
    raw: str
    attempts: int


class OutOfBudget(Exception):
    """The budget allows no further request."""


@dataclass(frozen=True)
class _Again:
    reason: str
    detail: str
    wait: float | None = None  # seconds; None: as backoff says
    for_all: bool = False  # the wait holds for every request
    share: float = 1.0  # of one of the attempts that a chunk has


_Found = Answer | Failed | _Again


class EndpointClient:
    """An endpoint with its connections; an async context manager. ValueError where `key_env` names nothing.

    count: tokens of a text. tell: called, now and then, with the seconds for which the server still wants no request.
    """

    def __init__(
        self, endpoint: Endpoint, spending: Spending, count: Callable[[str], int], tell: Callable[[float], None]
    ) -> None:
        self.endpoint, self.spending, self._count = endpoint, spending, count
        self.structured: bool | None = {"auto": None, "always": True, "never": False}[endpoint.structured]
        self._probe = asyncio.Lock()  # the first request finds out whether the server knows schemas
        self._key = _key(endpoint.key_env)
        self._spelled_key = _spelled(self._key)
        self._pause, self._draw = Pause(tell), random.Random()
        self._was_there = False

    async def __aenter__(self) -> EndpointClient:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.endpoint.concurrency),
            timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout),
            headers=headers,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        await self._session.close()

    async def ask(self, messages: Messages, parameters: Parameters, wants_pairs: bool) -> Answer | Failed:
        """What the model says to `messages`. OutOfBudget where none may be asked; RunFailed where no other can be."""
        if not wants_pairs or self.structured is not None:
            return await self._ask(messages, parameters, wants_pairs and bool(self.structured))
        async with self._probe:
            if self.structured is None:
                found = await self._ask(messages, parameters, structured=True)
                if isinstance(found, Answer):
                    self.structured = True
                elif found.reason == "refused":  # by the chunk's fault or the schema's
                    found = await self._ask(messages, parameters, structured=False)
                    self.structured = False if isinstance(found, Answer) else None
                return found
        return await self._ask(messages, parameters, self.structured)

    async def _ask(self, messages: Messages, parameters: Parameters, structured: bool) -> Answer | Failed:
        body = self._body(messages, parameters, structured)
        spent = 0.0  # of endpoint.attempts
        for attempt in itertools.count(1):
            await self._pause.wait()
            if not self.spending.allows_another():
                raise OutOfBudget
            self.spending.take()
            try:
                found = self._read(*await self._post(body), schema_unknown=structured and self.structured is None)
            except (aiohttp.ClientError, ValueError, RecursionError, OSError) as error:
                found = self._broken(error)
            finally:
                self.spending.in_flight -= 1
            if isinstance(found, Answer):
                usage = found.usage or self._estimate(messages, found.text)
                return replace(found, usage=usage, attempts=attempt, structured=structured)
            if isinstance(found, Failed):
                return replace(found, attempts=attempt)
            if not self._was_there and attempt >= CONNECTS:
                remedy = "start the server, or name another"
                if found.reason == "timeout":
                    remedy = "raise it where the server is slow (it may be loading its model), or name another"
                raise RunFailed(f"endpoint.url: got {self.endpoint.url}: {found.detail}; {remedy}")
            spent += found.share
            if spent >= self.endpoint.attempts:
                return Failed(found.reason, f"{found.detail} (request {attempt}, the last)", "", attempt)
            self.spending.retries[found.reason] += 1
            wait = found.wait if found.wait is not None else backoff(attempt, self.endpoint.max_wait, self._draw)
            if found.for_all:
                self._pause.extend(wait)
            else:
                await asyncio.sleep(wait)
        raise AssertionError

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        url = f"{self.endpoint.url}/chat/completions"
        async with self._session.post(url, data=body, allow_redirects=False) as response:
            data = bytearray()
            async for block in response.content.iter_any():
                data += block
                if len(data) > MAX_RESPONSE:
                    raise ValueError(f"an answer of more than {MAX_RESPONSE:,} bytes")
            return response.status, response.headers, bytes(data)

    def _body(self, messages: Messages, parameters: Parameters, structured: bool) -> bytes:
        said = parameters.model_dump(exclude_none=True, exclude={"extra"})
        body = {"model": self.endpoint.model, "messages": messages, "stream": False} | said | parameters.extra
        if structured:
            schema = {"name": "pairs", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return json.dumps(body, ensure_ascii=False).encode()

    def _read(self, status: int, headers: Mapping[str, str], data: bytes, schema_unknown: bool) -> _Found:
        """What a response means."""
        self._was_there = True
        usual = sum(self.spending.usual_tokens())
        if status == HTTPStatus.OK:
            if (wait := exhausted(headers, usual)) is not None:
                self._pause.extend(wait)
            return self._answer(data)
        border = ESCAPED * len(self._key)
        told = self._hide(data[: MAX_ERROR + border].decode("utf-8", "replace"))
        if border and len(data) > MAX_ERROR + border:
            told = told[:-border]  # so that no key is cut in two and kept
        told = " ".join(told[:MAX_ERROR].split())
        said = f"{status} {told[:TOLD]}".strip()
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            if "insufficient_quota" in told:
                raise RunFailed(f"{self.endpoint.url}: {said}; {REMEDIES[402]}")
            wait = retry_after(headers, time.time()) or exhausted(headers, usual)
            return _Again("429 too many requests", said, wait, for_all=wait is not None, share=SHARE_OF_429)
        if schema_unknown and status >= 500 and any(word in told.lower() for word in OF_SCHEMAS):
            return Failed("refused", said, told, 0)
        if status in REMEDIES or 300 <= status < 400:
            remedy = REMEDIES.get(status, "it has moved; name the new address in endpoint.url")
            raise RunFailed(f"{self.endpoint.url}: {said}; {remedy.format(url=self.endpoint.url)}")
        if status in PASSING or status >= 500:
            wait = retry_after(headers, time.time()) or None
            return _Again(f"{status // 100}xx", said, wait, for_all=wait is not None)
        return Failed("refused", said, told, 0)

    def _answer(self, data: bytes) -> Answer | _Again:
        response = json.loads(data)
        try:
            choice = response["choices"][0]
            text = choice["message"]["content"]
            if not (text is None or isinstance(text, str)):
                raise TypeError("content: no text")
            usage = _usage(response)
            finish_reason = self._hide(str(choice.get("finish_reason") or ""))[:TOLD]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            return _Again("broken answer", f"no chat completion ({type(error).__name__}: {error})")
        if usage:
            self.spending.charge(usage["prompt_tokens"], usage["completion_tokens"])
        if not text or not text.strip():
            return _Again("empty answer", f"an empty answer (finish_reason {finish_reason or 'not given'})")
        return Answer(self._hide(text, SHORT_KEY), finish_reason, usage, 0, False)

    def _estimate(self, messages: Messages, text: str) -> dict[str, int]:
        read, written = sum(self._count(message["content"]) for message in messages), self._count(text)
        self.spending.charge(read, written)
        return usage_of(read, written, estimated=True)

    def _broken(self, error: Exception) -> _Again:
        if isinstance(error, aiohttp.ClientSSLError):
            raise RunFailed(
                f"endpoint.url: got {self.endpoint.url}: {self._hide(str(error))[:TOLD]}; its certificate is not "
                "trusted: name the host that the certificate is for, or add its authority (SSL_CERT_FILE)"
            ) from None
        if isinstance(error, TimeoutError):
            return _Again("timeout", f"no answer within {self.endpoint.timeout:g} s (endpoint.timeout)")
        told = self._hide(f"{type(error).__name__}: {error}")[:TOLD]
        if isinstance(error, aiohttp.ClientConnectorError):
            return _Again("no connection", told)
        return _Again("broken answer" if isinstance(error, ValueError) else "broken connection", told)

    def _hide(self, text: str, shortest: int = 1) -> str:
        """`text` without a key of at least so many characters, and without halves of surrogate pairs, which JSON can
        spell and UTF-8 cannot."""
        text = text.encode("utf-8", "replace").decode()
        return self._spelled_key.sub("[key]", text) if len(self._key) >= shortest else text


def usage_of(read: int, written: int, estimated: bool = False) -> dict[str, int]:
    """What a pair's `usage` says. estimated: counted by the manifest's tokenizer, as the server told nothing."""
    return {"prompt_tokens": read, "completion_tokens": written, "estimated": estimated}


def _usage(response: Any) -> dict[str, int]:
    """The tokens read and written, as the server counts them; nothing where it does not tell both."""
    told = response.get("usage")
    if not isinstance(told, dict):
        return {}
    read, written = told.get("prompt_tokens"), told.get("completion_tokens")
    if not isinstance(read, int) or not isinstance(written, int):
        return {}
    if min(read, written) < 0 or max(read, written) > MAX_TOKENS:
        return {}
    return usage_of(int(read), int(written))


def _spelled(key: str) -> re.Pattern[str]:
    r"""`key`, also with what JSON, and JSON in JSON, puts in it: `\/`, `\"`, `\u002f`."""
    return re.compile("".join(rf"(?:\\{{0,3}}{re.escape(of)}|\\{{1,3}}u(?i:{ord(of):04x}))" for of in key))


def _key(name: str | None) -> str:
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        got = "an unset or empty variable" if not key else "a value with characters that no key has"
        raise ValueError(f"endpoint.key_env: got {name}: {got}; wanted the key there: export {name}=...")
    return key
