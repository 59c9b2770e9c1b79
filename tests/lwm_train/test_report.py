"""The report: one page that loads nothing, escapes what it is given, and shows every number it was given."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lwm_data.format.dataset import Dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record
from lwm_data.vision.page_pictures import FRAMES, HEIGHT, Pictures
from lwm_train.batch import Batch
from lwm_train.config import Shares
from lwm_train.evaluate.heldout import HeldoutLoss
from lwm_train.evaluate.needle import NeedleAnswer, NeedleResult
from lwm_train.loss import loss_and_sums
from lwm_train.metrics import vision_share
from lwm_train.report import HeldoutPoint, ReportContent, Sample, StageFacts, write_report
from lwm_train.report_lines import loss_chart, mean_share, rate_chart, read_metrics, share_chart
from lwm_train.report_rows import DrawnRow, Piece, draw_rows
from tests.tiny_vision import TINY, with_tokenizer, write_tiny_tokenizer

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)> \"' & {{ 7 * 7 }} https://evil.example/x.js"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> where {self.open[-3:]} are open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory,
    demo_tokenizer: TextTokenizer,
    corpus_text: str,
    dataset_of: Callable[..., Dataset],
) -> Dataset:
    rng = np.random.default_rng(0)
    records = []
    for i in range(12):
        prompt = demo_tokenizer.encode(corpus_text[900 * i : 900 * i + 500] + HOSTILE)
        answer = demo_tokenizer.encode(corpus_text[900 * i + 500 : 900 * i + 600 + 20 * i])
        runs = text_runs(demo_tokenizer, [(prompt, False), (answer, True)], eos=True)
        if i == 4:
            image = vision_runs(demo_tokenizer, rng.integers(0, 8192, (1, 256), dtype=np.int32), trained=True)
            runs = (*runs[:1], *image, *runs[1:])
        records.append(Record(f"{i}", runs))
    return dataset_of(tmp_path_factory.mktemp("report"), records, 1024)


def write_metrics(path: Path, stages: dict[str, int]) -> Path:
    with path.open("w") as file:
        for stage, steps in stages.items():
            for step in range(1, steps + 1):
                loss = 2 + 5 * math.exp(-step / 10)
                line = {"stage": stage, "step": step, "loss": loss - 0.5, "text_loss": loss, "vision_loss": None,
                        "lr": 1e-3 / step, "grad_norm": 1.0, "tokens": 512, "tokens_per_s": 1234.0,
                        "time": float(step)}  # fmt: skip
                file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture
def content(tmp_path: Path, dataset: Dataset) -> ReportContent:
    answers = tuple(
        NeedleAnswer(length, depth, i, length - 1, "Lima", 1_000_000 + 10 * length + i, f"tail {HOSTILE}", text, right)
        for length in (256, 512)
        for depth in (0.0, 1.0)
        for i, (text, right) in enumerate([(f"is {1_000_000 + 10 * length} {HOSTILE}", True), (HOSTILE, False)])
    )
    return ReportContent(
        title=f"Report {HOSTILE}",
        facts={f"device {HOSTILE}": HOSTILE},
        stages=(
            StageFacts("short", 60, 30_720, 3_456_789, 4, f"sp 4 {HOSTILE}", 61.4, HOSTILE, f"seed: 0\n{HOSTILE}"),
            StageFacts("long", 30, 15_361, 3_456_789, 4, "sp 4", 33.2, "demo-long", "seed: 1"),
        ),
        metrics=(write_metrics(tmp_path / "metrics.jsonl", {"short": 60, "long": 30}),),
        datasets={f"trained on {HOSTILE}": (dataset,)},
        heldout_points=(HeldoutPoint("short", 60, 3.987), HeldoutPoint("long", 30, 3.765)),
        heldout=HeldoutLoss(3.7654, 0.3217, 132_766, 7.8912, 0.0123, 4_567),
        unigram_loss=6.0123,
        bigram_loss=4.4321,
        needle=NeedleResult((256, 512), (0.0, 1.0), 2, ((0.5, 0.5), (0.5, 1.0)), answers),
        samples=(Sample(HOSTILE, f"wrote {HOSTILE}"),),
    )


@pytest.fixture
def page(tmp_path: Path, content: ReportContent) -> str:
    write_report(tmp_path / "report.html", content)
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "img", "base"})
    attributes = [(name, value or "") for _, attrs in parsed.tags for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1
    for css in [*style, *(value for name, value in attributes if name == "style")]:
        assert "url(" not in css and "@import" not in css and "//" not in css


def test_hostile_text_is_shown_as_text(page: str) -> None:
    parsed = Page(page)
    assert "<script" not in page and "<img" not in page
    assert parsed.words.count(HOSTILE) >= 15  # title, facts, stages, role, needles, samples
    assert "49" not in re.findall(r"Report .*", parsed.words)[0]


def test_every_number_is_on_the_page(page: str, content: ReportContent, dataset: Dataset) -> None:
    words = Page(page).words
    wanted = ["3,456,789", "30,720", "15,361", "46,081", "61 s", "33 s", "3.765", "32.2%", "132,766", "7.891", "4,567"]
    wanted += ["6.012", "4.432", "3.987", "9,000,000", "256", "512", "50%", "1/2", "100%", "2/2", "1,234"]
    info = dataset.info
    wanted += [f"{n:,}" for n in (info.num_rows, info.row_length, info.num_tokens, info.num_trained)]
    wanted += [info.fingerprint[:12], info.tokenizer_fingerprint[:12], info.build_fingerprint[:12]]
    made = info.sources["made"].model_dump(exclude={"reasons"})
    wanted += [f"{n:,}" for n in made.values()]
    wanted += ["wanted 1002560", "wanted 1002561"]
    assert [number for number in wanted if number not in words] == []


def test_parts_that_were_not_measured_leave_no_trace(tmp_path: Path, content: ReportContent) -> None:
    (tmp_path / "none.jsonl").write_text("")
    bare = replace(
        content, stages=(), metrics=(tmp_path / "none.jsonl",), datasets={}, heldout_points=(), heldout=None,
        unigram_loss=None, bigram_loss=None, needle=None, samples=(),
    )  # fmt: skip
    write_report(tmp_path / "bare.html", bare)
    words = Page((tmp_path / "bare.html").read_text(encoding="utf-8")).words
    assert not [word for word in ("Loss", "Needle", "Samples", "Rows", "Stages", "None", "nan") if word in words]


def test_stages_follow_each_other_and_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", {"short": 3, "long": 2})
    again = {"stage": "short", "step": 2, "text_loss": 9.0}
    with path.open("a") as file:
        file.write(json.dumps(again) + "\n" + '{"stage": "long", "st')  # killed while it wrote
    metrics = read_metrics(path)
    assert [(m["stage"], m["step"], m["x"]) for m in metrics] == [
        ("short", 1, 1), ("short", 2, 2), ("short", 3, 3), ("long", 1, 4), ("long", 2, 5),
    ]  # fmt: skip
    assert metrics[1]["text_loss"] == 9.0
    chart = loss_chart(metrics, [("long", 2, 3.0)], [("bigram", 4.0)])
    assert chart is not None
    assert chart.borders == [(0.0, "short"), (60.0, "long")]
    assert [(x, label) for x, _, label in chart.marks] == [(100.0, "3.000")]
    places = [float(v) for _, _, path in chart.lines for v in re.findall(r"[\d.]+", path)]
    assert min(places) >= 0 and max(places) <= 100


def test_stages_of_one_name_in_two_runs_stay_apart(tmp_path: Path) -> None:
    metrics = read_metrics(write_metrics(tmp_path / "a.jsonl", {"s": 2}), write_metrics(tmp_path / "b.jsonl", {"s": 2}))
    assert [(m["step"], m["x"]) for m in metrics] == [(1, 1), (2, 2), (1, 3), (2, 4)]
    chart = loss_chart(metrics, [], [])
    assert chart is not None and chart.borders == [(0.0, "s"), (50.0, "s")]


def test_a_long_run_is_thinned_and_a_run_of_nan_still_draws(tmp_path: Path) -> None:
    metrics = read_metrics(write_metrics(tmp_path / "m.jsonl", {"short": 5000}))
    chart = rate_chart(metrics)
    assert chart is not None
    points = chart.lines[0][2].count("L")
    assert 300 < points < 700 and chart.lines[0][2].split("L")[-1].startswith("100.0 ")
    for step in metrics:
        step["text_loss"] = step["loss"] = math.nan
    assert loss_chart(metrics, [], []) is None


def test_a_broken_metrics_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", {"short": 2})
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"m.jsonl:1: not a line of metrics"):
        read_metrics(path)


def places(drawn: DrawnRow) -> list[tuple[int, Piece]]:
    """(first token, piece) of all that is listed of a row."""
    found = []
    for start, pieces in drawn.stretches:
        for piece in pieces:
            found.append((start, piece))
            vision = re.match(r"\[vision ([\d,]+) tokens: ", piece.text)
            start += int(vision[1].replace(",", "")) if vision else 1
    return found


def test_a_drawn_row_is_the_row(dataset: Dataset, demo_tokenizer: TextTokenizer) -> None:
    for drawn in draw_rows(dataset, {"made": 0}, Pictures()):
        arrays = dataset[drawn.row]
        trained = arrays["loss_weights"] > 0
        assert drawn.num_trained == trained.sum() and drawn.num_padding == (arrays["segment_ids"] == 0).sum()
        assert sum(block.width for block in drawn.blocks) == pytest.approx(100, abs=0.02)
        firsts = len(np.unique(arrays["segment_ids"])) / len(trained)  # drawn with their run, though they weigh 0
        drawn_trained = sum(b.width for b in drawn.blocks if b.is_trained)
        assert 100 * trained.mean() - 0.02 <= drawn_trained <= 100 * (trained.mean() + firsts) + 0.02
        assert sum(b.width for b in drawn.blocks if b.is_vision) == pytest.approx(
            100 * arrays["vision_mask"].mean(), abs=0.02
        )
        assert len(drawn.borders) == drawn.num_segments - 1 + (drawn.num_padding > 0)
        assert any(piece.strength for _, pieces in drawn.stretches for piece in pieces)
        for at, piece in places(drawn):
            token = int(arrays["tokens"][at])
            is_vision = bool(arrays["vision_mask"][at])
            special = is_vision or token in (demo_tokenizer.bos, demo_tokenizer.eos)
            assert (piece.strength > 0, piece.is_special) == (trained[at], special)
            assert (f"tokens {at:,} to {at + 256:,}," if is_vision else f" {token}, token {at:,},") in piece.title


def test_a_naive_row_is_drawn_by_its_parts(
    tmp_path: Path, demo_tokenizer: TextTokenizer, corpus_text: str, dataset_of: Callable[..., Dataset]
) -> None:
    runs = text_runs(demo_tokenizer, [(demo_tokenizer.encode(corpus_text[:900]), True)], eos=True)
    dataset = dataset_of(tmp_path, [Record(f"{i}", runs) for i in range(5)], 200, packing="naive")
    for drawn in draw_rows(dataset, {"made": 3}, Pictures()):
        assert drawn.num_segments == 1
        assert {block.colour for block in drawn.blocks} <= {3, None}


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory,
    demo_tokenizer: TextTokenizer,
    corpus_text: str,
    dataset_of: Callable[..., Dataset],
) -> Dataset:
    """Many rows of text; one ends with a picture, another, in a later shard, is a video of 12 frames amid text."""
    folder = tmp_path_factory.mktemp("seen")
    codes = np.random.default_rng(0).integers(0, TINY.num_codes, (13, 256), dtype=np.int32)

    def text(i: int, num_tokens: int) -> list[tuple[np.ndarray, bool]]:
        ids = demo_tokenizer.encode(corpus_text[2000 * i : 2000 * i + 8 * num_tokens])
        return [(ids[: num_tokens // 2], False), (ids[num_tokens // 2 : num_tokens], True)]

    records = [Record(f"text {i}", text_runs(demo_tokenizer, text(i, 3800), eos=True)) for i in range(5)]
    picture = vision_runs(demo_tokenizer, codes[:1], trained=True)
    video = vision_runs(demo_tokenizer, codes[1:], trained=False)
    records.insert(2, Record("picture", (*text_runs(demo_tokenizer, text(5, 3000), eos=False), *picture)))
    after = text_runs(demo_tokenizer, text(6, 200), eos=True)[1:]
    records.insert(3, Record("video", (*text_runs(demo_tokenizer, text(7, 400), eos=False), *video, *after)))
    dataset = dataset_of(folder, records, 4096, rows_per_shard=20)
    return with_tokenizer(dataset, write_tiny_tokenizer(folder / "tiny.yaml"))


def test_a_picture_and_a_video_are_drawn_wherever_they_are_and_no_code_is_listed(seen: Dataset) -> None:
    drawn = draw_rows(seen, {"made": 0}, Pictures())
    assert len(drawn) == 3
    sizes = []
    for row in drawn:
        for at, piece in places(row):
            stretch = seen[row.row]["vision_mask"]
            assert (piece.picture is not None) == bool(stretch[at])
            if piece.picture is not None:
                kind, _, data = piece.picture.partition(",")
                assert kind == "data:image/jpeg;base64"
                with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
                    sizes.append((piece.text, picture.height, picture.width // HEIGHT))
                assert (piece.strength > 0) == ("1 frame]" in piece.text)
        assert sum(len(pieces) for _, pieces in row.stretches) < 400
    assert sorted(sizes) == [
        ("[vision 257 tokens: 1 frame]", HEIGHT, 1),
        ("[vision 3,084 tokens: 12 frames]", HEIGHT, FRAMES),
    ]


def test_a_report_has_pictures_within_it_and_no_more_than_some(
    tmp_path: Path, content: ReportContent, seen: Dataset
) -> None:
    one = replace(content, datasets={"trained on": (seen,)})
    write_report(tmp_path / "one.html", one)
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    images = [attrs for tag, attrs in Page(page).tags if tag == "img"]
    assert {image["alt"] for image in images} == {"[vision 257 tokens: 1 frame]", "[vision 3,084 tokens: 12 frames]"}
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    assert str(seen.info.vision_tokenizer_fingerprint)[:12] in Page(page).words
    write_report(tmp_path / "again.html", one)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page

    pictures = Pictures(most=2)
    block = np.append(np.arange(256), 8193)
    found = [pictures.picture(seen, block) for _ in range(4)]
    assert [uri is None for uri in found] == [False, False, True, True] and pictures.problems == {}


def test_what_cannot_be_drawn_is_told_once_and_the_report_stands(
    tmp_path: Path, content: ReportContent, seen: Dataset, dataset: Dataset
) -> None:
    pictures = Pictures()
    damaged = np.append(np.arange(200), 8193), np.concatenate([np.arange(300), [8193]])
    assert [pictures.picture(seen, block) for block in damaged] == [None, None]
    assert list(pictures.problems) == ["made"] and "a frame of 300 codes" in pictures.problems["made"]
    write_report(tmp_path / "none.html", replace(content, datasets={"trained on": (dataset,)}))
    words = Page((tmp_path / "none.html").read_text(encoding="utf-8")).words
    assert words.count("No pictures of made: the vision tokenizer of its codes is not in its folder") == 1


@pytest.mark.parametrize(
    "shares", [None, Shares(text=0.5, vision=0.5), Shares(text=0, vision=1), Shares(text=3, vision=1)]
)
@pytest.mark.parametrize("of_vision", ["none", "some", "all"])
def test_the_loss_is_the_mean_of_both_losses_by_the_share_of_vision(shares: Shares | None, of_vision: str) -> None:
    """The share is what the loss itself weighs vision with, which is computed elsewhere."""
    rng = np.random.default_rng(0)
    is_vision = {"none": np.zeros(40, bool), "some": rng.random(40) < 0.3, "all": np.ones(40, bool)}[of_vision]
    weights = rng.random(40).astype(np.float32) * (rng.random(40) < 0.8)
    batch = Batch(
        *[jnp.zeros((1, 40), jnp.int32)] * 4,
        *[jnp.asarray(a)[None] for a in (rng.integers(0, 9, 40), is_vision, weights)],
    )
    hidden, *heads = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 40, 8), (8, 16), (8, 16)))
    loss, sums = loss_and_sums(hidden, *heads, batch, shares)
    share = vision_share(float(sums.weights[0]), float(sums.weights[1]), shares)
    if share is None:
        assert (of_vision, float(loss)) == ("none", 0) and shares is not None and shares.text == 0
        return
    text, vision = (float(ce / max(w, 1e-30)) for ce, w in zip(sums.weighted_ce, sums.weights, strict=True))
    assert float(loss) == pytest.approx((1 - share) * text + share * vision, rel=1e-5)
    assert {"none": share == 0, "some": 0 < share <= 1, "all": share == 1}[of_vision]


def test_a_batch_without_a_trained_token_has_no_share() -> None:
    assert vision_share(0.0, 0.0, None) is None and vision_share(0.0, 0.0, Shares(text=1, vision=1)) is None


def test_the_share_of_vision_is_drawn_where_there_is_vision(tmp_path: Path, content: ReportContent) -> None:
    path = tmp_path / "mixed.jsonl"
    lines = [
        {"stage": "a", "step": i, "loss": 3.0, "text_loss": 2.0, "vision_loss": 4.0, "vision_share": 0.5}
        for i in range(1, 6)
    ]
    lines.append({"stage": "a", "step": 6, "loss": 2.0, "text_loss": 2.0, "vision_loss": None, "vision_share": 0.0})
    lines.append({"stage": "a", "step": 7, "loss": 0.0, "text_loss": None, "vision_loss": None, "vision_share": None})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = read_metrics(path)
    chart = share_chart(metrics)
    assert chart is not None and len(chart.lines) == 2
    assert mean_share(metrics) == pytest.approx(5 * 0.5 / 6)
    tops = [min(float(y) for y in re.findall(r" ([\d.]+)", path)) for _, _, path in chart.lines]
    assert tops[0] > tops[1], "4 of 6 nats are of vision, and half the weights"
    write_report(tmp_path / "mixed.html", replace(content, metrics=(path,)))
    page = (tmp_path / "mixed.html").read_text(encoding="utf-8")
    Page(page)
    assert "vision's share of the loss" in page and "42%</b><span>of the loss's weights on vision" in page

    old = read_metrics(write_metrics(tmp_path / "old.jsonl", {"a": 3}))
    assert share_chart(old) is None and mean_share(old) is None
    write_report(tmp_path / "old.html", content)
    assert "share of the loss" not in (tmp_path / "old.html").read_text(encoding="utf-8")
