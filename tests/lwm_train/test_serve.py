"""The server over real sockets, with a tiny model of random weights: OpenAI's shapes, batches, faults, its end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.prompt import chat_prompt, chat_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_train import batching
from lwm_train.batching import Batcher
from lwm_train.chat_protocol import Message, Question, Refusal, ServedModel, chat_ids, read_question
from lwm_train.config import ModelConfig, ModelSpec
from lwm_train.generate import Watch, generate
from lwm_train.http_server import Server
from lwm_train.model import Params, init_params

CONTEXT = 200
CHAT, PLAIN = "/chat/completions", "/completions"


@pytest.fixture(autouse=True, scope="module")
def pieces_of_four_tokens() -> Iterator[None]:
    """Many pieces of short answers, for which few shapes are compiled: up to 32 tokens in all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lwm_train.generate.WATCH_EVERY", 4)
        yield


@pytest.fixture(scope="module")
def served(demo_tokenizer: TextTokenizer) -> ServedModel:
    return ServedModel("tiny", demo_tokenizer, step=3, context=CONTEXT, max_tokens=60)


@pytest.fixture(scope="module")
def model(served: ServedModel) -> tuple[Params, ModelConfig]:
    config = ModelSpec(preset="tiny").config(served.tokenizer.vocab_size)
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(5)), config


@contextlib.contextmanager
def running(
    served: ServedModel, model: tuple[Params, ModelConfig], eos: int | None = None, max_waiting: int = 32
) -> Iterator[Server]:
    server = Server("127.0.0.1", 0)
    params, config = model
    eos = served.tokenizer.eos if eos is None else eos
    server.start(served, Batcher(params, config, eos, max_batch=8, max_waiting=max_waiting))
    try:
        yield server
    finally:
        assert server.stopping or server.stop(grace=0)


@pytest.fixture(scope="module")
def server(served: ServedModel, model: tuple[Params, ModelConfig]) -> Iterator[Server]:
    with running(served, model) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened


def chat(words: str, **keys: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": 20, "seed": 1} | keys


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end in [DONE]."""
    assert response.headers["content-type"] == "text/event-stream"
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


def test_a_chat_is_prompted_by_the_tokens_that_training_has(demo_tokenizer: TextTokenizer) -> None:
    turns = [("Who is it?", "A rabbit."), ("Where\nto?", "Down."), ("Why?", "It is late.")]
    for system in (None, "Speak as a queen."):
        said = [Message(role="system", content=system)] if system is not None else []
        for user, assistant in turns:
            said += [Message(role="user", content=user), Message(role="assistant", content=assistant)]
        runs = chat_runs(demo_tokenizer, turns, *([system] if system is not None else []))
        whole = np.concatenate([run.tokens for run in runs]).tolist()
        num_answer = len(demo_tokenizer.encode(turns[-1][1])) + 1
        assert chat_ids(demo_tokenizer, said[:-1]) == whole[:-num_answer]
    assert chat_ids(demo_tokenizer, [Message(role="user", content="Hello")]) == chat_prompt(demo_tokenizer, "Hello")


def test_parts_of_a_message_are_one_text(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    body = chat("", temperature=0) | {"messages": [{"role": "user", "content": parts}]}
    assert text_of(client.post(CHAT, json=body)) == text_of(client.post(CHAT, json=chat("Who is it?", temperature=0)))


def test_the_model_is_listed(client: httpx.Client) -> None:
    listed = client.get("/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert client.get("/models/tiny").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == CONTEXT
    assert client.get("/models/other").status_code == 404
    assert client.get(str(client.base_url).replace("/v1/", "/health")).json()["status"] == "ok"


def test_an_answer_has_openais_shape_and_the_models_own_text(
    client: httpx.Client, served: ServedModel, model: tuple[Params, ModelConfig]
) -> None:
    said = client.post(CHAT, json=chat("Who is it?", temperature=0)).json()
    ids = chat_prompt(served.tokenizer, "Who is it?")
    (wanted,) = generate(*model, [ids], 20, temperature=0, seed=0, eos=served.tokenizer.eos)
    assert (said["object"], said["model"], said["id"][:9]) == ("chat.completion", "tiny", "chatcmpl-")
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": served.tokenizer.decode(np.array(wanted, np.int32))}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert said["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 20, "total_tokens": len(ids) + 20}


def test_a_completion_goes_on_with_the_prompts_text(
    client: httpx.Client, served: ServedModel, model: tuple[Params, ModelConfig]
) -> None:
    body = {"model": "tiny", "prompt": "Down the", "max_tokens": 20, "temperature": 1.0, "seed": 6}
    said = client.post(PLAIN, json=body).json()
    ids = [served.tokenizer.bos, *served.tokenizer.encode("Down the").tolist()]
    (new,) = generate(*model, [ids], 20, temperature=1.0, seed=6, eos=served.tokenizer.eos)
    assert "Down the" + said["choices"][0]["text"] == served.tokenizer.decode(np.array(ids[1:] + new, np.int32))
    assert said["object"] == "text_completion"
    assert text_of(client.post(PLAIN, json=body | {"prompt": ""})) is not None


def test_sixteen_at_once_are_answered_together_and_as_one_by_one(
    client: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []

    def counting(params: Params, config: ModelConfig, prompts: Any, draws: Any, **keys: Any) -> Any:
        together.append(len(prompts))
        time.sleep(0.05)  # while the others come
        return generate_drawn(params, config, prompts, draws, **keys)

    generate_drawn = batching.generate_drawn
    monkeypatch.setattr(batching, "generate_drawn", counting)
    bodies = [
        chat("Why? " * (1 + i % 3), temperature=(0, 0.7, 1.5)[i % 3], seed=i % 5, max_tokens=(9, 20, 32)[i % 2])
        for i in range(16)
    ]
    alone = [text_of(client.post(CHAT, json=body)) for body in bodies]
    assert together == [1] * 16
    together.clear()
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=server.url, timeout=60) as shared:
        assert list(pool.map(lambda body: text_of(shared.post(CHAT, json=body)), bodies)) == alone
    assert sum(together) == 16
    assert 1 < max(together) <= 8
    assert len(set(alone)) > 6


def test_a_stream_has_the_same_text_in_pieces(client: httpx.Client) -> None:
    for seed in range(4):  # of random weights, so pieces end within characters of several bytes
        body = chat("Who is it?", temperature=2, seed=seed, max_tokens=32)
        whole = client.post(CHAT, json=body).json()
        chunks = events_of(client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        assert deltas[0]["role"] == "assistant"
        assert deltas[-1] == {}
        assert len(deltas) > 4
        assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + [whole["choices"][0]["finish_reason"]]
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
        assert len({(chunk["id"], chunk["object"]) for chunk in chunks}) == 1


def test_text_ends_before_the_first_stop_string(client: httpx.Client) -> None:
    body = chat("Who is it?", temperature=1, seed=3, max_tokens=32)
    whole = client.post(CHAT, json=body).json()
    text = whole["choices"][0]["message"]["content"]
    for at in (1, len(text) // 2, len(text) - 4):
        stops = [text[at : at + 4], "no such text"]
        asked = body | {"stop": stops}
        said = client.post(CHAT, json=asked).json()
        assert said["choices"][0]["message"]["content"] == text[: text.index(stops[0])]
        assert said["choices"][0]["finish_reason"] == "stop"
        assert 0 < said["usage"]["completion_tokens"] <= whole["usage"]["completion_tokens"]
        chunks = events_of(client.post(CHAT, json=asked | {"stream": True}))
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(pieces) == text[: text.index(stops[0])]


def test_eos_ends_an_answer_and_is_no_part_of_it(
    client: httpx.Client, served: ServedModel, model: tuple[Params, ModelConfig]
) -> None:
    ids = chat_prompt(served.tokenizer, "Who is it?")
    (free,) = generate(*model, [ids], 20, temperature=1.0, seed=1, eos=served.tokenizer.eos)
    eos = free[17]
    with running(served, model, eos=eos) as other:
        said = httpx.post(other.url + CHAT, json=chat("Who is it?", temperature=1.0), timeout=60).json()
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["completion_tokens"] == free.index(eos)


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "gpt"}, 404, "model_not_found", "model"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 61}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, 400, "invalid_value", "max_tokens"),
        ({"seed": 2**70}, 400, "invalid_value", "seed"),
        ({"stop": ["a"] * 17}, 400, "invalid_value", None),
        ({"stop": ""}, 400, "invalid_value", "stop"),
        ({"stream": "yes"}, 400, "invalid_value", "stream"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value", None),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "context_length_exceeded", "messages"),
        ({"max_completion_tokens": 60, "messages": [{"role": "user", "content": "word " * 150}]}, 400,
         "context_length_exceeded", "messages"),
        ({"top_p": 0.9}, 400, "unsupported", "top_p"),
        ({"n": 2}, 400, "unsupported", "n"),
        ({"logprobs": True}, 400, "unsupported", "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported", "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "unsupported", "response_format"),
        ({"temprature": 1}, 400, "unknown_parameter", "temprature"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_openais_error(
    client: httpx.Client, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    said = client.post(CHAT, json=chat("Who?") | changes)
    error = said.json()["error"]
    assert (said.status_code, error["code"]) == (status, code), error
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert error["message"]


def test_values_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    nothing: dict[str, Any] = {"top_p": 1, "n": 1, "logprobs": False, "frequency_penalty": 0, "tools": [], "user": "me"}
    nothing |= {
        "stop": None,
        "stream": False,
        "temperature": 0,
        "logit_bias": None,
        "response_format": {"type": "text"},
    }
    assert text_of(client.post(CHAT, json=chat("Who?", **nothing))) == text_of(
        client.post(CHAT, json=chat("Who?", temperature=0))
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=5) | st.just("tiny"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "user", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ["model", "messages", "prompt", "stop", "seed", "max_tokens", "temperature", "stream_options", "n", "tools"]


@given(keys=st.dictionaries(st.sampled_from(KEYS), JSON), is_chat=st.booleans())
def test_any_json_is_a_question_or_a_refusal(served: ServedModel, keys: dict[str, Any], is_chat: bool) -> None:
    body = (chat("Who?") if is_chat else {"model": "tiny", "prompt": "x"}) | keys
    try:
        assert isinstance(read_question(json.dumps(body).encode(), is_chat, served), Question)
    except Refusal as refusal:
        assert refusal.status in (400, 404)
        json.dumps(refusal.described()).encode()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 3\r\n\r\n{x}", 400),
        (HEAD + b'Content-Length: 2\r\n\r\n""', 400),
        (HEAD + b"Content-Length: 4\r\n\r\n\xff\xfe\xfd\xfc", 400),
        (HEAD + b'Content-Length: 8\r\n\r\n"\\ud800"', 400),
        (HEAD + b"Content-Length: 90000\r\n\r\n" + b"[" * 90000, 400),
        (HEAD + b"Content-Length: 90000\r\n\r\n" + b"9" * 90000, 400),
        (HEAD + b"\r\n", 411),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
        (HEAD + b"Content-Length: 9000000\r\n\r\n" + b"x" * 9_000_000, 413),
        (HEAD + b"Content-Length: 5\r\n\r\n{", None),  # and the client leaves
        (HEAD + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"BREW /pot HTTP/1.1\r\n\r\n", 501),
        (b"GET /v1/chat/completions HTTP/1.1\r\n\r\n", 405),
        (b"POST /v1/models HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", 404),
    ],
)  # fmt: skip
def test_no_request_however_wrong_harms_the_server(
    server: Server, client: httpx.Client, data: bytes, status: int | None
) -> None:
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while block := connection.recv(65536):
            got += block
    head, _, body = got.partition(b"\r\n\r\n")
    if status is None:
        assert got == b""
    else:
        assert int(head.split()[1]) == status, got
        assert json.loads(body)["error"]["message"]
    assert client.get("/models").status_code == 200


def test_one_connection_carries_several_requests_and_http_1_0_streams(server: Server, client: httpx.Client) -> None:
    body = json.dumps(chat("Who?", stream=True)).encode()
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        for _ in range(2):
            connection.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n")
            got = b""
            while not got.endswith(b"}]}"):
                got += connection.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")
        connection.sendall(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        got = b""
        while block := connection.recv(65536):
            got += block
    assert b"chunked" not in got
    assert got.endswith(b"data: [DONE]\n\n")


Slow = Callable[[float], list[int]]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """slow(seconds): each look of the watch takes so long; returns the number of tokens at each."""
    generate_drawn = batching.generate_drawn

    def make(seconds: float) -> list[int]:
        seen: list[int] = []

        def slower(*args: Any, watch: Watch, **keys: Any) -> Any:
            def look(number: int, ids: list[int], finished: bool) -> bool:
                seen.append(len(ids))
                time.sleep(seconds)
                return watch(number, ids, finished)

            return generate_drawn(*args, watch=look, **keys)

        monkeypatch.setattr(batching, "generate_drawn", slower)
        return seen

    return make


def test_beyond_the_queue_requests_are_told_when_to_come_back(
    served: ServedModel, model: tuple[Params, ModelConfig], slow: Slow
) -> None:
    slow(0.05)
    with running(served, model, max_waiting=2) as small, ThreadPoolExecutor(20) as pool:
        said = list(pool.map(lambda i: httpx.post(small.url + CHAT, json=chat("Who?"), timeout=60), range(20)))
    refused = [response for response in said if response.status_code != 200]
    assert {response.status_code for response in refused} == {429}
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert {response.json()["error"]["type"] for response in refused} == {"rate_limit_error"}
    assert 1 <= len(said) - len(refused) < 20


def test_who_leaves_is_not_written_for(server: Server, client: httpx.Client, slow: Slow) -> None:
    seen = slow(0.1)
    body = chat("Who is it?", temperature=2, max_tokens=32, stream=True)
    for seed in range(3):
        body["seed"] = seed
        with client.stream("POST", CHAT, json=body) as response:
            next(response.iter_lines())
        while server.num_busy:
            time.sleep(0.01)
    assert seen.count(32) < 3
    seen.clear()
    assert text_of(client.post(CHAT, json=chat("Who?", temperature=0)))
    assert seen == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_cuts_off_what_runs_and_answers_who_waits(
    served: ServedModel, model: tuple[Params, ModelConfig], slow: Slow, stream: bool
) -> None:
    seen = slow(0.2)
    with running(served, model) as ending, ThreadPoolExecutor(2) as pool:
        runs = pool.submit(
            httpx.post, ending.url + CHAT, json=chat("Who?", max_tokens=32, temperature=2, stream=stream), timeout=60
        )
        while len(seen) < 2:  # the first piece is sent
            time.sleep(0.01)
        waits = pool.submit(httpx.post, ending.url + CHAT, json=chat("Why?"), timeout=60)
        while not ending.batcher.num_waiting():
            time.sleep(0.01)
        assert ending.stop(grace=0)
        error = {
            "message": "the server is shutting down",
            "type": "server_error",
            "param": None,
            "code": "shutting_down",
        }
        assert (waits.result().status_code, waits.result().json()["error"]) == (503, error)
        if stream:
            *_, last, end = runs.result().text.split("\n\n")
            assert (json.loads(last.removeprefix("data: "))["error"], end) == (error, "")
        else:
            assert (runs.result().status_code, runs.result().json()["error"]) == (503, error)
        with pytest.raises(httpx.ConnectError):
            httpx.get(ending.url + "/models")


def test_a_batch_that_fails_is_told_and_the_next_one_is_answered(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate_drawn = batching.generate_drawn

    def failing(*args: Any, **keys: Any) -> Any:
        monkeypatch.setattr(batching, "generate_drawn", generate_drawn)
        raise MemoryError("a secret of a prompt")

    monkeypatch.setattr(batching, "generate_drawn", failing)
    said = client.post(CHAT, json=chat("Who?"))
    assert (said.status_code, said.json()["error"]["type"]) == (500, "server_error")
    assert text_of(client.post(CHAT, json=chat("Who?")))
    told = capfd.readouterr().err
    assert "MemoryError" in told
    assert "secret" not in told + said.text


def test_the_log_has_a_line_a_request_and_no_word_of_it(
    client: httpx.Client, served: ServedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    text_of(client.post(CHAT, json=chat("Shibboleth")))
    client.post(CHAT, json=chat("Shibboleth", top_p=0.5))
    client.get("/Shibboleth?Shibboleth")
    deadline = time.monotonic() + 10
    told = ""
    while told.count("\n") < 3 and time.monotonic() < deadline:
        told += capfd.readouterr().err
    lines = [line for line in told.splitlines() if not line.startswith("generate:")]
    num_prompt = len(chat_prompt(served.tokenizer, "Shibboleth"))
    assert lines[0].startswith(f"POST /v1/chat/completions 200 {num_prompt} + 20 tokens ")
    assert lines[1].startswith("POST /v1/chat/completions 400 ")
    assert lines[2].startswith("GET (another path) 404 ")
    assert "Shibboleth" not in told


def test_threads_end_with_their_server(served: ServedModel, model: tuple[Params, ModelConfig]) -> None:
    before = set(threading.enumerate())
    with running(served, model) as other:
        httpx.get(other.url + "/models")
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
