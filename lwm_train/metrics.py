"""metrics.jsonl: a line for every step of a run.

    {"stage": "demo-short", "step": 12, "loss": ..., "text_loss": ..., "vision_loss": null, "vision_share": 0.0,
     "lr": ..., "grad_norm": ..., "tokens": 12288, "trained_tokens": ..., "tokens_per_s": ..., "seconds_waited": ...,
     "time": ...}

vision_share: of the loss's weights, those on vision: loss = (1 - vision_share) text_loss + vision_share vision_loss.
skipped: with `skip_nonfinite`, steps so far whose gradient was not finite; what is NaN in their lines is null.
tokens: of the run so far, padding too. seconds_waited: of steps for data, so far. time: seconds since this start.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from lwm_data.format.atomic import write_whole
from lwm_data.terminal import RunFailed
from lwm_train.config import Shares, TrainManifest
from lwm_train.optimizer import make_schedule
from lwm_train.step import StepReport

METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl, a line a step, and the note beside the progress bar."""

    def __init__(self, manifest: TrainManifest, run: Path, row_length: int) -> None:
        self._manifest, self._path = manifest, run / METRICS
        self._batch_tokens = manifest.batch_rows * row_length
        self._schedule = make_schedule(manifest.optimizer, manifest.steps)
        self.loss: float | None = None
        self._tokens = 0

    def __enter__(self) -> MetricsLog:
        self._file = open(self._path, "a", encoding="utf-8")
        self._begin = self._last = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, step: int, report: StepReport, seconds_waited: float) -> str:
        """Log one step; RunFailed when something of it is not finite. Returns the note."""
        loss = float(report.loss)
        sums = report.sums
        now = time.monotonic()
        tokens, skipped = self._batch_tokens, int(report.num_skipped)
        by_modality = [
            float(ce) / float(weights) if weights > 0 else None
            for ce, weights in zip(sums.weighted_ce, sums.weights, strict=True)
        ]
        line = {
            "stage": self._manifest.name,
            "step": step,
            "loss": loss,
            "text_loss": by_modality[0],
            "vision_loss": by_modality[1],
            "vision_share": vision_share(float(sums.weights[0]), float(sums.weights[1]), self._manifest.loss.shares),
            "lr": float(self._schedule(max(0, step - 1 - skipped))),  # a skipped step does not move the schedule
            "grad_norm": float(report.grad_norm),
            "tokens": step * tokens,
            "trained_tokens": int(sums.num_trained.sum()),
            "tokens_per_s": tokens / (now - self._last),
            "seconds_waited": round(seconds_waited, 4),
            "time": round(now - self._begin, 3),
        }
        limit = self._manifest.optimizer.skip_nonfinite
        if limit is not None:
            line["skipped"] = skipped
        self._last = now
        line = {key: None if value != value else value for key, value in line.items()}  # NaN is not JSON
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if limit is not None and 0 < int(report.skipped_in_a_row) < limit:
            return f"step {step} skipped: its gradient is not finite ({skipped} skipped so far)"
        if not bool(report.is_finite):
            raise RunFailed(
                f"{self._manifest.name}: step {step}: loss {loss:g}, gradient norm {float(report.grad_norm):g}, or a "
                "parameter after it, is not finite; nothing of it is saved: go on from the newest checkpoint with "
                "another learning rate or clip (--allow optimizer), or look at the rows of this step"
            )
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self._tokens += tokens
        return f"loss {self.loss:.3f}, {self._tokens / (now - self._begin):,.0f} tokens/s"


def vision_share(text: float, vision: float, shares: Shares | None) -> float | None:
    """What part of a batch's loss is on vision, by its sums of weights and the manifest's shares; None: of nothing."""
    if shares is not None:  # of what is there
        text, vision = shares.text * (text > 0), shares.vision * (vision > 0)
    return vision / (text + vision) if text + vision > 0 else None


def drop_metrics_after(run: Path, step: int) -> None:
    """Lines of steps that the checkpoint does not hold are forgotten; they will be done again."""
    path = run / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):  # the last line of a killed run can be cut
            continue
    write_whole(path, "".join(kept))
