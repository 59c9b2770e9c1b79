"""HTTP before a model: what OpenAI's clients ask, and one line on stderr for each request.

    GET  /health    GET /v1/models    GET /v1/models/NAME    POST /v1/chat/completions    POST /v1/completions

    connection, a thread each --> chat_protocol: question --> batching: ticket --> chat_answer: JSON, or events
                                       | Refusal                   | QueueFull, Stopping
                                       +-- 400 404 411 413 --------+-- 429, 503     as OpenAI's error object

The line has no word of what was said: POST /v1/chat/completions 200 1,034 + 128 tokens 2.31 s
"""

from __future__ import annotations

import json
import select
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty
from typing import Any

from lwm_train.batching import Batcher, GenerationFailed, QueueFull, Stopping, Ticket, Update
from lwm_train.chat_answer import AnswerForm, AnswerText
from lwm_train.chat_protocol import Refusal, ServedModel, read_question

MAX_BODY = 8 << 20  # bytes
MAX_CONNECTIONS = 512
IDLE = 60.0  # seconds without a byte, after which a connection is closed
GRACE = 3.0  # seconds that what runs is given when the server ends
LIMIT = 8.0  # seconds until the process ends whatever the model does
ASKING = ("/v1/chat/completions", "/v1/completions")


class Server(ThreadingHTTPServer):
    """Listens from the first moment; answers once `start` has given it a model."""

    daemon_threads = True
    request_queue_size = 128
    served: ServedModel
    batcher: Batcher

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.stopping = False
        self.num_busy = 0
        self.busy_changed = threading.Condition()
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/v1"

    def start(self, served: ServedModel, batcher: Batcher) -> None:
        """Answer, in threads of its own, until `stop`."""
        self.served, self.batcher = served, batcher
        threading.Thread(target=self.serve_forever, args=(0.1,), name="accept", daemon=True).start()

    def stop(self, grace: float = GRACE, limit: float = LIMIT) -> bool:
        """Refuse what comes, let what runs end within `grace` seconds or cut it off; whether all ended in `limit`."""
        self.stopping = True
        ended = self.batcher.close(grace, limit)
        with self.busy_changed:
            ended &= self.busy_changed.wait_for(lambda: self.num_busy == 0, timeout=2.0)
        self.shutdown()
        self.server_close()
        return ended

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks a name server for our name

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that went away
            print(f"connection: {type(error).__name__}", file=sys.stderr, flush=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection, request by request."""

    server: Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # of a first line without a version: an answer with a status all the same
    server_version, sys_version = "lwm-train", ""
    timeout = IDLE
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._log_around(self._get)

    def do_POST(self) -> None:
        self._log_around(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `_log_around` tells of requests, and no word of them."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server says of a request that is none, in our form."""
        self.close_connection = True
        self._refuse(Refusal(code, "bad_request", message or self.responses.get(code, ("", ""))[0]))

    def _log_around(self, answer: Any) -> None:
        server, begin = self.server, time.monotonic()
        self._status, self._tokens, self._begun = 0, "", False
        with server.busy_changed:
            server.num_busy += 1
        try:
            try:
                answer()
            except Refusal as refusal:
                self._refuse(refusal)
            except QueueFull as error:
                self._refuse(Refusal(429, "queue_full", str(error)), {"Retry-After": str(error.seconds)})
            except Stopping as error:
                self.close_connection = True
                self._refuse(Refusal(503, "shutting_down", str(error)))
            except GenerationFailed as error:
                self._refuse(Refusal(500, "internal_error", str(error)))
            except OSError:
                raise
            except Exception as error:
                self._refuse(Refusal(500, "internal_error", f"a bug of the server: {type(error).__name__}"))
        except OSError:  # the client went away, or says nothing more
            self.close_connection = True
            self._status = self._status or 499
        finally:
            with server.busy_changed:
                server.num_busy -= 1
                server.busy_changed.notify_all()
            known = self._path() in (*ASKING, "/v1/models", "/health")
            parts = [self.command, self._path() if known else "(another path)", str(self._status), self._tokens]
            told = " ".join(filter(None, [*parts, f"{time.monotonic() - begin:.2f} s"]))
            print(told, file=sys.stderr, flush=True)

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _get(self) -> None:
        self._drop_body()
        path, served = self._path(), self.server.served
        if path == "/health":
            if self.server.stopping:
                raise Stopping
            self._send(200, {"status": "ok", "waiting": self.server.batcher.num_waiting()})
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [served.described()]})
        elif path == f"/v1/models/{served.name}":
            self._send(200, served.described())
        elif path.startswith("/v1/models/"):
            raise Refusal(404, "model_not_found", f"no such model here; this server has {served.name!r}", "model")
        else:
            raise self._no_such_path({path: "POST"} if path in ASKING else {})

    def _post(self) -> None:
        body = self._body()
        if self._path() not in ASKING:
            raise self._no_such_path({"/v1/models": "GET", "/health": "GET"})
        if self.server.stopping:
            raise Stopping
        question = read_question(body, self._path() == ASKING[0], self.server.served)
        del body
        ticket = self.server.batcher.submit(question.prompt, question.draw)
        answer = AnswerText(self.server.served.tokenizer, question)
        form = AnswerForm(self.server.served, question)
        try:
            while answer.finish_reason is None:
                update = self._next(ticket)
                text = answer.add(update.ids, update.finished)
                if question.stream:
                    self._stream(text, form, first=not self._begun)
        finally:
            ticket.cancelled = True
            self._tokens = f"{len(question.prompt):,} + {answer.num_tokens:,} tokens"
        if not question.stream:
            self._send(200, form.whole(answer))
            return
        self._event(form.chunk("", answer.finish_reason))
        if question.include_usage:
            self._event(form.usage_chunk(answer))
        self._write_event("[DONE]")
        self._end_events()

    def _next(self, ticket: Ticket) -> Update:
        """The ticket's next update; ConnectionError where the client has left meanwhile."""
        while True:
            try:
                update = ticket.updates.get(timeout=1.0)
            except Empty:
                poll = select.poll()
                poll.register(self.connection, select.POLLIN)
                if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError("the client left") from None
                continue
            if isinstance(update, Exception):
                raise update
            return update

    def _body(self) -> bytes:
        """The request's body; the connection is closed after one that is not read whole."""
        length = self.headers.get("Content-Length")
        keep, self.close_connection = self.close_connection, True
        if "Transfer-Encoding" in self.headers or length is None:
            raise Refusal(411, "length_required", "wanted a Content-Length, and no Transfer-Encoding")
        if not (length.isascii() and length.isdigit()) or len(self.headers.get_all("Content-Length", ())) > 1:
            raise Refusal(400, "bad_request", "Content-Length: wanted one number")
        if len(length) > 12 or int(length) > MAX_BODY:
            left = min(int(length[:12]), 4 * MAX_BODY)  # a client that is cut off while it sends reads no answer
            while left > 0 and (block := self.rfile.read(min(left, 1 << 16))):
                left -= len(block)
            raise Refusal(413, "body_too_large", f"a body of more than {MAX_BODY:,} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client left")
        self.close_connection = keep
        return body

    def _drop_body(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True

    def _no_such_path(self, others: dict[str, str]) -> Refusal:
        if method := others.get(self._path()):
            return Refusal(405, "method_not_allowed", f"wanted {method}")
        return Refusal(404, "not_found", f"no such path; there are {', '.join(ASKING)}, /v1/models, /health")

    def _refuse(self, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "_begun", False):  # a stream: its status is sent
            self._event(refusal.described())
            self._end_events()
            self.close_connection = True
        else:
            self._send(refusal.status, refusal.described(), headers or {})

    def _send(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self._status = status
        self.send_response(status)
        if self.server.stopping:
            self.close_connection = True
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        fixed |= {"Connection": "close"} if self.close_connection else {}
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _stream(self, text: str, form: AnswerForm, first: bool) -> None:
        if first:
            self._begun, self._status = True, 200
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self._chunked = self.request_version != "HTTP/1.0"
            self.close_connection |= not self._chunked
            if self._chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._event(form.chunk("", role=True))
        if text:
            self._event(form.chunk(text))

    def _event(self, content: dict[str, Any]) -> None:
        self._write_event(json.dumps(content))

    def _write_event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event)

    def _end_events(self) -> None:
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")
