"""The vision verbs through the command line: one file to codes and back, tokenizers, and a row's pictures."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from lwm_data.cli import app
from lwm_data.format.dataset import Dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record
from lwm_data.terminal import run_app
from lwm_data.vision.picture_files import write_frames
from lwm_data.vision.vqgan import VisionTokenizer, load_vision_tokenizer
from tests.tiny_vision import TINY, gradients, with_tokenizer, write_tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.yaml"
    write_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(spec: Path) -> VisionTokenizer:
    return load_vision_tokenizer(spec)


def output(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command prints; it must succeed."""
    capsys.readouterr()
    assert run_app(app, [str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that the command prints as it refuses its input."""
    capsys.readouterr()
    assert run_app(app, [str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_picture_becomes_codes_and_the_codes_its_reconstruction(
    tmp_path: Path, spec: Path, tokenizer: VisionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = gradients(1)
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    codes, sheet, back = tmp_path / "out" / "a.npy", tmp_path / "out" / "sheet.png", tmp_path / "back.png"
    said = output(capsys, "vision", "encode", tmp_path / "a.png", "--tokenizer", spec, "--out", codes, "--png", sheet)
    found = np.load(codes)
    np.testing.assert_array_equal(found, tokenizer.encode(pixels), strict=True)
    error = np.square(pixels.astype(float) - tokenizer.decode(found)).mean()
    psnr = 10 * np.log10(255**2 / error)
    assert f"1 frame, {len(np.unique(found))} of 500 codes used, PSNR {psnr:.2f} dB" in said
    assert str(codes) in said and str(sheet) in said
    output(capsys, "vision", "decode", codes, "--tokenizer", spec, "--out", back)
    with Image.open(back) as picture, Image.open(sheet) as both:
        np.testing.assert_array_equal(np.asarray(picture), tokenizer.decode(found)[0])
        np.testing.assert_array_equal(np.asarray(both)[:256], pixels[0])
        np.testing.assert_array_equal(np.asarray(both)[-256:], tokenizer.decode(found)[0])


def test_a_clip_is_sampled_and_comes_back_as_strip_animation_and_clip(
    tmp_path: Path, spec: Path, tokenizer: VisionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(gradients(8), tmp_path / "clip.mp4", 4.0)
    codes = tmp_path / "clip.json"
    encode = ("vision", "encode", tmp_path / "clip.mp4", "--tokenizer", spec, "--fps", 2, "--json")
    assert json.loads(output(capsys, *encode))["frames"] == 4
    told = json.loads(output(capsys, *encode, "--max-frames", 2, "--out", codes))
    assert told["frames"] == 2 and told["tokenizer"] == tokenizer.fingerprint
    assert np.array(json.loads(codes.read_text())).shape == (2, 256)
    for name in ("strip.png", "clip.gif", "again.mp4"):
        decode = ("vision", "decode", codes, "--tokenizer", spec, "--out", tmp_path / name, "--json")
        assert json.loads(output(capsys, *decode)) == {"frames": 2, "out": str(tmp_path / name)}
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.height == 256 and picture.width > 512
    again = json.loads(output(capsys, "vision", "encode", tmp_path / "again.mp4", "--tokenizer", spec, "--json"))
    assert again["frames"] == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jpg", b"no picture at all", "neither a picture nor a clip"),
        ("a.png", b"", "neither a picture nor a clip"),
        ("cut.png", None, "truncated"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(
    tmp_path: Path, spec: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes | None, message: str
) -> None:
    if data is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)).save(tmp_path / "whole.png")
        data = (tmp_path / "whole.png").read_bytes()[:9000]
    (tmp_path / name).write_bytes(data)
    assert message in refusal(capsys, "vision", "encode", tmp_path / name, "--tokenizer", spec)


def test_wrong_names_and_another_tokenizers_codes_are_refused(
    tmp_path: Path, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokenizer", spec)
    assert "no such file" in refusal(capsys, "vision", "encode", tmp_path / "none.png", *options)
    assert "a folder; wanted a picture or a clip" in refusal(capsys, "vision", "encode", tmp_path, *options)
    np.save(tmp_path / "high.npy", np.full((1, 256), 600, np.int32))
    decode = ("vision", "decode", tmp_path / "high.npy", *options, "--out")
    assert "is the tokenizer" not in refusal(capsys, *decode, tmp_path / "a.bmp")
    told = refusal(capsys, *decode, tmp_path / "a.png")
    assert "wanted 0 to 499" in told and "the tokenizer that it was encoded with?" in told
    assert not (tmp_path / "a.png").exists()
    Image.fromarray(gradients(1)[0]).save(tmp_path / "a.jpg")
    encode = ("vision", "encode", tmp_path / "a.jpg", *options)
    assert "wanted a name that ends in .npy or .json" in refusal(capsys, *encode, "--out", tmp_path / "a.txt")
    assert "ends in .png" in refusal(capsys, *encode, "--png", tmp_path / "b.jpg")


def test_weights_are_imported_and_give_the_same_codes(
    tmp_path: Path, spec: Path, tokenizer: VisionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    args = ("tokenizer", "import-vision", spec.with_suffix(".safetensors"), "--out", out)
    told = json.loads(output(capsys, *args, "--json"))
    mine = load_vision_tokenizer(out)
    assert told["fingerprint"] == mine.fingerprint and told["config"]["num_codes"] == TINY.num_codes
    for name, tensor in load_file(out.with_suffix(".safetensors")).items():
        np.testing.assert_array_equal(tensor.numpy(), tokenizer.model.state_dict()[name].numpy(), err_msg=name)
    assert told["sha256"][:12] in output(capsys, *args)
    output(capsys, *args, "--dtype", "bf16", "--name", "half")
    assert yaml.safe_load(out.read_text())["dtype"] == "bf16" and load_vision_tokenizer(out).spec.name == "half"
    (tmp_path / "page.html").write_text("<html>")
    args = ("tokenizer", "import-vision", tmp_path / "page.html", "--out", tmp_path / "b.yaml")
    assert "page.html" in refusal(capsys, *args) and not (tmp_path / "b.yaml").exists()


def test_a_tokenizer_is_trained_on_tars_pictures_and_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for number, frame in enumerate(gradients(3)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "2.png", "000.png")
        (folder / "2.png").write_bytes(b"broken")
        tar.add(folder / "2.png", "001.jpg")
    write_frames(gradients(4)[2:], folder / "clip.mp4", 2.0)
    out = tmp_path / "new" / "trained.yaml"
    args = ["tokenizer", "train-vision", folder / "*", "--out", out, "--steps", 2, "--keep-out", 3, "--note", "a test"]
    capsys.readouterr()
    assert run_app(app, [*map(str, args), "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    # 0.tar/000.png, 0.png, 1.png (kept out), clip.mp4; two files are broken
    assert (told["frames"], told["kept_out"], told["note"]) == (4, 1, "a test")
    assert "files left out: not an image 2" in printed.err
    assert out.read_text().startswith("# lwm-data tokenizer train-vision ") and "--keep-out 3" in out.read_text()
    assert load_vision_tokenizer(out).fingerprint == told["fingerprint"]
    assert not list(out.parent.glob(".*"))
    assert "not an image 1" in refusal(capsys, "tokenizer", "train-vision", folder / "2.png", "--out", out)
    assert "ends in .yaml" in refusal(capsys, "tokenizer", "train-vision", folder / "2.png", "--out", tmp_path / "a")


@pytest.fixture(scope="module")
def dataset(
    dataset_of: Callable[..., Dataset],
    demo_tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    spec: Path,
) -> Dataset:
    """Row 0: text, row 1: a picture."""
    folder = tmp_path_factory.mktemp("dataset")
    words = demo_tokenizer.encode("A cat on a mat. " * 90)
    picture = vision_runs(demo_tokenizer, np.arange(256, dtype=np.int32)[np.newaxis], trained=True)
    records = [
        Record("text", text_runs(demo_tokenizer, [(words, True)], eos=True)),
        Record("cat", (*text_runs(demo_tokenizer, [(words[:200], True)], eos=False), *picture)),
    ]
    made = dataset_of(folder, records, max(len(words) + 2, 600))
    assert len(made) == 2
    return with_tokenizer(made, load_vision_tokenizer(spec).spec)


def test_show_writes_a_rows_pictures_and_lists_them(
    dataset: Dataset, tmp_path: Path, tokenizer: VisionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads(output(capsys, "show", dataset.url, 1, "--png", tmp_path / "a", "--json"))
    path = tmp_path / "a" / "row000001-segment01.png"
    assert told["png"] == [str(path)]
    with Image.open(path) as picture:
        np.testing.assert_array_equal(
            np.asarray(picture), tokenizer.decode(np.arange(256, dtype=np.int32)[np.newaxis])[0]
        )
    assert "1 picture written" in output(capsys, "show", dataset.url, 1, "--png", tmp_path / "b")
    assert "row 0 has no picture or video" in output(capsys, "show", dataset.url, 0, "--png", tmp_path / "c")
    assert "wanted a ROW" in refusal(capsys, "show", dataset.url, "--png", tmp_path / "c")


def test_showing_text_or_words_for_pictures_needs_no_torch(dataset: Dataset) -> None:
    code = (
        "import sys; from lwm_data.cli import app; from lwm_data.terminal import run_app; "
        f"codes = [run_app(app, ['show', {dataset.url!r}, str(row)]) for row in (0, 1)]; "
        "print(codes, {'torch', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "[vision 257 tokens: 1 frame]" in words and "--png FOLDER" in words
    assert done.stdout.splitlines()[-1] == "[0, 0] set()"
