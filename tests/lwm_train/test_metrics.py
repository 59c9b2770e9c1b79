"""What a line of metrics counts, and what it takes for a warning."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.terminal import RunFailed
from lwm_train.batch import make_batch
from lwm_train.config import ModelSpec, TrainManifest
from lwm_train.flops import live_work, peak_flops, step_flops
from lwm_train.goodput import Goodput, goodput_share, read_sessions
from lwm_train.metrics import drop_metrics_after, is_spike
from lwm_train.train import _memory_explained
from tests.lwm_train.rows import packed_rows, random_examples


@given(st.integers(0, 50))
def test_pairs_are_those_of_a_token_and_one_of_its_segment_up_to_itself(seed: int) -> None:
    examples = random_examples(np.random.default_rng(seed), 5, 12, 60)
    batch = make_batch(packed_rows(examples, 64, 2, "token"))
    tokens, pairs = live_work(batch)
    by_hand = 0
    for row in np.asarray(batch.segment_ids):
        by_hand += sum(int(a == b) for i, a in enumerate(row) for b in row[: i + 1] if a > 0)
    assert int(tokens) == sum(example.num_tokens for example in examples)
    assert int(pairs) == by_hand


def test_model_flops_are_six_per_weight_and_token_and_twelve_per_pair_and_channel() -> None:
    config = ModelSpec(preset="7b").config(32_000)
    tokens, pairs = 4096, 4096 * 4097 / 2
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 12 * pairs * 32 * 4096
    assert step_flops(config, tokens, pairs, tokens, 0) == 6 * tokens * (layers + 4096 * 32_000) + attention


def test_a_peak_is_known_of_the_devices_in_the_table_alone() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("TPU v5 lite", "bf16") == 197e12
    assert peak_flops("cpu", "bf16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None


def test_a_loss_far_above_those_before_it_is_a_spike_and_a_noisy_one_is_not() -> None:
    noise = np.random.default_rng(0).normal(3, 0.1, 200).tolist()
    assert not any(is_spike(noise[i], deque(noise[max(0, i - 100) : i])) for i in range(200))
    assert is_spike(4.5, deque(noise[-100:]))
    assert not is_spike(4.5, deque(noise[:19]))  # too few to say
    assert not is_spike(math.nan, deque(noise[-100:]))


def test_lines_of_lost_steps_go_and_their_seconds_are_told(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0, "seconds": 0.5}) for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    assert drop_metrics_after(tmp_path, 5) == 1.5
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:5]


def test_goodput_leaves_out_what_was_lost_and_the_time_between_two_starts(tmp_path: Path) -> None:
    sessions = [
        {"began": 1000.0, "train": 60.0, "save": 10.0, "redone": 0.0, "wall": 80.0},
        {"began": 1100.0, "train": 50.0, "redone": 20.0, "wall": 100.0},
    ]
    assert goodput_share(sessions) == (60 + 50 - 20) / 200
    (tmp_path / "goodput.json").write_text(json.dumps({"sessions": sessions}))
    account = Goodput(tmp_path, is_writer=True)
    account.lap("train")
    assert len(read_sessions(tmp_path)) == 3
    (tmp_path / "goodput.json").write_text("[1")
    assert read_sessions(tmp_path) == []


def test_memory_that_is_not_there_is_explained() -> None:
    manifest = TrainManifest.model_validate(
        {"kind": "train", "name": "big", "out": "x", "model": {"preset": "tiny"}, "data": [{"dataset": "d"}]}
        | {"batch_rows": 8, "steps": 1}
    )
    with pytest.raises(RunFailed, match=r"big: a device's memory is too small.*batch_rows 8.*remat block.*`mesh`"):  # noqa: SIM117
        with _memory_explained(manifest):
            jax.block_until_ready(jnp.zeros(1 << 46, jnp.uint8))
