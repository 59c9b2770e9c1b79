"""The questions of an example of a `qa` source, beside their evidence, which its key finds in its tokens.

key      moby_dick.txt:0-31850 0.1@2%:12-961              tokens 12 to 961 of the example prove the answer of pair 0.1
runs     [USER: CHAPTER 3 ... Who hid the gold? ASSISTANT:] [ Ben Gunn.</s>]
                              the end of the prompt          what is trained
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lwm_data.format.dataset import Dataset
from lwm_data.report.evidence import ShownPair, marked
from lwm_data.sources.qa import asked_of
from lwm_data.summary import visible

PAIRS = 12  # of a segment
EVIDENCE, QUESTION = 6_000, 400  # characters
CONTEXT = 60  # tokens


def asked_pairs(dataset: Dataset, segment: Mapping[str, Any], tokens: np.ndarray, left_text: int) -> list[ShownPair]:
    """Some of the questions of a `qa` example, beside their evidence, of no more than `left_text` characters."""
    if dataset.info.packing == "naive":  # a piece does not say where in its example it begins
        return []
    runs = segment["runs"]
    answers = [number for number in range(1, len(runs)) if runs[number]["weight"] and not runs[number - 1]["weight"]]
    begin, tokenizer = runs[0]["start"], dataset.text_tokenizer
    end = begin + segment["num_tokens"]
    pairs: list[ShownPair] = []
    for number, (asked, run) in enumerate(zip(asked_of(segment["key"])[:PAIRS], answers, strict=False), start=1):
        start, stop = begin + asked.start, begin + asked.stop
        if not begin <= start < stop <= end or left_text <= 0:
            break
        before, chunk, after = (
            tokenizer.decode(tokens[max(begin, first) : min(end, last)].astype(np.int32))
            for first, last in ((start - CONTEXT, start), (start, stop), (stop, stop + CONTEXT))
        )
        question = runs[run - 1]["text"].strip().removeprefix("USER:").removesuffix("ASSISTANT:").strip()
        if len(question) > QUESTION:  # the context is in the same run; the question is its last line
            question = question[-QUESTION:].rpartition("\n")[2]
        answer = runs[run]["text"][:QUESTION].removesuffix("</s>").strip()
        most = min(EVIDENCE, left_text)
        pairs.append(
            ShownPair(
                question=visible(question, kept="\n\t"),
                answer=visible(answer, kept="\n\t"),
                book=f"question {number}",
                place=f"depth {asked.depth:.0%}, its evidence is tokens {asked.start:,} to {asked.stop:,}",
                before=visible(before, kept="\n\t"),
                parts=marked(visible(chunk[:most], kept="\n\t"), answer),
                after=visible(after, kept="\n\t") if len(chunk) <= most else "…",
            )
        )
        left_text -= min(len(chunk), most)
    return pairs
