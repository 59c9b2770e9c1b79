"""Chunks tile a book, in characters and in tokens, and end where a reader would end them."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.vocab import TextTokenizer
from lwm_data.qa.chunks import Chunk, Chunker
from tests.conftest import DEMO, ROOT


def cut(tokenizer: TextTokenizer, text: str, chunk_tokens: int) -> list[Chunk]:
    return list(Chunker(tokenizer, chunk_tokens).cut(text))


def check_tiles(tokenizer: TextTokenizer, text: str, chunk_tokens: int) -> list[Chunk]:
    chunks = cut(tokenizer, text, chunk_tokens)
    ids = tokenizer.encode(text)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for spans, end in (([c.chars for c in chunks], len(text)), ([c.tokens for c in chunks], len(ids))):
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == end
    for chunk in chunks:
        assert chunk.text == text[slice(*chunk.chars)]
        assert 0 < chunk.tokens[1] - chunk.tokens[0] <= chunk_tokens
        # The tokens of the span are the chunk's text: decoding takes off one blank before it.
        decoded = tokenizer.decode(ids[slice(*chunk.tokens)])
        assert decoded in (chunk.text, chunk.text.removeprefix(" "))
    return chunks


@given(st.text(st.sampled_from("ab .!?\n\t“”’…é漢。😀\u00a0\u0301Mr"), min_size=1, max_size=400), st.integers(16, 60))
def test_any_text_is_tiled(text: str, chunk_tokens: int) -> None:
    from lwm_data.format.vocab import load_text_tokenizer

    check_tiles(load_text_tokenizer("tokenizers/demo-text.yaml"), text, chunk_tokens)


@pytest.mark.parametrize("name", ["alice_in_wonderland", "heart_of_darkness"])
def test_a_novel_is_tiled_by_chunks_that_end_at_sentences(demo_tokenizer: TextTokenizer, name: str) -> None:
    text = (DEMO / "novels" / f"{name}.txt").read_text(encoding="utf-8")
    chunks = check_tiles(demo_tokenizer, text, 1000)
    ends = [chunk.text.rstrip()[-1] for chunk in chunks]
    paragraphs = sum(bool(re.search(r"\n\s*\n\s*$", chunk.text)) for chunk in chunks)
    assert paragraphs > 0.6 * len(chunks)
    assert sum(end in ".!?…’”)*'\"" for end in ends) > 0.9 * len(chunks)
    sizes = np.array([chunk.tokens[1] - chunk.tokens[0] for chunk in chunks])
    assert sizes[:-1].min() > 500


def test_a_sentence_longer_than_a_chunk_is_cut_at_a_word(demo_tokenizer: TextTokenizer) -> None:
    chunks = check_tiles(demo_tokenizer, "never again " * 100, 20)
    for chunk in chunks:
        assert set(chunk.text.split()) <= {"never", "again"}


def test_a_word_longer_than_a_chunk_is_cut_at_a_character(demo_tokenizer: TextTokenizer) -> None:
    chunks = check_tiles(demo_tokenizer, "漢" * 100, 16)
    assert {len(chunk.text) for chunk in chunks[:-1]} == {5}  # three bytes each


def test_a_title_or_an_initial_ends_no_sentence(demo_tokenizer: TextTokenizer) -> None:
    text = "It was late when they came home at last. Then Mr. J. Smith said that Dr. Jones had gone to see St. Paul."
    firsts = {cut(demo_tokenizer, text, chunk_tokens)[0].text.strip() for chunk_tokens in range(20, 36)}
    assert firsts == {"It was late when they came home at last."}


def test_a_paragraph_comes_before_a_sentence(demo_tokenizer: TextTokenizer) -> None:
    text = "He came in and sat down there.\n\nShe saw him. It was so. " + "All of them went away then. " * 4
    assert cut(demo_tokenizer, text, 20)[0].text == "He came in and sat down there.\n\n"


def test_a_book_is_cut_in_little_memory() -> None:
    text = (DEMO / "novels" / "alice_in_wonderland.txt").read_text(encoding="utf-8")
    program = f"""
import re
from lwm_data.format.vocab import load_text_tokenizer
from lwm_data.qa.chunks import Chunker
def most():  # bytes; of this program alone, unlike what getrusage says
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
text = open({str(DEMO / "novels" / "alice_in_wonderland.txt")!r}, encoding="utf-8").read()
chunker = Chunker(load_text_tokenizer("tokenizers/demo-text.yaml"), 1000)
sum(1 for _ in chunker.cut(text[:50_000]))
before = most()
sum(1 for _ in chunker.cut(text * 16))
print((most() - before) / len(text * 16))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(text) > 100_000
    assert float(ran.stdout) < 110  # bytes a character; by the tokenizer's own offsets it is 180
