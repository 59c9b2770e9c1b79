"""The release's JSON lines, against a reference that builds flat lists in the release's manner."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import yaml
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.example import Example
from lwm_data.format.packed import Piece, pack_row
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import LwmJsonl
from lwm_data.sources import json_lines, lwm_jsonl
from lwm_data.sources.files import InputFile
from lwm_data.sources.lwm_jsonl import read_lwm_jsonl
from lwm_data.sources.record import Record, Rejection
from lwm_data.token_store import StoreFile, write_store

ROOT = Path(__file__).parents[2]
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "tokenizers" / "demo-text.model"))
BOS, EOS = 1, 2
Flat = tuple[list[int], list[bool], list[bool]]
"""Ids, loss mask (of the token itself, as it is predicted), vision mask."""


def reference(
    row: dict[str, Any],
    spec: str,
    separator: str = " ",
    prepend: str = "",
    max_frames: int | None = None,
    stray: bool = False,
) -> Flat:
    """From section 1 of the reference on the release, token by token."""

    def encoded(text: str) -> list[int]:
        return ([BOS] if stray else []) + [int(token) for token in PIECES.encode(text)]

    ids, mask, vision = [BOS], [False], [False]
    for position, field in enumerate(spec.split(",")):
        trained = not (field[:1] == "[" and field[-1:] == "]")
        name = field if trained else field[1:-1]
        added: list[tuple[int, bool]] = []
        if name == "<|bos|>":
            added = [(BOS, False)]
        elif name == "<|eos|>":
            added = [(EOS, False)]
        elif "vision" in name:
            codes = row[name]
            frames = [codes[at : at + 256] for at in range(0, len(codes), 256)]
            if max_frames is not None and len(frames) > max_frames:
                step = (len(frames) - 1) / (max_frames - 1) if max_frames > 1 else 0.0
                kept = [int(i * step) for i in range(max_frames - 1)] + [len(frames) - 1 if max_frames > 1 else 0]
                frames = [frames[i] for i in kept]
            added += [(token, False) for token in encoded("<vision>")]
            for number, frame in enumerate(frames, start=1):
                added += [(code, True) for code in frame] + [(8193 if number == len(frames) else 8192, True)]
            added += [(token, False) for token in encoded("</vision>")]
        else:
            text = separator.join(row[part] for part in name.split("+"))
            added = [(token, False) for token in encoded(prepend + text if position == 0 else text)]
        ids += [token for token, _ in added]
        mask += [trained] * len(added)
        vision += [is_vision for _, is_vision in added]
    return [*ids, EOS], [*mask, True], [*vision, False]


def _flat(record: Record | Rejection) -> Flat:
    assert isinstance(record, Record), record
    return (
        [int(token) for run in record.runs for token in run.tokens],
        [run.trained for run in record.runs for _ in run.tokens],
        [run.is_vision for run in record.runs for _ in run.tokens],
    )


def _source(**keys: Any) -> LwmJsonl:
    return LwmJsonl.model_validate({"name": "lines", "type": "lwm_jsonl", "path": "x"} | keys)


def _read(
    folder: Path, tokenizer: TextTokenizer, *lines: Any, seed: int = 0, name: str = "a.jsonl", **keys: Any
) -> list[Record | Rejection]:
    """What a file of `lines` (bytes as they are, all else as JSON) gives."""
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (folder / name).write_bytes(data)
    keys = keys or {"fields_from_example": "fields"}
    return list(read_lwm_jsonl(_source(**keys), seed, InputFile(str(folder / name), name), tokenizer))


def _codes(num_frames: int, seed: int = 0) -> list[int]:
    return [int(code) for code in np.random.default_rng(seed).integers(0, 8192, 256 * num_frames)]


TEXT_KEYS = ["caption", "question", "answer", "system book", "été", "Vision"]  # the letters are small ones
VISION_KEYS = ["vision", "vision2", "a_vision_list", "television"]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """A line without its spec, specs for it, and options of the source."""
    novel = (ROOT / "manifests" / "demo" / "novels" / "alice_in_wonderland.txt").read_text(encoding="utf-8")[:20_000]

    def stretch(at: int, length: int) -> str:
        return novel[at : at + length]

    texts = st.builds(stretch, st.integers(0, 19_000), st.integers(0, 400)) | st.text(max_size=30)
    row: dict[str, Any] = {key: draw(texts) for key in TEXT_KEYS}
    row |= {key: _codes(draw(st.integers(1, 7)), draw(st.integers(0, 99))) for key in VISION_KEYS}
    name = st.one_of(
        st.lists(st.sampled_from(TEXT_KEYS), min_size=1, max_size=3).map("+".join),
        st.sampled_from(VISION_KEYS),
        st.sampled_from(["<|bos|>", "<|eos|>"]),
    )
    field = st.builds(lambda name, masked: f"[{name}]" if masked else name, name, st.booleans())
    specs = draw(st.lists(st.lists(field, min_size=1, max_size=6).map(",".join), min_size=1, max_size=3))
    options = {
        "subfield_separator": draw(st.sampled_from([" ", "", "\n", " + ", ","])),
        "prepend_text": draw(st.sampled_from(["", "You are a helpful assistant. ", " ", "é"])),
        "max_frames": draw(st.none() | st.integers(1, 6)),
        "stray_bos": draw(st.booleans()),
    }
    return row, specs, options


@given(case=_cases(), how=st.sampled_from(["fields", "string", "list"]), ascii_only=st.booleans())
def test_a_line_becomes_the_releases_tokens_and_masks(
    tmp_path_factory: pytest.TempPathFactory,
    demo_tokenizer: TextTokenizer,
    case: tuple[dict[str, Any], list[str], dict[str, Any]],
    how: str,
    ascii_only: bool,
) -> None:
    row, specs, options = case
    folder = tmp_path_factory.mktemp("lines")
    keys: dict[str, Any]
    if how == "fields":
        keys, specs = {"fields": specs[0]}, specs[:1]
    else:
        keys, specs = {"fields_from_example": "its spec"}, specs[:1] if how == "string" else specs
        row = row | {"its spec": specs[0] if how == "string" else specs}
    line = json.dumps(row, ensure_ascii=ascii_only).encode()
    (record,) = _read(folder, demo_tokenizer, line, **keys, **options)
    wanted = [
        reference(
            row,
            spec,
            options["subfield_separator"],
            options["prepend_text"],
            options["max_frames"],
            options["stray_bos"],
        )
        for spec in specs
    ]
    assert record.key == "a.jsonl:1"
    assert _flat(record) in wanted
    assert isinstance(record, Record)
    write_store(folder / "a.arrow", [record])
    assert _flat(StoreFile(folder / "a.arrow").record(0)) == _flat(record)


@given(case=_cases(), weighting=st.sampled_from(["example", "token"]))
def test_a_row_weighs_the_targets_that_the_release_trains(
    tmp_path_factory: pytest.TempPathFactory,
    demo_tokenizer: TextTokenizer,
    case: tuple[dict[str, Any], list[str], dict[str, Any]],
    weighting: Any,
) -> None:
    """The release shifts its mask with its tokens: the mask of target t + 1 gates what position t predicts."""
    row, specs, _ = case
    (record,) = _read(tmp_path_factory.mktemp("lines"), demo_tokenizer, row, fields=specs[0])
    assert isinstance(record, Record)
    ids, mask, vision = reference(row, specs[0])
    example = Example("lines", record.key, 0, record.runs)
    arrays = pack_row([Piece(example, 0, len(ids))], len(ids), "masked", weighting).arrays()
    assert arrays["tokens"].tolist() == ids
    assert arrays["vision_mask"].tolist() == vision
    assert (arrays["loss_weights"] > 0).tolist() == mask


def _parts(*parts: tuple[list[int], bool, bool]) -> Flat:
    """Flat lists of (ids, trained, is_vision)."""
    return (
        [token for ids, _, _ in parts for token in ids],
        [trained for ids, trained, _ in parts for _ in ids],
        [is_vision for ids, _, is_vision in parts for _ in ids],
    )


def test_the_specs_that_people_use_give_the_examples_they_mean(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    encode = PIECES.encode
    start, end, codes, video = encode("<vision>"), encode("</vision>"), _codes(1), _codes(2)
    image = [*codes, 8193]
    clip = [*video[:256], 8192, *video[256:], 8193]
    bos, eos = ([BOS], False, False), ([EOS], True, False)
    row = {"caption": "A red barn.", "vision": codes, "clip_vision": video, "a": "Yes.", "b": "No.", "q": "Is it?"}

    def read(spec: str, **keys: Any) -> Flat:
        (record,) = _read(tmp_path, demo_tokenizer, row, fields=spec, **keys)
        return _flat(record)

    assert read("[vision],caption") == _parts(
        bos, (start, False, False), (image, False, True), (end, False, False), (encode("A red barn."), True, False), eos
    )
    assert read("[caption],vision") == _parts(
        bos, (encode("A red barn."), False, False), (start, True, False), (image, True, True), (end, True, False), eos
    )
    assert read("[q],[clip_vision],a") == _parts(
        bos,
        (encode("Is it?"), False, False),
        (start, False, False),
        (clip, False, True),
        (end, False, False),
        (encode("Yes."), True, False),
        eos,
    )
    assert read("[caption],[q],a,<|eos|>,[q],b") == _parts(
        bos,
        (encode("A red barn."), False, False),
        (encode("Is it?"), False, False),
        (encode("Yes."), True, False),
        ([EOS], True, False),
        (encode("Is it?"), False, False),
        (encode("No."), True, False),
        eos,
    )
    assert read("[caption+q],[<|bos|>],a") == _parts(
        bos, (encode("A red barn. Is it?"), False, False), ([BOS], False, False), (encode("Yes."), True, False), eos
    )
    assert read("a+b", subfield_separator="|", prepend_text="> ") == _parts(
        bos, (encode("> Yes.|No."), True, False), eos
    )
    assert read("[vision],a", prepend_text="> ") == read("[vision],a"), "the first field is no text"
    assert read("[q],a", stray_bos=True) == _parts(
        bos, ([BOS, *encode("Is it?")], False, False), ([BOS, *encode("Yes.")], True, False), eos
    )
    assert read("vision", stray_bos=True) == _parts(
        bos, ([BOS, *start], True, False), (image, True, True), ([BOS, *end], True, False), eos
    )


def test_the_end_is_trained_where_every_field_is_bracketed(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    (record,) = _read(tmp_path, demo_tokenizer, {"a": "Yes.", "vision": _codes(1)}, fields="[a],[vision],[<|eos|>]")
    ids, mask, _ = _flat(record)
    assert mask == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize("num_frames", [1, 2, 30])
def test_frames_cost_257_tokens_each_and_the_delimiters(
    tmp_path: Path, demo_tokenizer: TextTokenizer, num_frames: int
) -> None:
    (record,) = _read(tmp_path, demo_tokenizer, {"vision": _codes(num_frames)}, fields="vision")
    delimiters = len(PIECES.encode("<vision>")) + len(PIECES.encode("</vision>"))
    assert len(_flat(record)[0]) == 2 + 257 * num_frames + delimiters


@pytest.mark.parametrize(
    ("num_frames", "max_frames", "kept"),
    [
        (5, 3, [0, 2, 4]),
        (10, 4, [0, 3, 6, 9]),
        (9, 4, [0, 2, 5, 8]),  # fractions are cut off
        (9, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
        (4, 9, [0, 1, 2, 3]),
        (4, None, [0, 1, 2, 3]),
    ],
)
def test_thinned_frames_are_even_and_keep_both_ends(
    tmp_path: Path, demo_tokenizer: TextTokenizer, num_frames: int, max_frames: int | None, kept: list[int]
) -> None:
    codes = [frame for frame in range(num_frames) for _ in range(256)]
    (record,) = _read(tmp_path, demo_tokenizer, {"vision": codes}, fields="vision", max_frames=max_frames)
    assert isinstance(record, Record)
    (block,) = [run.tokens.reshape(-1, 257) for run in record.runs if run.is_vision]
    assert block[:, 0].tolist() == kept
    assert block[:, 256].tolist() == [8192] * (len(kept) - 1) + [8193]


def test_thinned_frames_are_those_of_a_floating_point_step(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    """As in the release: of 31 frames, 23 kept, the 12th is 14; in fractions 11 * 30 / 22 is 15."""
    codes = [frame for frame in range(31) for _ in range(256)]
    (record,) = _read(tmp_path, demo_tokenizer, {"vision": codes}, fields="vision", max_frames=23)
    assert isinstance(record, Record)
    (block,) = [run.tokens.reshape(-1, 257) for run in record.runs if run.is_vision]
    assert block[10:13, 0].tolist() == [13, 14, 16]


LISTED: dict[str, Any] = {"fields": ["[a],b", "[b],a"], "a": "One.", "b": "Two."}
PINNED = "0001101101100111"  # another generator would give other datasets


def _draws(records: list[Record | Rejection]) -> str:
    kinds = [_flat(record) for record in records]
    wanted = [reference(LISTED, spec) for spec in LISTED["fields"]]
    return "".join(str(wanted.index(kind)) for kind in kinds)


def test_the_spec_of_a_line_is_the_same_in_every_build(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    assert _draws(_read(tmp_path, demo_tokenizer, *[LISTED] * 16)) == PINNED
    other = {"fields": ["a", "b", "a,b"], "a": "One.", "b": "Two."}
    mixed = [other if i % 2 else LISTED for i in range(16)]
    assert _draws(_read(tmp_path, demo_tokenizer, *mixed)[::2]) == PINNED[::2], "whatever the other lines are"


def test_the_spec_of_a_line_depends_on_seed_source_and_file(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    drawn = set()
    for file_name in ("a.jsonl", "b.jsonl"):
        _read(tmp_path, demo_tokenizer, *[LISTED] * 200, name=file_name)
        file = InputFile(str(tmp_path / file_name), file_name)
        for seed in (0, 1):
            for source_name in ("lines", "others"):
                source = _source(name=source_name, fields_from_example="fields")
                drawn.add(_draws(list(read_lwm_jsonl(source, seed, file, demo_tokenizer))))
    assert len(drawn) == 8
    for draws in drawn:
        assert 60 < Counter(draws)["1"] < 140


GOOD: dict[str, Any] = {"fields": "[vision],a", "a": "Yes.", "vision": _codes(1)}
DEEP = b'{"fields": "a", "a": ' + b"[" * 900 + b"]" * 900 + b"}"


BAD_LINES: list[tuple[Any, str, str]] = [
    (b"{no json", "not JSON", "Expecting"),
    (b'{"fields": "a", "a": "caf\xe9"}', "not UTF-8", "byte 0xe9 at offset 25"),
    (b"[" * 100_000, "not JSON", "recursion"),
    (b'{"fields": "vision", "vision": [%s]}' % (b"1" * 5000), "not JSON", "4300 digits"),
    ([GOOD], "not an object", "got list"),
    ({"a": "Yes."}, "bad spec", "'fields': no such key; the line has 'a'"),
    ({}, "bad spec", "the line has none"),
    ({"fields": 3}, "bad spec", "got int; wanted a spec such as"),
    ({"fields": None}, "bad spec", "got NoneType"),
    ({"fields": []}, "bad spec", "a list that is empty"),
    ({"fields": ["a", 3], "a": "Yes."}, "bad spec", "or has other things"),
    ({"fields": ["a", ["a"]], "a": "Yes."}, "bad spec", "or has other things"),
    ({"fields": "a," * 70_000, "a": ""}, "bad spec", "70,001 fields; wanted at most 65,536"),
    (GOOD | {"fields": "[vision+question],a", "question": "Is it?"}, "missing field", "write [vision],[question]"),
    (GOOD | {"fields": "vision+a"}, "missing field", "codes cannot be joined with +"),
    (
        GOOD | {"fields": "[vision,a]"},
        "missing field",
        "'[vision': no such key; each field has brackets of its own",
    ),
    (GOOD | {"fields": "[vision], a"}, "missing field", "' a': no such key; a spec has no blanks around"),
    (GOOD | {"fields": "a+b"}, "missing field", "'b': no such key; the line has 'fields', 'a', 'vision'"),
    (GOOD | {"fields": "vision2"}, "missing field", "'vision2': no such key; the line has"),
    (GOOD | {"fields": ""}, "missing field", "'': no such key"),
    (GOOD | {"fields": "a,"}, "missing field", "'': no such key"),
    (GOOD | {"fields": "[]"}, "missing field", "'': no such key"),
    (GOOD | {"fields": "a+<|eos|>"}, "missing field", "'<|eos|>': no such key"),
    ({"fields": "\ud800"}, "missing field", "'\\ud800': no such key"),
    ({"fields": "x" * 1000}, "missing field", "xxx...': no such key"),
    (GOOD | {"a": 7}, "not a text", "'a': got int; wanted a string"),
    (GOOD | {"a": None}, "not a text", "got NoneType"),
    (GOOD | {"a": ["Yes."]}, "not a text", "codes stand under a key with the letters vision"),
    (GOOD | {"a": "half \ud800"}, "not a text", "'a': holds half of a surrogate pair"),
    (DEEP, "not a text", "got list"),
    ({"fields": "television", "television": "On."}, "not codes", "rename it: a text key may not contain vision"),
    (GOOD | {"vision": {"codes": []}}, "not codes", "got dict; wanted a list of codes"),
    (GOOD | {"vision": [_codes(1), _codes(1)]}, "not codes", "'vision'.0: got list; wanted one flat list"),
    (GOOD | {"vision": [*_codes(1)[:255], 1.0]}, "not codes", "'vision'.255: got float"),
    (GOOD | {"vision": [*_codes(1)[:255], True]}, "not codes", "'vision'.255: got bool"),
    (GOOD | {"vision": [*_codes(1)[:255], -1]}, "not codes", "'vision'.255: got -1; wanted 0 to 8191"),
    (GOOD | {"vision": [*_codes(1)[:255], 10**40]}, "not codes", "'vision'.255: got 1000"),
    (GOOD | {"vision": [*_codes(1), 8192, *_codes(1), 8193]}, "not codes", "leave the ends of frames out"),
    (GOOD | {"vision": [*_codes(1)[:255], 8192]}, "not codes", "'vision'.255: got 8192; wanted 0 to 8191"),
    (GOOD | {"vision": []}, "partial frame", "'vision': 0 codes; wanted whole frames of 256"),
    (GOOD | {"vision": _codes(1)[:255]}, "partial frame", "255 codes"),
    (GOOD | {"vision": [*_codes(4), 1]}, "partial frame", "1,025 codes"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_LINES)
def test_a_bad_line_is_counted_with_its_reason_and_the_next_is_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer, line: Any, reason: str, detail: str
) -> None:
    bad, good = _read(tmp_path, demo_tokenizer, line, GOOD)
    assert isinstance(bad, Rejection)
    assert (bad.key, bad.reason) == ("a.jsonl:1", reason) and detail in bad.detail
    assert (good.key, _flat(good)) == ("a.jsonl:2", reference(GOOD, GOOD["fields"]))
    write_store(tmp_path / "a.arrow", [bad, good])
    assert StoreFile(tmp_path / "a.arrow").rejections() == [bad]


def test_a_key_that_no_spec_names_may_hold_anything(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    (record,) = _read(tmp_path, demo_tokenizer, GOOD | {"id": 3, "vision_of": "a text", "b": [None]})
    assert _flat(record) == reference(GOOD, GOOD["fields"])


@pytest.mark.parametrize(
    ("once", "again"),
    [("[a]", "[a]" + ",[a]" * 200), ("a", "+".join(["a"] * 200)), ("vision", "vision" + ",vision" * 200)],
)
def test_a_spec_that_names_a_long_field_over_and_over_is_refused_before_memory_is_used(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, once: str, again: str
) -> None:
    monkeypatch.setattr(lwm_jsonl, "MAX_LINE", 50_000)
    row = {"a": "word " * 80, "vision": _codes(1)}
    good, bad = _read(tmp_path, demo_tokenizer, row | {"fields": once}, row | {"fields": again})
    assert isinstance(good, Record)
    assert isinstance(bad, Rejection) and (bad.key, bad.reason) == ("a.jsonl:2", "too large")


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_are_read_through_any_compression_and_blank_ones_counted(
    tmp_path: Path, demo_tokenizer: TextTokenizer, ending: str
) -> None:
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress}
    pack = packers.get(ending, zstandard.ZstdCompressor().compress)
    data = b"\r\n".join([json.dumps(GOOD).encode(), b"", b"  ", json.dumps(GOOD).encode()])
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(data))
    records = list(
        read_lwm_jsonl(_source(fields_from_example="fields"), 0, InputFile(str(path), path.name), demo_tokenizer)
    )
    assert [record.key for record in records] == [f"a.jsonl{ending}:1", f"a.jsonl{ending}:4"]
    assert {str(_flat(record)) for record in records} == {str(reference(GOOD, GOOD["fields"]))}


def test_the_lines_before_the_end_of_a_truncated_archive_are_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    line = zstandard.ZstdCompressor().compress(json.dumps(GOOD).encode() + b"\n")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(line * 2 + line[: len(line) // 2])
    source = _source(fields_from_example="fields")
    one, two, end = read_lwm_jsonl(source, 0, InputFile(str(path), path.name), demo_tokenizer)
    assert _flat(one) == _flat(two)
    assert isinstance(end, Rejection) and (end.key, end.reason) == ("a.jsonl.zst:3", "rest not read")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_is_no_archive_is_one_rejection(tmp_path: Path, demo_tokenizer: TextTokenizer, ending: str) -> None:
    (record,) = _read(tmp_path, demo_tokenizer, b"no archive at all", name=f"a.jsonl{ending}")
    assert isinstance(record, Rejection) and (record.key, record.reason) == (f"a.jsonl{ending}:1", "rest not read")


def test_a_line_longer_than_the_limit_is_passed_over(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE", 3000)
    long = GOOD | {"a": "a" * 3000}
    good, bad, last = _read(tmp_path, demo_tokenizer, GOOD, long, GOOD)
    assert isinstance(good, Record) and isinstance(last, Record) and last.key == "a.jsonl:3"
    assert isinstance(bad, Rejection) and (bad.key, bad.reason) == ("a.jsonl:2", "too large")
    assert bad.detail == f"a line of {len(json.dumps(long)) + 1:,} bytes; wanted 3,000 or fewer"


def _blocks(language: str) -> Iterator[str]:
    page = (ROOT / "docs" / "lwm-jsonl.md").read_text(encoding="utf-8")
    yield from re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def test_the_pages_lines_and_manifest_make_the_examples_it_draws(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    ((keys,),) = [yaml.safe_load(block)["sources"] for block in _blocks("yaml")]
    (block,) = _blocks("json")
    rows = [json.loads(line.replace("[17, 8001, ...]", json.dumps(_codes(2)))) for line in block.splitlines()]
    (tmp_path / "page.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = InputFile(str(tmp_path / "page.jsonl"), "page.jsonl")
    pair, answer = read_lwm_jsonl(LwmJsonl.model_validate(keys), 0, file, demo_tokenizer)
    assert _flat(pair) in [reference(rows[0], spec) for spec in rows[0]["fields"]]
    assert _flat(answer) == reference(rows[1], rows[1]["fields"])
    assert isinstance(answer, Record)
    assert demo_tokenizer.decode(answer.runs[1].tokens) == "You are a helpful assistant. USER: What is it?"
    assert [run.trained for run in answer.runs] == [False, False, False, False, False, True, True]


def test_the_page_lists_every_reason() -> None:
    page = (ROOT / "docs" / "lwm-jsonl.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"with one of these reasons: (.*?)\. See", page, flags=re.DOTALL)
    assert set(re.findall("`(.*?)`", listed)) == {reason for _, reason, _ in BAD_LINES} | {"rest not read", "too large"}
