"""A run over real novels against a real server that does wrong: nothing is lost, nothing asked twice, all adds up."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lwm_data.format.vocab import TextTokenizer
from lwm_data.qa.chunks import Chunker
from lwm_data.qa.generate import generate
from lwm_data.terminal import RunFailed
from tests.conftest import DEMO, ROOT
from tests.lwm_data.qa.scripted_server import Asked, ScriptedServer, running

FAULTS = ["429", "500", "503", "stall", "reset", "empty", "broken json", "cut"]
Make = Callable[..., Path]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as started:
        yield started


@pytest.fixture
def make(tmp_path: Path, server: ScriptedServer) -> Make:
    """make(key=value, ...) writes a manifest over two short novels; its folder is `out`."""

    def write(**keys: Any) -> Path:
        endpoint = {"url": server.url, "model": "scripted", "concurrency": 8, "timeout": 0.5, "max_wait": 0.2}
        manifest = {
            "kind": "qa",
            "name": "test",
            "out": "out",
            "books": str(DEMO / "novels" / "[ah]*.txt"),
            "text_tokenizer": str(ROOT / "tokenizers" / "demo-text.yaml"),
            "max_chunks": 40,
            "prompt": str(ROOT / "manifests" / "qa" / "prompts" / "questions.yaml"),
            "endpoint": endpoint | keys.pop("endpoint", {}),
        } | keys
        (tmp_path / "qa.yaml").write_text(json.dumps(manifest), encoding="utf-8")
        return tmp_path / "qa.yaml"

    return write


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def every_chunk(tokenizer: TextTokenizer, most: int = 40) -> list[str]:
    paths = [DEMO / "novels" / f"{name}.txt" for name in ("alice_in_wonderland", "heart_of_darkness")]
    cutter = Chunker(tokenizer, 1000)
    return [chunk.text.strip() for path in paths for chunk in [*cutter.cut(path.read_text(encoding="utf-8"))][:most]]


def test_faults_lose_nothing_and_ask_nothing_twice(
    make: Make, server: ScriptedServer, tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    server.faults = lambda number, asked: FAULTS[number // 3 % len(FAULTS)] if number % 3 == 0 else None
    manifest = make(endpoint={"attempts": 20})
    summary = generate(manifest)
    out = tmp_path / "out"

    wanted = every_chunk(demo_tokenizer)
    assert Counter(asked.chunk for asked in server.answered()) == Counter(wanted)  # each once
    assert {asked.outcome for asked in server.log} == {*FAULTS, "answered"}
    assert server.most_at_once <= 8

    # What the server says it did is what the run says, and what the journal holds.
    said = summary.described()
    assert said["answered"] == said["chunks"] == len(wanted)
    assert said["failed"] == said["remaining"] == 0
    this_run = said["this_run"]
    assert this_run["requests"] == len(server.log)
    assert sum(this_run["repeated"].values()) == len(server.log) - len(server.answered())
    journal = rows(out / "journal.jsonl")
    assert sum(entry["attempts"] for entry in journal) == len(server.log)
    assert Counter(entry["raw"] for entry in journal) == Counter(asked.content for asked in server.answered())
    charged = Counter(asked.outcome for asked in server.log)
    assert this_run["input_tokens"] == 1000 * (charged["answered"] + charged["empty"])
    assert said["input_tokens"] == 1000 * len(wanted)

    # Every pair is kept or rejected, with its raw answer.
    pairs, rejected = rows(out / "qa.jsonl"), rows(out / "rejected.jsonl")
    assert len(pairs) + len(rejected) == len(wanted)
    assert len(pairs) == said["pairs"] > len(wanted) / 2
    assert Counter(row["reason"] for row in rejected) == said["rejected"]
    by_chunk = {asked.chunk: asked.content for asked in server.answered()}
    texts = {path.name: path.read_text(encoding="utf-8") for path in (DEMO / "novels").glob("*.txt")}
    for row in pairs:
        chunk = texts[row["book"]][slice(*row["chars"])].strip()
        assert json.loads(by_chunk[chunk])["pairs"][0] == {"question": row["question"], "answer": row["answer"]}
    for row in rejected:
        assert row["raw"] == by_chunk[texts[row["book"]][slice(*row["chars"])].strip()]
    assert [row["id"] for row in pairs] == [f"{row['book']}:{row['chunk']}:0" for row in pairs]
    order = [(row["book"], row["chunk"]) for row in pairs]
    assert order == sorted(set(order))

    # Again: nothing is asked, and the bytes stay.
    before = (out / "qa.jsonl").read_bytes(), len(server.log)
    generate(manifest)
    assert ((out / "qa.jsonl").read_bytes(), len(server.log)) == before


def test_a_pair_says_where_it_comes_from(make: Make, tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    import hashlib

    generate(make(max_chunks=5, parameters={"temperature": 0, "extra": {"top_k": 3}}))
    for row in rows(tmp_path / "out" / "qa.jsonl"):
        data = (DEMO / "novels" / row["book"]).read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")
        chunk = text[slice(*row["chars"])]
        assert row["book_sha256"] == hashlib.sha256(data).hexdigest()
        assert row["chunk_sha256"] == hashlib.sha256(chunk.encode()).hexdigest()
        assert demo_tokenizer.decode(demo_tokenizer.encode(text)[slice(*row["tokens"])]).strip() == chunk.strip()
        assert row["tokenizer"] == demo_tokenizer.fingerprint
        assert (row["language"], row["model"], row["prompt"], row["prompt_version"]) == (
            "en",
            "scripted",
            "questions",
            1,
        )
        assert row["parameters"] == {"temperature": 0, "top_p": None, "max_tokens": 512, "seed": None, "top_k": 3}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["time"])
        assert row["usage"] == {"prompt_tokens": 1000, "completion_tokens": 50, "estimated": False}


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.jsonl.zst", "pairs.parquet"])
def test_datasets_opens_the_file(make: Make, tmp_path: Path, name: str) -> None:
    import datasets

    summary = generate(make(max_chunks=6, output=name))
    kind = "parquet" if name.endswith("parquet") else "json"
    opened = datasets.load_dataset(
        kind, data_files=str(tmp_path / "out" / name), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(opened) == summary.counts.pairs > 0
    assert opened[0]["chars"][0] >= 0
    assert opened[0]["id"].endswith(":0")


def test_a_budget_stops_cleanly_and_the_next_run_goes_on(make: Make, server: ScriptedServer, tmp_path: Path) -> None:
    whole = generate(make(out="whole")).described()
    server.log.clear()
    manifest = make(budget={"requests": 30})
    for run, left in enumerate((50, 20, 0), 1):
        summary = generate(manifest)
        assert summary.counts.remaining == left
        assert summary.out_of_budget == (left > 0)
        assert len(server.log) == min(30 * run, 80)
        assert ("20 chunks remain" in summary.closing()) == (left == 20)
        assert len(rows(tmp_path / "out" / "qa.jsonl")) == summary.counts.pairs
    assert summary.counts.pairs == whole["pairs"]
    ids = [[row["id"] for row in rows(tmp_path / out / "qa.jsonl")] for out in ("out", "whole")]
    assert ids[0] == ids[1]


def test_a_chunk_without_an_answer_is_counted_and_asked_again_only_on_request(
    make: Make, server: ScriptedServer
) -> None:
    def faults(number: int, asked: Asked) -> str | None:
        return "500" if "White Rabbit" in asked.chunk else None

    server.faults = faults
    manifest = make(endpoint={"attempts": 2, "concurrency": 2}, max_chunks=12)
    failed = generate(manifest).counts.failed
    assert failed > 0
    server.log.clear()
    server.faults = lambda number, asked: None
    assert generate(manifest).counts.failed == failed
    assert server.log == []
    counts = generate(manifest, retry_failed=True).counts
    assert (counts.failed, counts.answered) == (0, 24)
    assert len(server.log) == failed


def test_a_dead_server_ends_the_run_and_no_chunk_is_given_up(make: Make, server: ScriptedServer) -> None:
    server.faults = lambda number, asked: "500" if number >= 10 else None
    manifest = make(endpoint={"attempts": 2, "max_wait": 0.01})
    with pytest.raises(RunFailed, match=r"in a row got no answer.*5xx: 500"):
        generate(manifest)
    server.faults = lambda number, asked: None
    counts = generate(manifest).counts
    assert (counts.failed, counts.answered) == (0, 80)


@pytest.mark.parametrize(
    ("status", "told"), [("401", "key_env"), ("403", "key"), ("404", "model"), ("402", "credit"), ("301", "moved")]
)
def test_what_no_later_request_can_mend_ends_the_run_at_once(
    make: Make, server: ScriptedServer, status: str, told: str
) -> None:
    server.faults = lambda number, asked: status
    with pytest.raises(RunFailed, match=told):
        generate(make())
    assert len(server.log) <= 8


def test_no_server_is_told_soon(make: Make) -> None:
    with pytest.raises(RunFailed, match="start the server"):
        generate(make(endpoint={"url": "http://127.0.0.1:9/v1"}))


def test_the_schema_is_sent_until_the_server_refuses_it(make: Make, server: ScriptedServer) -> None:
    generate(make(out="with"))
    assert all("response_format" in asked.body for asked in server.log)
    server.log.clear()
    server.knows_schema = False
    generate(make(out="without"))
    assert [asked.outcome for asked in server.log].count("no schema") == 1
    assert len(server.answered()) == 80


def test_a_chunk_that_the_server_refuses_is_no_fault_of_the_schema(make: Make, server: ScriptedServer) -> None:
    server.faults = lambda number, asked: "400" if "Nellie, a cruising yawl" in asked.chunk else None
    counts = generate(make(max_chunks=10)).counts
    assert (counts.failed, counts.answered) == (1, 19)
    assert all("response_format" in asked.body for asked in server.answered())


def test_the_servers_limits_hold_all_requests_back(make: Make, server: ScriptedServer) -> None:
    server.headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60ms"}
    server.latency = 0.03
    summary = generate(make(max_chunks=5, endpoint={"concurrency": 2}))
    assert summary.counts.answered == 10
    assert summary.spending.retries == Counter()
    assert summary.seconds > 4 * 0.06


def test_answers_that_are_no_pairs_are_kept_raw_and_not_asked_again(
    make: Make, server: ScriptedServer, tmp_path: Path
) -> None:
    server.reply = lambda asked: '{"pairs": [{"question": "Who'
    manifest = make(max_chunks=5)
    generate(manifest)
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert {(row["reason"], row["raw"]) for row in rejected} == {
        ("no pair in the answer", '{"pairs": [{"question": "Who')
    }
    assert generate(manifest).counts.rejected == {"no pair in the answer": 10}
    assert len(server.log) == 10


def test_a_question_is_asked_once_in_a_book(make: Make, server: ScriptedServer) -> None:
    pair = {"question": "What is the name of the girl?", "answer": "Is it the"}
    server.reply = lambda asked: json.dumps({"pairs": [pair, pair]})
    counts = generate(make(max_chunks=5, gates={"grounded": 0}, pairs_per_chunk=2)).counts
    assert counts.pairs == 2
    assert counts.rejected == {"question asked before": 18}


def test_other_gates_need_no_other_answers_and_other_parameters_do(make: Make, server: ScriptedServer) -> None:
    generate(make(max_chunks=5))
    counts = generate(make(max_chunks=5, gates={"answer_characters": [1, 2]})).counts
    assert counts.rejected["answer too long"] + counts.rejected["ambiguous without the chunk"] == 10
    assert len(server.log) == 10
    generate(make(max_chunks=5, parameters={"temperature": 0.1}))
    assert len(server.log) == 20


def test_a_judge_is_asked_once_about_each_pair_that_passed(make: Make, server: ScriptedServer) -> None:
    from tests.lwm_data.qa.scripted_server import reply

    server.reply = lambda asked: reply(asked) if not asked.is_verdict else ["Yes.", "no"]["the " in asked.said[-90:]]
    kept = generate(make(out="unjudged")).counts.pairs
    asked_before = len(server.log)
    manifest = make(gates={"judge": True}, budget={"requests": 100})
    generate(manifest)
    counts = generate(manifest).counts
    assert counts.remaining == 0
    assert counts.pairs + counts.rejected["judged wrong"] == kept
    assert counts.rejected["judged wrong"] > 0
    verdicts = [asked for asked in server.log[asked_before:] if asked.is_verdict]
    assert len({asked.said for asked in verdicts}) == len(verdicts) == kept
    assert all("response_format" not in asked.body for asked in verdicts)


def test_a_book_that_cannot_be_asked_about_is_named(make: Make, tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text((DEMO / "novels" / "alice_in_wonderland.txt").read_text(encoding="utf-8")[:6000])
    (books / "b.txt").write_bytes(b"\xff\xfe")
    (books / "c.txt").write_text("Det var en mørk og stormfuld aften, og ingen gik ud af huset før næste morgen. " * 20)
    summary = generate(make(books="books/*.txt"))
    assert summary.counts.bad_books == {"not UTF-8": 1, "no prompt for its language": 1}
    assert [row["book"] for row in rows(tmp_path / "out" / "rejected.jsonl")][:2] == ["b.txt", "c.txt"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"endpoint": {"url": "ftp://x/v1"}}, "http://"),
        ({"endpoint": {"url": "https://me:secret@x/v1"}}, "key_env"),
        ({"endpoint": {"url": "https://x/v1?key=secret"}}, "key_env"),
        ({"in_process": {"transformers": "x"}}, "one of the two"),
        ({"budget": {"cost": 1}}, "price"),
        ({"output": "../x.jsonl"}, "file's name"),
        ({"output": "rejected.jsonl"}, "file's name"),
        ({"out": "s3://x/y"}, "folder on disk"),
        ({"gates": {"answer_characters": [5, 2]}}, "the least first"),
        ({"parameters": {"extra": {"stream": True}}}, "stream: the run sets"),
        ({"endpoint": {"key_env": "NO_SUCH_KEY"}}, "export NO_SUCH_KEY"),
    ],
)
def test_a_wrong_manifest_says_what_is_wanted(make: Make, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(make(max_chunks=1, **keys))


def test_a_folder_of_something_else_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty and not of an earlier run"):
        generate(make())


def test_many_who_ask_too_often_do_not_fail(make: Make, server: ScriptedServer) -> None:
    server.faults = lambda number, asked: "429" if number % 4 else None
    counts = generate(make(max_chunks=6, endpoint={"attempts": 2, "concurrency": 4})).counts
    assert (counts.failed, counts.answered) == (0, 12)


def test_a_key_at_the_border_of_what_is_kept_of_an_error_is_not_kept_in_part(
    make: Make, server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lwm_data.qa.endpoint import MAX_ERROR

    monkeypatch.setenv("QA_KEY", "sk-0123456789abcdef")
    server.error = lambda asked: "x" * (MAX_ERROR - 20) + asked.headers["authorization"]
    server.faults = lambda number, asked: "400" if "White Rabbit" in asked.chunk else None
    assert generate(make(max_chunks=12, endpoint={"key_env": "QA_KEY"})).counts.failed > 0
    for path in (tmp_path / "out").glob("*.jsonl"):
        assert "sk-" not in path.read_text(encoding="utf-8").replace("risk-", "")


@pytest.mark.parametrize(
    "raw", ["{{'question': 'Who?', 'answer': 'Ahab'}}", "{'question': 'Who?', 'answer': 0x" + "f" * 5000 + "}"]
)
def test_a_strange_answer_ends_no_run(make: Make, server: ScriptedServer, raw: str) -> None:
    server.reply = lambda asked: raw
    for _ in range(2):
        counts = generate(make(max_chunks=2)).counts
        assert (counts.answered, counts.pairs, counts.rejected.total()) == (4, 0, 4)
    assert len(server.log) == 4


def test_a_budget_below_one_request_stops_cleanly_and_says_so(
    make: Make, server: ScriptedServer, tmp_path: Path
) -> None:
    summary = generate(make(budget={"tokens": 1}))
    assert (summary.out_of_budget, summary.counts.remaining, server.log) == (True, 80, [])
    assert "the budget holds no request" in summary.closing()
    assert (tmp_path / "out" / "qa.jsonl").read_bytes() == b""


def test_a_book_that_the_server_refuses_is_passed(make: Make, server: ScriptedServer) -> None:
    server.faults = lambda number, asked: "400" if number < 40 else None
    manifest = make()
    counts = generate(manifest).counts
    assert counts.failed >= 20 and counts.answered == 80 - counts.failed
    asked = len(server.log)
    assert generate(manifest).counts == counts and len(server.log) == asked
    assert generate(manifest, retry_failed=True).counts.answered == 80


def test_a_server_that_refuses_every_chunk_fails_the_run(make: Make, server: ScriptedServer) -> None:
    server.faults = lambda number, asked: "400"
    with pytest.raises(RunFailed, match=r"refused all 80 chunks.*rejected\.jsonl tells why"):
        generate(make())
    server.faults = lambda number, asked: None
    asked = len(server.log)
    assert generate(make()).counts.failed == 80 and len(server.log) == asked  # noted, and not asked again
    assert generate(make(), retry_failed=True).counts.answered == 80


@pytest.mark.parametrize("spelled", ["/", "\\/", "\\u002f", "\\\\/", "\\u002F"])
def test_a_key_is_hidden_however_json_spells_it(
    make: Make, server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    monkeypatch.setenv("QA_KEY", 'sk-Secret/"Key+123')
    key = 'sk-Secret/"Key+123'.replace("/", spelled).replace('"', '\\"')
    server.reply = lambda asked: f"Your key is {key}."
    server.error = lambda asked: f'{{"error": "key {key} {"x" * 20_000}"}}'
    server.faults = lambda number, asked: "400" if "White Rabbit" in asked.chunk else None
    counts = generate(make(max_chunks=4, endpoint={"key_env": "QA_KEY"})).counts
    assert counts.failed > 0 and counts.answered > 0
    for path in (tmp_path / "out").glob("*.jsonl"):
        assert "Secret" not in path.read_text(encoding="utf-8")


def test_a_short_key_is_no_word_that_answers_lose(
    make: Make, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QA_KEY", "a")
    generate(make(max_chunks=4, endpoint={"key_env": "QA_KEY"}))
    raws = Counter(entry["raw"] for entry in rows(tmp_path / "out" / "journal.jsonl"))
    assert raws == Counter(asked.content for asked in server.answered())


@pytest.mark.parametrize(
    "endpoint",
    [
        {"url": "http://me:hunter2@x/v1"},
        {"url": "http://me:hunter2/y@x/v1"},
        {"url": "https://x/v1?api_key=hunter2"},
        {"key_env": "sk-hunter2"},
    ],
)
def test_a_refused_manifest_repeats_no_key(make: Make, endpoint: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"endpoint\.(url|key_env)") as error:
        generate(make(endpoint=endpoint))
    assert "hunter2" not in str(error.value)


def test_a_wait_that_the_server_asks_for_is_told(
    make: Make, server: ScriptedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lwm_data.qa.limits.TELL_EVERY", 0.1)
    monkeypatch.setattr("lwm_data.terminal.LINE_EVERY", 0.0)
    server.faults = lambda number, asked: "429" if number == 0 else None
    server.retry_after = "0.6"
    assert generate(make(max_chunks=2)).counts.answered == 4
    assert "waiting 1 s, the server asks for it" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [10**400, 2**63, 2**62, -1])
@pytest.mark.parametrize("output", ["qa.jsonl", "qa.parquet"])
def test_usage_that_cannot_be_is_counted_here(make: Make, server: ScriptedServer, tokens: int, output: str) -> None:
    server.usage = {"prompt_tokens": tokens, "completion_tokens": 1}
    counts = generate(make(max_chunks=3, output=output)).counts
    assert counts.answered == 6 and counts.pairs > 0
    assert 0 < counts.input_tokens < 6 * 3000


def test_more_pairs_than_asked_are_counted_and_the_answer_is_kept_once(
    make: Make, server: ScriptedServer, tmp_path: Path
) -> None:
    pairs = [{"question": f"Which is number {i} of the many?", "answer": "it is"} for i in range(300)]
    server.reply = lambda asked: json.dumps({"pairs": pairs})
    counts = generate(make(max_chunks=2, pairs_per_chunk=2, gates={"grounded": 0})).counts
    assert counts.rejected["more pairs than asked"] == 4 * (300 - 8)
    assert counts.pairs + counts.rejected.total() == 4 * 300
    told = rows(tmp_path / "out" / "rejected.jsonl")
    assert [row["id"] for row in told if "raw" in row] == [
        next(row["id"] for row in told if (row["book"], row["chunk"]) == of)
        for of in dict.fromkeys((row["book"], row["chunk"]) for row in told)
    ]


def test_parquet_holds_whatever_parameters_there_are(make: Make, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    extra = {"big": 2**70, "mixed": [1, "a", None], "empty": {}, "deep": {"x": [{"y": []}, {"z": 1}]}}
    generate(make(max_chunks=3, output="pairs.parquet", parameters={"extra": extra}))
    kept = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert kept and all(json.loads(row["parameters"]).items() >= extra.items() for row in kept)


def test_another_output_leaves_no_stale_one(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(make(max_chunks=2))
    (out / "mine.jsonl").write_text("mine")
    generate(make(max_chunks=2, output="pairs.parquet"))
    generate(make(max_chunks=2, output="a.jsonl.zst"))
    assert {path.name for path in out.iterdir() if path.suffix in (".jsonl", ".zst", ".parquet")} == {
        "journal.jsonl",
        "rejected.jsonl",
        "mine.jsonl",
        "a.jsonl.zst",
    }


def test_leftovers_of_a_kill_are_removed(make: Make, tmp_path: Path) -> None:
    generate(make(max_chunks=1))
    left = tmp_path / "out" / "cuts" / ".x.npy.0.tmp"
    left.write_bytes(b"half")
    generate(make(max_chunks=1))
    assert not left.exists()


def test_a_slow_server_is_not_told_to_start(make: Make, server: ScriptedServer) -> None:
    server.faults = lambda number, asked: "stall"
    with pytest.raises(RunFailed, match=r"within 0.1 s \(endpoint.timeout\); raise it where the server is slow"):
        generate(make(max_chunks=1, endpoint={"timeout": 0.1}))
