"""The manifest of question answering: which books, cut how, asked of which model, and what a pair must be.

kind: qa
name: demo
out: ../../runs/demo/qa
books: ../demo/novels/*.txt
text_tokenizer: ../../tokenizers/demo-text.yaml
prompt: prompts/questions.yaml
endpoint: {url: "http://127.0.0.1:8000/v1", model: demo}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, model_validator

from lwm_data.format.manifest import ManifestModel, ManifestPath, read_manifest

OUTPUT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(?:jsonl|jsonl\.zst|parquet)")
RESERVED = ("rejected.jsonl", "journal.jsonl")  # what else lies in the folder


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 (ValueError where it is no number)
    except ValueError:  # its message may hold a password
        raise ValueError("a URL, for instance http://127.0.0.1:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("http://... or https://..., for instance http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a URL without a name, password or query; the key comes from the environment (key_env)")
    return value.rstrip("/").removesuffix("/chat/completions")


def _output(value: str) -> str:
    if not OUTPUT.fullmatch(value) or value in RESERVED:
        raise ValueError("a file's name that ends in .jsonl, .jsonl.zst or .parquet")
    return value


def _extra(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if found := value.keys() & {"model", "messages", "stream"}:
        raise ValueError(f"other keys than {', '.join(sorted(found))}: the run sets these itself")
    return value


def _on_disk(value: str) -> str:
    if "://" in value:
        raise ValueError("a folder on disk, no URL; its journal is synced line by line")
    return value


class Endpoint(ManifestModel):
    """A server that speaks OpenAI's chat/completions."""

    url: Annotated[str, AfterValidator(_url)] = Field(description="of the API, mostly ending in /v1")
    model: str = Field(min_length=1, description="as the server calls it")
    concurrency: int = Field(default=8, ge=1, le=4096, description="requests at a time")
    timeout: float = Field(default=120.0, gt=0, description="seconds that one answer may take")
    attempts: int = Field(default=6, ge=1, le=100, description="after so many a chunk is counted as failed")
    max_wait: float = Field(default=60.0, gt=0, description="seconds between two attempts, unless the server says more")
    structured: Literal["auto", "always", "never"] = Field(
        default="auto", description="ask for JSON by its schema; auto: until the server refuses"
    )
    key_env: str | None = Field(
        default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key"
    )


class InProcess(ManifestModel):
    """A model in this process; no server."""

    transformers: ManifestPath = Field(description="folder of a causal language model in safetensors")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?|mps)$")


class Parameters(ManifestModel):
    """What a request says beside its messages; it is part of what makes an answer the answer it is."""

    temperature: float | None = Field(default=0.7, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=512, ge=1)
    seed: int | None = None
    extra: Annotated[dict[str, JsonValue], AfterValidator(_extra)] = Field(
        default={}, description="further keys of the request, as the server knows them"
    )


class Price(ManifestModel):
    """In any currency, per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class Budget(ManifestModel):
    """Of one run of the command; where it is spent, the run stops cleanly, and the next one goes on."""

    tokens: int | None = Field(default=None, ge=1, description="read and written")
    cost: float | None = Field(default=None, gt=0, description="in the currency of `price`")
    requests: int | None = Field(default=None, ge=1, description="sent, repeated ones too")


class Gates(ManifestModel):
    """What a pair must be to be kept."""

    grounded: float = Field(default=0.6, ge=0, le=1, description="share of the answer's words that the chunk must hold")
    judge: bool = Field(default=False, description="ask the same model whether the chunk holds the answer, too")
    question_characters: tuple[int, int] = (10, 400)
    answer_characters: tuple[int, int] = (1, 2000)
    self_contained: bool = Field(default=True, description="no question that cannot be understood without its chunk")
    same_language: bool = Field(default=True, description="the pair is in the book's language")
    unique: bool = Field(default=True, description="a question once in a book")

    @model_validator(mode="after")
    def _ordered(self) -> Gates:
        for name in ("question_characters", "answer_characters"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name}: [least, most], the least first")
        return self


class QaManifest(ManifestModel):
    """`kind: qa`."""

    kind: Literal["qa"]
    name: str = Field(min_length=1)
    out: Annotated[ManifestPath, AfterValidator(_on_disk)] = Field(description="folder of the pairs")
    output: Annotated[str, AfterValidator(_output)] = Field(
        default="qa.jsonl", description="name of the file of pairs in `out`: .jsonl, .jsonl.zst or .parquet"
    )
    books: ManifestPath = Field(description="glob of UTF-8 texts, one file one book")
    text_tokenizer: ManifestPath = Field(description="tokenizers/*.yaml; chunks are counted in its tokens")
    chunk_tokens: int = Field(default=1000, ge=16, description="the most tokens of one chunk")
    max_chunks: int | None = Field(default=None, ge=1, description="of each book, its first; for a trial")
    prompt: ManifestPath = Field(description="prompts/*.yaml")
    pairs_per_chunk: int = Field(default=1, ge=1, le=50)
    language: str = Field(default="auto", pattern="^(auto|[a-z]{2,3})$", description="of the books; auto: found out")
    endpoint: Endpoint | None = None
    in_process: InProcess | None = None
    parameters: Parameters = Parameters()
    price: Price | None = None
    budget: Budget = Budget()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _one_model(self) -> QaManifest:
        if (self.endpoint is None) == (self.in_process is None):
            raise ValueError("endpoint: a server, or in_process: a model here; one of the two")
        return self

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> QaManifest:
        if self.budget.cost is not None and self.price is None:
            raise ValueError("price: {input, output}, for budget.cost is counted by it")
        return self


class PromptTexts(ManifestModel):
    """A prompt in one language. `{chunk}`, `{pairs}`; the judge's `{chunk}`, `{question}`, `{answer}`."""

    system: str
    user: str
    judge: str

    @model_validator(mode="after")
    def _places(self) -> PromptTexts:
        for name, places in (("user", ("{chunk}",)), ("judge", ("{chunk}", "{question}", "{answer}"))):
            missing = [place for place in places if place not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name}: a text with {' and '.join(missing)} in it")
        return self


class QaPrompt(ManifestModel):
    """`kind: qa_prompt`: what a model is asked, in each language."""

    kind: Literal["qa_prompt"]
    name: str = Field(min_length=1)
    version: int = Field(ge=1, description="raise it when a text changes")
    languages: dict[str, PromptTexts] = Field(min_length=1, description="by ISO 639 code: en, de, ...")


def read_qa_manifest(path: str | Path, overrides: Sequence[str] = ()) -> QaManifest:
    """The manifest at `path` with `--set` overrides; ValueError names file, line, key, got and wanted."""
    manifest = read_manifest(path, {"qa": QaManifest}, overrides)
    assert isinstance(manifest, QaManifest)
    return manifest


def read_prompt(path: str | Path) -> QaPrompt:
    """The prompt file at `path`; ValueError names file, line, key, got and wanted."""
    prompt = read_manifest(path, {"qa_prompt": QaPrompt})
    assert isinstance(prompt, QaPrompt)
    return prompt
