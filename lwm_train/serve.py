"""lwm-train serve: a run's newest checkpoint behind OpenAI's protocol, on one device, until a signal ends it.

bind the port -> load the checkpoint -> "ready" -> ... -> SIGINT or SIGTERM -> refuse, finish or cut off, end
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import jax

from lwm_train.batching import Batcher
from lwm_train.chat_protocol import ServedModel
from lwm_train.checkpoint import restore_params
from lwm_train.config import MeshSpec, ModelConfig, TrainManifest
from lwm_train.evaluate.run import run_tokenizer
from lwm_train.http_server import Server
from lwm_train.mesh import make_mesh
from lwm_train.metrics import METRICS
from lwm_train.model import Params
from lwm_train.run_file import read_run_file, run_model_config

MAX_WAITING = 256
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's parameters, on the first device, and what is said of it."""

    served: ServedModel
    params: Params
    config: ModelConfig


def load_model(run: Path, name: str | None, context: int | None, max_tokens: int) -> LoadedModel:
    """The newest checkpoint of `run`. name: the run's own by default; context: its row length by default."""
    content = read_run_file(run)
    tokenizer = run_tokenizer(run)
    context = context or _row_length(run, TrainManifest.model_validate(content["manifest"]).batch_rows)
    config = run_model_config(run)
    params, step = restore_params(run, make_mesh(MeshSpec(), jax.devices()[:1]))
    served = ServedModel(name or content["name"], tokenizer, step, context, min(max_tokens, context - 1))
    return LoadedModel(served, params, config)


def serve(
    load: Callable[[], LoadedModel],
    host: str,
    port: int,
    max_batch: int,
    ready: Callable[[str, ServedModel], None],
) -> signal.Signals:
    """Serve what `load` returns until SIGINT or SIGTERM, which is returned; the second one ends the process at once.

    port: 0 takes a free one. ready: called with the URL when requests are answered. ValueError where the address
    cannot be taken.
    """
    try:
        server = Server(host, port)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}; name another port (0 takes a "
            "free one) or an address of this machine"
        ) from error
    with server:  # closed whatever happens
        return _serve(server, load(), max_batch, ready)


def _serve(
    server: Server, loaded: LoadedModel, max_batch: int, ready: Callable[[str, ServedModel], None]
) -> signal.Signals:
    batcher = Batcher(loaded.params, loaded.config, loaded.served.tokenizer.eos, max_batch, MAX_WAITING)
    came: list[signal.Signals] = []
    event = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        event.set()

    before = [signal.signal(each, note) for each in SIGNALS]
    try:
        server.start(loaded.served, batcher)
        ready(server.url, loaded.served)
        event.wait()
        print(f"{came[0].name}: ending", file=sys.stderr, flush=True)
        if not server.stop():  # the model compiles, which nothing can cut short; there is no file to finish
            print("ended while the model was at work", file=sys.stderr, flush=True)
            os._exit(130 if came[0] == signal.SIGINT else 0)
    finally:
        for each, handler in zip(SIGNALS, before, strict=True):
            signal.signal(each, handler)
    return came[0]


def _row_length(run: Path, batch_rows: int) -> int:
    """Tokens of a row that the run was trained on, as its log of steps says."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, LookupError, TypeError, ZeroDivisionError):  # the last may be cut
            step = json.loads(line)
            return int(step["tokens"] // step["step"] // batch_rows)
    raise ValueError(
        f"{run / METRICS}: not there, or no line of it has the tokens of a step; name the longest row that the model "
        "was trained on with --context"
    )
