"""The pool: what hangs, crashes or eats memory costs one item; order, content and memory are as without it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lwm_data.vision.decode_pool import CHUNK, Chunk, DecodePool, Failure, ImageRequest, VideoRequest, _Child
from lwm_data.vision.frames import decode_image, decode_video
from tests.lwm_data.vision.videos import number_of, write_audio, write_video

ROOT = Path(__file__).parents[3]
MEDIA = Path(__file__).parent / "media"
PHOTO = (MEDIA / "chelsea.jpg").read_bytes()
BOTTLES = (MEDIA / "bottles.mp4").read_bytes()


@pytest.fixture
def silent(tmp_path: Path) -> str:
    """A path from which nothing ever comes."""
    path = tmp_path / "silent.mp4"
    os.mkfifo(path)
    return str(path)


def decoders(parent: int) -> list[int]:
    """The living processes of the pools of `parent`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, its_parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                ours = b"decode_child" in (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(its_parent) == parent and state != "Z" and ours:
                found.append(int(entry.name))
    return found


def until(true: Callable[[], bool]) -> None:
    """Wait for what must come; a minute is for a machine that does much else."""
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("it did not come")


def outcome(result: Chunk | Failure) -> tuple[int, str]:
    return result.item, result.reason if isinstance(result, Failure) else "decoded"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_results_are_those_of_decoding_here_in_the_order_asked(num_processes: int) -> None:
    photo = Image.new("RGB", (400, 300), (1, 2, 3))
    file = io.BytesIO()
    photo.save(file, "PNG")
    requests: list[ImageRequest | VideoRequest] = [
        VideoRequest(BOTTLES, 25.0),
        ImageRequest(PHOTO),
        VideoRequest(str(MEDIA / "bottles.mp4"), 2.0, max_frames=3, start=1.0, end=4.0, decoder="decord"),
        ImageRequest(PHOTO[:9000]),
        VideoRequest(write_audio(), 4.0),
        *[ImageRequest(file.getvalue())] * 40,  # more than may be asked ahead
    ]
    here: list[list[np.ndarray] | str] = [
        list(decode_video(BOTTLES, fps=25, max_frames=None)),
        [decode_image(PHOTO)],
        list(decode_video(BOTTLES, fps=2, max_frames=3, start=1, end=4)),
        "truncated",
        "no video",
        *[[decode_image(file.getvalue())]] * 40,
    ]
    got: list[list[np.ndarray] | str] = []
    with DecodePool(num_processes, frames_ahead=CHUNK) as pool:
        ended = True
        for result in pool.decode(requests):
            assert result.item == len(got) - (not ended)
            if ended:
                got.append([])
            if isinstance(result, Failure):
                got[-1], ended = result.reason, True
            else:
                assert 1 <= len(result.frames) <= CHUNK
                got[-1] += list(result.frames)
                ended = result.last
    assert ended and len(got) == len(here)
    for one, other in zip(got, here, strict=True):
        assert one == other if isinstance(other, str) else np.array_equal(one, other)


def test_what_hangs_is_timed_out_and_the_rest_is_decoded(silent: str) -> None:
    requests = [ImageRequest(PHOTO), VideoRequest(silent, 4.0), ImageRequest(PHOTO), VideoRequest(silent, 4.0)]
    with DecodePool(1, hung_after=3.0) as pool:
        results = [outcome(result) for result in pool.decode([*requests, ImageRequest(PHOTO)])]
    assert results == [(0, "decoded"), (1, "timed out"), (2, "decoded"), (3, "timed out"), (4, "decoded")]


def test_a_file_has_a_processor_s_time_however_much_else_the_machine_does() -> None:
    """A process that is stopped for longer than its limit has used none of it; one that works on and on has."""
    long = VideoRequest(write_video([0, 33, 66]), 1e6, max_frames=10**6)
    with DecodePool(1, seconds_per_item=1.0, hung_after=1000.0) as pool:
        assert [outcome(result) for result in pool.decode([ImageRequest(PHOTO)])] == [(0, "decoded")]
        (child,) = decoders(os.getpid())
        os.kill(child, signal.SIGSTOP)
        threading.Timer(2.0, os.kill, (child, signal.SIGCONT)).start()
        assert [outcome(result) for result in pool.decode([ImageRequest(PHOTO)])] == [(0, "decoded")]
        *_, last = pool.decode([long])
    assert last == Failure(0, "timed out", "takes more than 1 s of a processor")


def test_a_file_that_makes_decord_fault_costs_one_item() -> None:
    whole = write_video([33 * number for number in range(12)], form="avi", codec="mpeg4")
    data = whole[: len(whole) * 68 // 100]
    data = data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]  # it says that it is whole
    requests = [VideoRequest(data, 4.0, decoder="decord"), ImageRequest(PHOTO), VideoRequest(data, 4.0)]
    with DecodePool(1) as pool:
        results = list(pool.decode(requests))
    assert results[0] == Failure(0, "decoder crashed", f"exit code {-signal.SIGSEGV}")
    assert [outcome(result) for result in results[1:]] == [(1, "decoded"), (2, "decoded")]  # by PyAV


def test_what_crashes_the_decoder_is_reported_and_the_rest_is_decoded(silent: str) -> None:
    with DecodePool(1) as pool:
        assert [outcome(result) for result in pool.decode([ImageRequest(PHOTO)])] == [(0, "decoded")]
        (child,) = decoders(os.getpid())
        results: list[tuple[int, str]] = []
        requests = [VideoRequest(silent, 4.0), ImageRequest(PHOTO)]
        thread = threading.Thread(target=lambda: results.extend(map(outcome, pool.decode(requests))))
        thread.start()
        writer = os.open(silent, os.O_WRONLY)  # waits until the process reads
        os.kill(child, signal.SIGSEGV)
        thread.join()
        os.close(writer)
    assert results == [(0, "decoder crashed"), (1, "decoded")]


def test_a_file_whose_process_was_killed_is_decoded_again() -> None:
    video = VideoRequest(write_video([0, 33, 66]), 9000.0)  # 891 frames: more than may wait
    with DecodePool(1, frames_ahead=CHUNK) as pool:
        whole = [number_of(frame) for chunk in pool.decode([video]) for frame in chunk.frames]  # type: ignore[union-attr]
        (child,) = decoders(os.getpid())
        results = pool.decode([video, ImageRequest(PHOTO)])
        chunks = [next(results) for _ in range(2)]
        os.kill(child, signal.SIGKILL)
        chunks += results
    *of_video, of_photo = chunks
    assert len(whole) > 800 and outcome(of_photo) == (1, "decoded") and {chunk.item for chunk in of_video} == {0}
    assert [number_of(frame) for chunk in of_video for frame in chunk.frames] == whole  # type: ignore[union-attr]


def test_a_second_kill_ends_the_run_and_tells_nothing_of_the_file(silent: str) -> None:
    with DecodePool(1) as pool:
        errors: list[BaseException] = []

        def decode() -> None:
            try:
                list(pool.decode([VideoRequest(silent, 4.0)]))
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=decode)
        thread.start()
        killed: set[int] = set()
        for _ in range(2):
            until(lambda: bool(set(decoders(os.getpid())) - killed))
            (child,) = set(decoders(os.getpid())) - killed
            writer = os.open(silent, os.O_WRONLY)  # waits until the process reads
            os.kill(child, signal.SIGKILL)
            os.close(writer)
            killed.add(child)
        thread.join()
    assert len(errors) == 1 and "was killed, twice" in str(errors[0])


@pytest.mark.parametrize("warm", [False, True])
def test_a_file_too_large_to_be_handed_over_costs_one_item(warm: bool) -> None:
    first = [ImageRequest(PHOTO)] if warm else []
    with DecodePool(1, max_memory=700 << 20) as pool:
        results = list(map(outcome, pool.decode([*first, VideoRequest(bytes(400 << 20), 4.0), ImageRequest(PHOTO)])))
    assert [reason for _, reason in results] == ["decoded"] * warm + ["out of memory", "decoded"]


def test_what_a_decoder_says_is_kept_as_utf_8() -> None:
    child = _Child(1.0, 1.0, 1 << 30)
    child.channel.close()
    child.channel, theirs = Pipe()
    theirs.send_bytes(json.dumps({"failure": ["damaged", "a tag: \ud800"]}).encode())
    child.item = 0
    result = child.receive()
    child.end()
    assert result == Failure(0, "damaged", r"a tag: \ud800")


def test_what_needs_too_much_memory_is_reported_and_the_rest_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("L", (13_000, 13_000)).save(file, "PNG", compress_level=1)
    requests = [ImageRequest(PHOTO), ImageRequest(file.getvalue()), ImageRequest(PHOTO)]
    with DecodePool(1, max_memory=700 << 20) as pool:
        results = [outcome(result) for result in pool.decode(requests)]
    assert results == [(0, "decoded"), (1, "out of memory"), (2, "decoded")]


def test_a_process_that_died_idle_costs_no_item() -> None:
    with DecodePool(1) as pool:
        for _ in range(2):
            assert [outcome(result) for result in pool.decode([ImageRequest(PHOTO)])] == [(0, "decoded")]
            (child,) = decoders(os.getpid())
            os.kill(child, signal.SIGKILL)
            stat = Path(f"/proc/{child}/stat")
            until(lambda stat=stat: ") Z " in stat.read_text())  # type: ignore[misc]


def test_time_stands_still_while_the_caller_is_busy() -> None:
    video = VideoRequest(write_video([0, 33, 66]), 9000.0)  # 891 frames: more than may wait
    with DecodePool(1, seconds_per_item=4.0, frames_ahead=CHUNK) as pool:
        results = pool.decode([video, ImageRequest(PHOTO)])
        first = next(results)
        time.sleep(4.5)
        rest = list(results)
    assert isinstance(first, Chunk) and not first.last
    assert [outcome(result) for result in rest[-2:]] == [(0, "decoded"), (1, "decoded")]
    numbers = [number_of(frame) for result in [first, *rest[:-1]] for frame in result.frames]  # type: ignore[union-attr]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2} and len(numbers) > 800


def test_requests_are_drawn_only_a_few_ahead() -> None:
    drawn = []

    def requests() -> Iterator[ImageRequest]:
        for number in range(2000):
            drawn.append(number)
            yield ImageRequest(PHOTO)

    with DecodePool(1) as pool:
        results = pool.decode(requests())
        next(results)
        time.sleep(1)
        results.close()  # type: ignore[attr-defined]
        assert len(drawn) < 400
        assert [outcome(result) for result in pool.decode([ImageRequest(PHOTO)])] == [(0, "decoded")]


def test_an_error_of_the_requests_comes_out_and_the_pool_goes_on() -> None:
    def requests() -> Iterator[ImageRequest]:
        yield ImageRequest(PHOTO)
        raise KeyError("mine")

    with DecodePool(1) as pool:
        with pytest.raises(KeyError, match="mine"):
            list(pool.decode(requests()))
        assert [outcome(result) for result in pool.decode([ImageRequest(PHOTO)])] == [(0, "decoded")]


def test_processes_load_neither_torch_nor_jax_and_ignore_ctrl_c() -> None:
    with DecodePool(1) as pool:
        requests = [ImageRequest(PHOTO), VideoRequest(BOTTLES, 1.0)]
        assert [outcome(result) for result in pool.decode(requests)] == [(0, "decoded"), (1, "decoded")]
        (child,) = decoders(os.getpid())
        loaded = Path(f"/proc/{child}/maps").read_text()
        assert "libavcodec" in loaded and "torch" not in loaded and "jax" not in loaded
        os.kill(child, signal.SIGINT)
        assert [outcome(result) for result in pool.decode(requests)] == [(0, "decoded"), (1, "decoded")]
        assert decoders(os.getpid()) == [child]
    assert decoders(os.getpid()) == []


def test_processes_end_with_a_parent_that_is_killed(silent: str) -> None:
    code = f"""
        from lwm_data.vision.decode_pool import DecodePool, ImageRequest, VideoRequest
        with DecodePool(2) as pool:
            for result in pool.decode([ImageRequest(b""), VideoRequest({silent!r}, 4.0)]):
                print("at work", flush=True)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"at work\n"
    pids = decoders(parent.pid)
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_process_that_cannot_start_is_an_error_not_a_list_of_bad_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecodePool(1) as pool, pytest.raises(RuntimeError, match="did not start"):
        list(pool.decode([ImageRequest(PHOTO)]))
