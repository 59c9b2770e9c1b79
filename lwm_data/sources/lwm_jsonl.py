"""The release's own JSON lines: keys hold texts or lists of VQGAN codes, a spec says how they make an example.

{"fields": "[question],[vision],answer", "question": "What is it?", "vision": [17, 8001, ...], "answer": "A barn."}

<s>   What is it?   <vision> 17 8001 ... EOV </vision>   A barn.   </s>
 -    |---------------- not trained ----------------|    |-- trained --|

    a,b     fields in turn, each encoded alone          <|bos|>, <|eos|>    that one id
    a+b     texts joined, then encoded                  vision, vision2     codes: a key with these letters
    [a]     not trained: delimiters, EOF and EOV too    [<|eos|>]           not trained either

BOS goes before, never trained; EOS goes after, always trained. Token for token and mask for mask what the release's
loader makes of the same line (its mask is that of the target, as `trained` is). Other than there: a partial last
frame and codes that are none are rejections, not dropped or let through; and where a line has several specs, one is
drawn as a function of (seed, source, file, line), by the first number of Python's `random.Random` seeded with their
names. The release draws by the line's number alone, so that every such file has the same order of specs.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Int32

from lwm_data.format.example import Run, vision_runs
from lwm_data.format.vocab import CODES_PER_FRAME, EOF, TextTokenizer
from lwm_data.manifest_sources import LwmJsonl
from lwm_data.sources.files import InputFile
from lwm_data.sources.fit import evenly
from lwm_data.sources.json_lines import MAX_LINE, holds_half_a_pair, read_json_lines
from lwm_data.sources.record import Record, Rejection

VERSION = 2  # raise it when the same file gives other tokens
MAX_FIELDS = 1 << 16  # of one spec
VISION = "vision"  # the letters that make a key one of codes


class _Refused(Exception):
    """A line that is no example: its reason, one of few, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def read_lwm_jsonl(
    source: LwmJsonl, seed: int, file: InputFile, tokenizer: TextTokenizer
) -> Iterator[Record | Rejection]:
    """A record of each line of `file`; blank lines are skipped."""
    for line in read_json_lines(file):
        if isinstance(line, Rejection):
            yield line
            continue
        try:
            spec = _spec(source, line.value, f"{seed}/{source.name}/{line.key}")
            record: Record | Rejection = Record(line.key, _runs(source, line.value, spec, tokenizer))
        except _Refused as refused:
            record = Rejection(line.key, refused.reason, refused.detail)
        yield record


def _spec(source: LwmJsonl, row: Any, draw: str) -> str:
    """The spec of this line; where there are several, the one that `draw` names."""
    if not isinstance(row, dict):
        raise _Refused("not an object", f"got {type(row).__name__}; wanted a JSON object")
    if source.fields_from_example is None:
        assert source.fields is not None, "the manifest has one of the two"
        return source.fields
    name = source.fields_from_example
    if name not in row:
        raise _Refused("bad spec", f"{_shown(name)}: no such key; the line has {_keys(row)} (fields_from_example)")
    specs = row[name]
    if isinstance(specs, str):
        return specs
    if not isinstance(specs, list) or not specs or not all(isinstance(spec, str) for spec in specs):
        got = "a list that is empty or has other things" if isinstance(specs, list) else type(specs).__name__
        raise _Refused("bad spec", f"{_shown(name)}: got {got}; wanted a spec such as '[question],answer', or a list")
    # The first number of a seed is the same in every version of Python; choice() is not promised to be.
    return str(specs[int(Random(draw).random() * len(specs))])


def _runs(source: LwmJsonl, row: dict[str, Any], spec: str, tokenizer: TextTokenizer) -> tuple[Run, ...]:
    fields = spec.split(",")
    if len(fields) > MAX_FIELDS:
        raise _Refused("bad spec", f"{len(fields):,} fields; wanted at most {MAX_FIELDS:,}")
    specials = {"<|bos|>": tokenizer.bos, "<|eos|>": tokenizer.eos}
    stray = _ids(tokenizer.bos) if source.stray_bos else np.zeros(0, np.int32)
    runs = [Run(_ids(tokenizer.bos), is_vision=False, trained=False)]
    room = MAX_LINE  # for texts and codes: a spec that names a long one again and again is no example
    for i, field in enumerate(fields):
        masked = field.startswith("[") and field.endswith("]")
        name, trained = (field[1:-1], False) if masked else (field, True)
        if name in specials:
            runs.append(Run(_ids(specials[name]), is_vision=False, trained=trained))
        elif VISION in name:
            frames = _frames(row, name)
            room -= frames.size
            if source.max_frames is not None and len(frames) > source.max_frames:
                frames = frames[evenly(len(frames), source.max_frames)]
            start, block, end = vision_runs(tokenizer, frames, trained=trained)
            runs += [_after(stray, start), block, _after(stray, end)]
        else:
            texts = [_text(row, key) for key in name.split("+")]
            room -= sum(map(len, texts)) + len(source.subfield_separator) * (len(texts) - 1)
            if room >= 0:
                text = source.subfield_separator.join(texts)
                ids = tokenizer.encode(source.prepend_text + text if i == 0 else text)
                runs.append(_after(stray, Run(ids, is_vision=False, trained=trained)))
        if room < 0:
            raise _Refused("too large", f"its fields come to more than {MAX_LINE:,} characters and codes")
    runs.append(Run(_ids(tokenizer.eos), is_vision=False, trained=True))
    return tuple(run for run in runs if len(run.tokens))


def _text(row: dict[str, Any], name: str) -> str:
    text = _value(row, name)
    if not isinstance(text, str):
        hint = f"; codes stand under a key with the letters {VISION}" if isinstance(text, list) else ""
        raise _Refused("not a text", f"{_shown(name)}: got {type(text).__name__}; wanted a string{hint}")
    if holds_half_a_pair(text):
        raise _Refused("not a text", f"{_shown(name)}: holds half of a surrogate pair")
    return text


def _frames(row: dict[str, Any], name: str) -> Int32[np.ndarray, "frames codes"]:
    codes = _value(row, name)
    if not isinstance(codes, list):
        hint = f"; rename it: a text key may not contain {VISION}" if isinstance(codes, str) else ""
        raise _Refused("not codes", f"{_shown(name)}: got {type(codes).__name__}; wanted a list of codes{hint}")
    if set(map(type, codes)) - {int}:
        i = next(i for i, code in enumerate(codes) if type(code) is not int)
        raise _Refused("not codes", f"{_shown(name)}.{i}: got {type(codes[i]).__name__}; wanted one flat list of ints")
    if codes and (min(codes) < 0 or max(codes) >= EOF):
        i = next(i for i, code in enumerate(codes) if not 0 <= code < EOF)
        hint = "; leave the ends of frames out" if codes[i] in (EOF, EOF + 1) else ""
        raise _Refused("not codes", f"{_shown(name)}.{i}: got {str(codes[i])[:40]}; wanted 0 to {EOF - 1}{hint}")
    if not codes or len(codes) % CODES_PER_FRAME:
        raise _Refused(
            "partial frame", f"{_shown(name)}: {len(codes):,} codes; wanted whole frames of {CODES_PER_FRAME}"
        )
    return np.array(codes, np.int32).reshape(-1, CODES_PER_FRAME)


def _value(row: dict[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    if VISION in name and "+" in name:
        hint = "codes cannot be joined with +; write [vision],[question] for [vision+question]"
    elif name.startswith("[") or name.endswith("]"):
        hint = "each field has brackets of its own; write [a],[b] for [a,b]"
    elif name != name.strip():
        hint = "a spec has no blanks around its names"
    else:
        hint = f"the line has {_keys(row)}"
    raise _Refused("missing field", f"{_shown(name)}: no such key; {hint}")


def _keys(row: dict[str, Any]) -> str:
    names = [_shown(name) for name in list(row)[:8]]
    return ", ".join([*names, "..."] if len(row) > 8 else names) or "none"


def _shown(text: str) -> str:
    """As a person reads it, on one line; a repr has no half of a surrogate pair."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _ids(number: int) -> Int32[np.ndarray, " 1"]:
    return np.array([number], np.int32)


def _after(stray: Int32[np.ndarray, " n"], run: Run) -> Run:
    """`run` with `stray` before it."""
    return Run(np.concatenate([stray, run.tokens]), run.is_vision, run.trained) if len(stray) else run
