"""metrics.jsonl: a line for every step of a run.

    {"stage": "demo-short", "step": 12, "loss": ..., "text_loss": ..., "vision_loss": null, "vision_share": 0.0,
     "lr": ..., "grad_norm": ..., "spike": false, "tokens": 12288, "live_tokens": ..., "trained_tokens": ...,
     "seconds": ..., "tokens_per_s": ..., "trained_tokens_per_s": ..., "mfu": null, "seconds_waited": ...,
     "starvation": ..., "goodput": ..., "time": ...}

vision_share: of the loss's weights, those on vision: loss = (1 - vision_share) text_loss + vision_share vision_loss.
skipped: with `skip_nonfinite`, steps so far whose gradient was not finite; what is not finite in a line is null.
spike: the loss is above median + 6 x 1.4826 x median deviation + 0.1 of the up to 100 lines before it, 20 at least.
tokens: of the run so far, padding too. live_tokens, trained_tokens: of this step, without padding.
seconds: of this step alone; a start's first one compiles it. mfu: null where the devices' peak is not known (flops.py).
seconds_waited: of steps for data, since this start; starvation: their share of its time. time: since this start.
goodput: share of the run's wall time spent training, over all starts (goodput.py).
heldout: on the lines of steps that `evaluate` names, the loss there (evaluate/while_training.py).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lwm_data.format.atomic import write_whole
from lwm_data.terminal import RunFailed
from lwm_train.config import ModelConfig, Shares, TrainManifest
from lwm_train.flops import peak_flops, step_flops
from lwm_train.optimizer import make_schedule
from lwm_train.processes import is_first
from lwm_train.step import StepReport

METRICS = "metrics.jsonl"
SPIKE_LINES, SPIKE_MIN, SPIKE_DEVIATIONS, SPIKE_NATS = 100, 20, 6.0, 0.1


@dataclass(frozen=True)
class StepTimes:
    """seconds: of the step, compiling too where it is new. waited: for data since the start. goodput: 0 to 1."""

    seconds: float
    is_new: bool
    waited: float
    goodput: float


class MetricsLog:
    """metrics.jsonl, a line a step, and the note beside the progress bar."""

    def __init__(self, manifest: TrainManifest, config: ModelConfig, mesh: Mesh, run: Path, row_length: int) -> None:
        self._manifest, self._config, self._path = manifest, config, run / METRICS
        self._batch_tokens = manifest.batch_rows * row_length
        self._schedule = make_schedule(manifest.optimizer, manifest.steps)
        peak = peak_flops(mesh.devices.flat[0].device_kind, manifest.precision)
        self._peak = None if peak is None else peak * mesh.size
        lines = logged_steps(run)[-SPIKE_LINES:]
        self._losses = deque((line["loss"] for line in lines if line["loss"] is not None), SPIKE_LINES)
        self.loss: float | None = None
        self._tokens = 0

    def __enter__(self) -> MetricsLog:
        self._file = open(self._path, "a", encoding="utf-8") if is_first() else None
        self._begin = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(
        self,
        step: int,
        report: StepReport,
        work: tuple[jax.Array, jax.Array],
        times: StepTimes,
        heldout: dict[str, Any] | None,
    ) -> str:
        """Log one step; RunFailed when something of it is not finite. Returns the note.

        work: live tokens and live pairs of its batch (flops.py).
        """
        loss = float(report.loss)
        sums = report.sums
        elapsed = time.monotonic() - self._begin
        tokens, skipped = self._batch_tokens, int(report.num_skipped)
        by_modality = [
            float(ce) / float(weights) if weights > 0 else None
            for ce, weights in zip(sums.weighted_ce, sums.weights, strict=True)
        ]
        live_tokens, live_pairs = (float(x) for x in work)
        trained = [float(x) for x in sums.num_trained]
        flops = step_flops(self._config, live_tokens, live_pairs, *trained)
        line: dict[str, Any] = {
            "stage": self._manifest.name,
            "step": step,
            "loss": loss,
            "text_loss": by_modality[0],
            "vision_loss": by_modality[1],
            "vision_share": vision_share(float(sums.weights[0]), float(sums.weights[1]), self._manifest.loss.shares),
            "lr": float(self._schedule(max(0, step - 1 - skipped))),  # a skipped step does not move the schedule
            "grad_norm": float(report.grad_norm),
            "spike": is_spike(loss, self._losses),
            "tokens": step * tokens,
            "live_tokens": int(live_tokens),
            "trained_tokens": int(sum(trained)),
            "seconds": round(times.seconds, 5),
            "tokens_per_s": tokens / times.seconds,
            "trained_tokens_per_s": sum(trained) / times.seconds,
            "mfu": None if self._peak is None or times.is_new else flops / times.seconds / self._peak,
            "seconds_waited": round(times.waited, 4),
            "starvation": round(min(1.0, times.waited / elapsed), 5),
            "goodput": round(times.goodput, 5),
            "time": round(elapsed, 3),
        }
        limit = self._manifest.optimizer.skip_nonfinite
        if limit is not None:
            line["skipped"] = skipped
        line = {key: finite(value) if isinstance(value, float) else value for key, value in line.items()}
        if heldout is not None:
            line["heldout"] = heldout
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if limit is not None and 0 < int(report.skipped_in_a_row) < limit:
            return f"step {step} skipped: its gradient is not finite ({skipped} skipped so far)"
        if not bool(report.is_finite):
            raise RunFailed(
                f"{self._manifest.name}: step {step}: loss {loss:g}, gradient norm {float(report.grad_norm):g}, or a "
                "parameter after it, is not finite; nothing of it is saved: go on from the newest checkpoint with "
                f"another learning rate or clip (--allow optimizer), or look at its rows: `lwm-train replay "
                f"{self._path.parent} --step {step}`"
            )
        if line["spike"] and is_first():
            usual = statistics.median(self._losses)
            print(
                f"warning: step {step}: a loss of {loss:.3f}, where {usual:.3f} is usual", file=sys.stderr, flush=True
            )
        self._losses.append(loss)
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self._tokens += tokens
        return f"loss {self.loss:.3f}, {self._tokens / elapsed:,.0f} tokens/s"


def is_spike(loss: float, before: deque[float]) -> bool:
    """Whether the loss is far above those of the steps before it, by their median and median deviation."""
    if len(before) < SPIKE_MIN or not math.isfinite(loss):
        return False
    usual = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - usual) for x in before)
    return loss > usual + SPIKE_DEVIATIONS * deviation + SPIKE_NATS


def finite(value: float) -> float | None:
    """The value; None, as JSON has no other word for it, where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def vision_share(text: float, vision: float, shares: Shares | None) -> float | None:
    """What part of a batch's loss is on vision, by its sums of weights and the manifest's shares; None: of nothing."""
    if shares is not None:  # of what is there
        text, vision = shares.text * (text > 0), shares.vision * (vision > 0)
    return vision / (text + vision) if text + vision > 0 else None


def drop_metrics_after(run: Path, step: int) -> float:
    """Lines of steps that the checkpoint does not hold are forgotten; they will be done again. Returns the seconds
    that these steps took."""
    path = run / METRICS
    if not path.exists():
        return 0.0
    lines = logged_steps(run)
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
    return math.fsum(line.get("seconds", 0.0) for line in lines if line["step"] > step)


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none where there is none."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            line["step"], line["loss"]
            lines.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):  # the last line of a killed run can be cut
            continue
    return lines
