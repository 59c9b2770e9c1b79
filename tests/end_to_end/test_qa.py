"""`lwm-data qa` as a person runs it: killed, stopped, twice at a time, with a key, and with a model in the process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lwm_data.qa.generate import generate
from tests.conftest import DEMO, ROOT
from tests.lwm_data.qa.scripted_server import Asked, ScriptedServer, reply, running

COMMAND = [sys.executable, "-m", "lwm_data.cli", "qa"]
KEY = "sk-Very-Secret-0123456789"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as started:
        yield started


@pytest.fixture
def manifest(tmp_path: Path, server: ScriptedServer) -> Path:
    """The demo's own manifest, of one novel, with the scripted server."""
    text = (ROOT / "manifests" / "qa" / "demo.yaml").read_text(encoding="utf-8")
    text = text.replace("http://127.0.0.1:8000/v1", server.url).replace(
        "../demo/novels/*.txt", f"{DEMO}/novels/alice*.txt"
    )
    text = text.replace("../../tokenizers", str(ROOT / "tokenizers")).replace("../../runs/demo/qa", "out")
    text = text.replace("prompts/", f"{ROOT}/manifests/qa/prompts/") + "max_chunks: 40\n"
    (tmp_path / "qa.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "qa.yaml"


def qa(manifest: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, str(manifest), *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def started(manifest: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(manifest), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [row | {"time": ""} for row in rows(path)]


def test_killed_at_any_moment_no_pair_is_lost_or_doubled(
    manifest: Path, server: ScriptedServer, tmp_path: Path
) -> None:
    assert qa(manifest, "--set", "out=whole").returncode == 0
    server.log.clear()
    server.latency = 0.05
    draw = random.Random(0)
    in_journal: Counter[str] = Counter()
    for _ in range(3):
        before = len(server.answered())
        with started(manifest) as running_qa:
            while len(server.answered()) < before + 8 and running_qa.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.05))
            running_qa.kill()
        whole_lines = (tmp_path / "out" / "journal.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
        in_journal = Counter(json.loads(line)["chunk_sha256"] for line in whole_lines)
        assert not in_journal or max(in_journal.values()) == 1
    answered_before = {asked.chunk for asked in server.answered()}
    server.log.clear()
    done = qa(manifest, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["answered"] == 40
    assert len(server.log) == 40 - sum(in_journal.values())  # what a kill caught in flight is asked again, no more
    assert answered_before
    assert untimed(tmp_path / "out" / "qa.jsonl") == untimed(tmp_path / "whole" / "qa.jsonl")
    journal = rows(tmp_path / "out" / "journal.jsonl")
    assert max(Counter(entry["key"] for entry in journal).values()) == 1


def test_ctrl_c_keeps_what_was_answered(manifest: Path, server: ScriptedServer, tmp_path: Path) -> None:
    server.latency = 0.05
    with started(manifest) as running_qa:
        while len(server.answered()) < 10 and running_qa.poll() is None:
            time.sleep(0.01)
        running_qa.send_signal(signal.SIGINT)
        _, told = running_qa.communicate(timeout=30)
    assert running_qa.returncode == 130
    assert "Traceback" not in told
    kept, rejected = rows(tmp_path / "out" / "qa.jsonl"), rows(tmp_path / "out" / "rejected.jsonl")
    num_kept = len(rows(tmp_path / "out" / "journal.jsonl"))
    assert len(kept) + len(rejected) == num_kept >= 8
    server.log.clear()
    assert qa(manifest).returncode == 0
    assert len(server.log) == 40 - num_kept


def test_two_runs_in_one_folder_are_refused(manifest: Path, server: ScriptedServer) -> None:
    server.latency = 3
    with started(manifest) as first:
        while not server.log and first.poll() is None:
            time.sleep(0.01)
        second = qa(manifest)
        first.kill()
    assert second.returncode == 2
    assert "another run is writing there" in second.stderr


def test_the_key_is_sent_and_stands_nowhere_else(manifest: Path, server: ScriptedServer, tmp_path: Path) -> None:
    def echo(asked: Asked) -> str:
        return f"{asked.headers['authorization']} {reply(asked)}"

    server.reply = echo
    server.faults = lambda number, asked: ["500", None, "400", None, "429"][number % 5]  # a 500 and a 400 tell the key
    options = ["--debug", "--set", "endpoint.key_env=QA_KEY", "--set", "endpoint.attempts=2"]
    said = [qa(manifest, *options, QA_KEY=KEY)]
    server.faults = lambda number, asked: "401"
    said.append(qa(manifest, *options, "--set", "endpoint.model=other", QA_KEY=KEY))
    server.faults = lambda number, asked: "500"
    said.append(qa(manifest, *options, "--set", "endpoint.model=third", QA_KEY=KEY))
    assert {asked.headers["authorization"] for asked in server.log} == {f"Bearer {KEY}"}
    assert [done.returncode for done in said] == [0, 1, 1]
    assert "[key]" in said[1].stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert any(b"[key]" in data for data in written)
    for text in [*(done.stdout + done.stderr for done in said), *map(repr, written)]:
        assert KEY not in text
        assert KEY[3:] not in text


def test_a_key_that_is_not_there_is_asked_for(manifest: Path) -> None:
    done = qa(manifest, "--set", "endpoint.key_env=NO_SUCH_KEY")
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0)
    assert "export NO_SUCH_KEY" in done.stderr


def test_a_budget_ends_with_exit_code_0_and_says_what_remains(manifest: Path) -> None:
    done = qa(manifest, "--set", "budget.tokens=9000", "--set", "price={input: 1, output: 2}")
    assert done.returncode == 0
    assert "chunks remain: run the same command to go on" in done.stdout
    assert "cost of this run" in done.stdout


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of random weights with a tokenizer of bytes, saved as transformers does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import tokenizers

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(manifest: Path, tiny_model: Path) -> Path:
    """The manifest with the tiny model in the server's place."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("endpoint", "max_chunks", "chunk_tokens", "parameters"))]
    kept += [f"in_process: {{transformers: {tiny_model}}}", "max_chunks: 3", "chunk_tokens: 100"]
    manifest.write_text("\n".join([*kept, "parameters: {temperature: 0.7, max_tokens: 12}"]), encoding="utf-8")
    return manifest


def test_a_model_in_this_process_answers_the_same_twice(offline: Path, tmp_path: Path) -> None:
    for out in ("out", "again"):
        counts = generate(offline, [f"out={out}"]).counts
        assert (counts.answered, counts.remaining, counts.output_tokens) == (3, 0, 36)
        assert counts.rejected == {"no pair in the answer": 3}
    raw = [[entry["raw"] for entry in rows(tmp_path / out / "journal.jsonl")] for out in ("out", "again")]
    assert raw[0] == raw[1]
    assert len(set(raw[0])) == 3
    entry = rows(tmp_path / "out" / "journal.jsonl")[0]
    assert entry["model"].startswith("tiny@")
    assert entry["finish_reason"] == "length"
    assert generate(offline).spending.requests == 0


def test_a_model_that_is_no_safetensors_is_refused(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="safetensors"):
        generate(offline, ["in_process.transformers=pickled"])
