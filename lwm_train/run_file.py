"""RUN/run.json: what a run is. Manifest, model, datasets and tokenizer by fingerprint, mesh, versions.

RUN/run.json             this
RUN/checkpoints/STEP/    checkpoint.py
RUN/metrics.jsonl        metrics.py
RUN/goodput.json         goodput.py
RUN/text_tokenizer.*     the tokenizer of the run's text
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lwm_data.format.atomic import write_whole
from lwm_train.config import ModelConfig

RUN_FILE = "run.json"


def write_run_file(run: Path, content: dict[str, Any]) -> None:
    """Write run.json atomically."""
    write_whole(run / RUN_FILE, json.dumps(content, indent=1) + "\n")


def read_run_file(run: str | Path) -> dict[str, Any]:
    """run.json of the run; ValueError where there is none."""
    path = Path(run) / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run}: no {RUN_FILE}: not a run, or it has not begun") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    wanted = {
        "name": str,
        "manifest": dict,
        "model": dict,
        "datasets": list,
        "tokenizer_fingerprint": str,
        "mesh": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: {key}: missing or no {kind.__name__}; not what lwm-train run writes")
    return content


def run_model_config(run: str | Path) -> ModelConfig:
    """The model that the run trains."""
    try:
        return ModelConfig(**read_run_file(run)["model"])
    except TypeError as error:
        raise ValueError(f"{run}/{RUN_FILE}: model: {error}") from error
