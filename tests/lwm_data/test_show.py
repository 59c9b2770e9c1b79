"""What a person sees of a dataset is what it holds, and never steers the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, RenderableType
from rich.text import Text

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.packed import PackedSequence
from lwm_data.format.shard import ShardWriter
from lwm_data.format.vocab import TextTokenizer
from lwm_data.show import FRAME_COLUMNS, HINT, half_blocks, print_row, row_text, row_view, write_pngs
from lwm_data.sources.record import Record
from lwm_data.summary import dataset_table
from lwm_data.vision.dataset_tokenizer import dataset_vision_tokenizer
from lwm_data.vision.pictures import strip
from tests.tiny_vision import TINY, with_tokenizer, write_tiny_tokenizer

CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))]


def _drawn(renderable: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=200, color_system=None).print(renderable)
    return file.getvalue()


@pytest.fixture
def dataset(dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path) -> Dataset:
    """One row, of a text and a key that hold every control character."""
    ids = demo_tokenizer.encode("so \x1b[2J and " + "".join(CONTROLS))
    runs = text_runs(demo_tokenizer, [(ids, True)], eos=True)
    return dataset_of(tmp_path, [Record("key" + "".join(CONTROLS) + "end", runs)], row_length=len(ids) + 5)


def test_no_control_character_of_a_text_or_a_key_reaches_the_terminal(dataset: Dataset) -> None:
    drawn = _drawn(row_text(row_view(dataset, 0)))
    assert [char for char in drawn if char in CONTROLS and char not in "\n\t"] == []
    assert "\u241b[2J" in drawn
    (heading,) = [line for line in drawn.splitlines() if "segment 1" in line]
    assert "end" in heading, "a key is one line"


@pytest.mark.parametrize("name", ["x [/y]", "x [bold]y", "x [link=http://a]y", "x \x1b[2J"])
def test_a_dataset_of_any_name_has_a_table(dataset: Dataset, name: str) -> None:
    drawn = _drawn(dataset_table(dataset.info.model_copy(update={"name": name})))
    assert name.replace("\x1b", "\u241b") in drawn and "\x1b" not in drawn


def test_a_store_whose_package_is_missing_is_told_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"s3://bucket/data: .* not installed: pip install s3fs"):
        open_dataset("s3://bucket/data")


def test_two_writers_of_one_shard_do_not_touch_each_other(tmp_path: Path) -> None:
    """Process numbers do not tell builds in two containers apart; here both are this process."""
    runs = np.array([[8, 1, 0]], np.uint32)
    row = PackedSequence(np.arange(8, dtype=np.uint16), runs, np.ones(1, np.float32))
    path = tmp_path / "shard-000000.tar"
    with ShardWriter(path, 8, np.dtype(np.uint16)) as first:
        first.add(row)
        with ShardWriter(path, 8, np.dtype(np.uint16)) as second:
            second.add(row)
    assert first.sha256 == second.sha256 and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def pictures(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Dataset, np.ndarray]:
    """One row: a caption and a picture, a video of 5 frames, a text; and the codes of the 6 frames."""
    folder = tmp_path_factory.mktemp("pictures")
    codes = np.random.default_rng(0).integers(0, TINY.num_codes, (6, 256), dtype=np.int32)
    words = text_runs(demo_tokenizer, [(demo_tokenizer.encode("A cat on a mat."), True)], eos=False)
    records = [
        Record("cat", (*words, *vision_runs(demo_tokenizer, codes[:1], trained=True))),
        Record("clip", (*words, *vision_runs(demo_tokenizer, codes[1:], trained=False))),
        Record("text", words),
    ]
    dataset = dataset_of(folder, records, row_length=1700)
    return with_tokenizer(dataset, write_tiny_tokenizer(folder / "tiny.yaml")), codes


def _printed(dataset: Dataset, **options: Any) -> str:
    file = io.StringIO()
    print_row(dataset, 0, Console(file=file, width=80, **options))
    return file.getvalue()


def _segment_of(view: dict[str, Any], key: str) -> dict[str, Any]:
    (segment,) = [segment for segment in view["segments"] if segment["key"] == key]
    assert isinstance(segment, dict)
    return segment


def test_a_script_gets_the_number_of_frames_and_where_runs_begin(pictures: tuple[Dataset, np.ndarray]) -> None:
    dataset, _ = pictures
    view = row_view(dataset, 0)
    runs = [run for segment in view["segments"] for run in segment["runs"]]
    assert {run["num_frames"] for run in runs if run["vision"]} == {1, 5}
    assert not [run for run in runs if "num_frames" in run and not run["vision"]]
    vision = dataset[0]["vision_mask"]
    for run in runs:
        assert vision[run["start"] : run["start"] + run["num_tokens"]].tolist() == [run["vision"]] * run["num_tokens"]


@pytest.mark.parametrize(
    "options", [{}, {"force_terminal": True, "color_system": None}, {"force_terminal": True, "no_color": True}]
)
def test_without_colours_vision_is_told_in_words(pictures: tuple[Dataset, np.ndarray], options: dict[str, Any]) -> None:
    drawn = _printed(pictures[0], **options)
    assert "[vision 257 tokens: 1 frame]" in drawn and "[vision 1,285 tokens: 5 frames]" in drawn
    assert "\u2580" not in drawn and HINT in drawn.replace("\n", " ")


def test_a_terminal_of_colours_shows_the_picture_and_as_many_frames_as_fit(
    pictures: tuple[Dataset, np.ndarray],
) -> None:
    drawn = _printed(pictures[0], force_terminal=True, color_system="truecolor")
    lines = [line for line in Text.from_ansi(drawn).plain.split("\n") if "\u2580" in line]
    counts = [line.count("\u2580") for line in lines]
    view = row_view(pictures[0], 0)
    by_place = sorted([(_segment_of(view, "cat")["segment"], 1), (_segment_of(view, "clip")["segment"], 2)])
    assert counts == [n * FRAME_COLUMNS for _, n in by_place for _ in range(FRAME_COLUMNS // 2)]
    assert max(map(len, lines)) <= 80 and HINT not in drawn


def test_half_blocks_have_the_colours_of_the_pixels() -> None:
    flat = np.zeros((2, 256, 256, 3), np.uint8)
    flat[0, :128], flat[0, 128:] = (250, 10, 20), (30, 240, 50)
    flat[1, :, :128], flat[1, :, 128:] = (7, 8, 9), (200, 100, 0)
    text = half_blocks(flat)
    lines = text.split("\n")
    rows = [line for line in lines if "\u2580" in line.plain]
    assert len(rows) == 16 and {line.plain for line in rows} == {"\u2580" * 32 + " " + "\u2580" * 32}
    console = Console()

    def colours(row: int, column: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        style = rows[row].get_style_at_offset(console, column)
        assert style.color is not None and style.bgcolor is not None
        return tuple(style.color.get_truecolor()), tuple(style.bgcolor.get_truecolor())

    assert colours(0, 3) == ((250, 10, 20), (250, 10, 20)) and colours(15, 30) == ((30, 240, 50), (30, 240, 50))
    assert colours(5, 33) == ((7, 8, 9), (7, 8, 9)) and colours(5, 64) == ((200, 100, 0), (200, 100, 0))


def test_pngs_are_written_by_segment_with_what_the_codes_decode_to(
    pictures: tuple[Dataset, np.ndarray], tmp_path: Path
) -> None:
    dataset, codes = pictures
    paths = write_pngs(dataset, 0, tmp_path / "png")
    view = row_view(dataset, 0)
    cat, clip = (_segment_of(view, key)["segment"] for key in ("cat", "clip"))
    names = {f"row000000-segment{segment:02d}.png" for segment in (cat, clip)}
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "png").iterdir()} == names
    tokenizer = dataset_vision_tokenizer(dataset)
    assert tokenizer is not None
    for segment, held in ((cat, codes[:1]), (clip, codes[1:])):
        with Image.open(tmp_path / "png" / f"row000000-segment{segment:02d}.png") as png:
            np.testing.assert_array_equal(np.asarray(png), strip(tokenizer.decode(held), height=256))


def test_a_dataset_without_its_tokenizer_shows_the_rest_and_says_why(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    runs = vision_runs(demo_tokenizer, np.zeros((1, 256), np.int32), trained=True)
    two = (*text_runs(demo_tokenizer, [], eos=False), *runs, *runs)
    dataset = dataset_of(tmp_path, [Record("a", two)], 600)
    colours = {"force_terminal": True, "color_system": "truecolor"}
    for lacking in (dataset, with_tokenizer(dataset, write_tiny_tokenizer(tmp_path / "tiny.yaml"))):
        if lacking.info.vision_tokenizer_fingerprint is not None:
            assert [path.name for path in write_pngs(lacking, 0, tmp_path)] == [
                "row000000-segment01.png",
                "row000000-segment01-2.png",
            ]
            (Path(lacking.url) / "vision_tokenizer.yaml").unlink()
        drawn = " ".join(Text.from_ansi(_printed(lacking, **colours)).plain.split())
        assert drawn.count("[vision 257 tokens: 1 frame]") == 2 and "\u2580" not in drawn
        assert "Vision is not drawn" in drawn
        with pytest.raises(ValueError, match="codes need the vision tokenizer that they were made with"):
            write_pngs(lacking, 0, tmp_path)
