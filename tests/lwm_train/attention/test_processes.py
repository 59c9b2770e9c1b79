"""A ring over processes gives the same bits as a ring over as many devices of one process."""

import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ring_process.py")
ROOT = Path(__file__).parents[3]


def run(num_processes: int, devices_each: int) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(num_processes), str(process), str(devices_each)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )
        for process in range(num_processes)
    ]
    try:
        outputs = [each.communicate(timeout=120)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    assert all(each.returncode == 0 for each in started)
    return outputs[0].splitlines()[-1]


def test_two_and_four_processes_give_the_bits_of_one() -> None:
    assert run(2, 2) == run(4, 1) == run(1, 4)
