"""Evaluate a run as an eval manifest says, once: the result is RUN/eval.json.

    {"key": ..., "run": ..., "step": 900,
     "heldout": {...}, "heldout_dataset": PATH, "ngram": {"unigram": nats, "bigram": nats}, "needle": {...},
     "samples": [...]}

key is a hash of the manifest, of the data that it names, of the checkpoint's step and of the run's own content: with
the same key nothing is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lwm_data.format.atomic import write_whole
from lwm_data.format.dataset import open_dataset
from lwm_data.format.prompt import chat_prompt
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer
from lwm_data.terminal import Progress
from lwm_train.checkpoint import latest_step, restore_params
from lwm_train.config import EvalManifest, MeshSpec, TrainManifest
from lwm_train.evaluate.heldout import heldout_loss
from lwm_train.evaluate.needle import CHANCE, evaluate_needle, read_haystack
from lwm_train.evaluate.ngram import NgramBaseline
from lwm_train.generate import generate
from lwm_train.mesh import make_mesh, request_devices
from lwm_train.run_file import read_run_file, run_model_config

EVAL_FILE = "eval.json"
HELDOUT_TOKENS = 16_384  # in one batch


def evaluate_run(manifest: EvalManifest) -> dict[str, Any]:
    """Measure what the manifest asks for, or return what is measured already."""
    run = Path(manifest.run)
    content = read_run_file(run)
    for dataset in (manifest.heldout, manifest.ngram_baselines):
        if dataset and (got := open_dataset(dataset).info.tokenizer_fingerprint) != content["tokenizer_fingerprint"]:
            raise ValueError(
                f"{dataset}: built with tokenizer {got[:12]}, the model was trained with "
                f"{content['tokenizer_fingerprint'][:12]}; their losses cannot be compared: build it with the model's"
            )
    datasets = [open_dataset(path).info.fingerprint for path in (manifest.heldout, manifest.ngram_baselines) if path]
    haystack = hashlib.sha256(read_haystack(manifest.needle.haystack).encode()).hexdigest() if manifest.needle else None
    described = [manifest.model_dump_json(), datasets, haystack, latest_step(run), json.dumps(content, sort_keys=True)]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    path = run / EVAL_FILE
    if (before := _read(path)).get("key") == key:
        return before
    mesh_spec = manifest.mesh or TrainManifest.model_validate(content["manifest"]).mesh
    request_devices([mesh_spec])
    mesh = make_mesh(mesh_spec)
    config, tokenizer = run_model_config(run), run_tokenizer(run)
    params, step = restore_params(run, mesh)
    result: dict[str, Any] = {
        "key": key,
        "measured": run_key(run),
        "name": manifest.name,
        "run": str(run),
        "step": step,
    }
    # One device answers faster, where the parameters fit it.
    answering = mesh if mesh.shape["fsdp"] * mesh.shape["tp"] > 1 else None
    if manifest.heldout:
        heldout = open_dataset(manifest.heldout)
        rows = mesh.shape["dp"] * mesh.shape["fsdp"]
        rows *= max(1, HELDOUT_TOKENS // (rows * heldout.info.row_length))
        with Progress("held-out text", len(heldout), "rows") as progress:
            result["heldout"] = asdict(heldout_loss(params, config, heldout, mesh, rows, progress.advance))
        result["heldout_dataset"] = manifest.heldout
        if manifest.ngram_baselines:
            unigram, bigram = NgramBaseline.fit(open_dataset(manifest.ngram_baselines)).loss(heldout)
            result["ngram"] = {"unigram": unigram, "bigram": bigram}
    if manifest.needle:
        spec = manifest.needle
        with Progress("needles", len(spec.lengths) * len(spec.depths) * spec.rounds, "questions") as progress:
            needles = evaluate_needle(params, config, tokenizer, spec, progress.advance, answering)
        result["needle"] = asdict(needles) | {"chance": CHANCE, "mean_accuracy": needles.mean_accuracy}
    if manifest.samples:
        s = manifest.samples
        ids = [[tokenizer.bos, *tokenizer.encode(prompt).tolist()] for prompt in s.prompts]
        out = generate(
            params, config, ids, s.num_tokens, temperature=s.temperature, seed=s.seed, eos=tokenizer.eos, mesh=answering
        )
        texts = _texts(tokenizer, out)
        result["samples"] = [{"prompt": p, "text": t} for p, t in zip(s.prompts, texts, strict=True)]
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return result


def summary(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    lines = [f"{min(os.path.relpath(result['run']), result['run'], key=len)}: step {result['step']}"]
    if "heldout" in result:
        loss = result["heldout"]["text_loss"]
        lines.append(f"held-out text   {loss:.3f} nats a token (perplexity {math.exp(loss):.1f})")
    for name, loss in result.get("ngram", {}).items():
        lines.append(f"{name:15} {loss:.3f} nats a token (perplexity {math.exp(loss):.1f})")
    if "needle" in result:
        needle = result["needle"]
        lines.append(f"needle          {needle['mean_accuracy']:.0%} found (chance {needle['chance']:.0e})")
        lines.append("  tokens    " + "".join(f"depth {depth:<5g} " for depth in needle["depths"]))
        for length, row in zip(needle["lengths"], needle["accuracy"], strict=True):
            lines.append(f"  {length:<10,}" + "".join(f"{accuracy:<12.0%}" for accuracy in row))
    for sample in result.get("samples", []):
        lines.append(f"sample          {sample['prompt']}{sample['text']!r}")
    return "\n".join(lines)


def write_text(run: Path, prompts: list[str], num_tokens: int, temperature: float, seed: int, chat: bool) -> list[str]:
    """What the run's newest checkpoint writes after each prompt, on one device; of a chat, the prompt is a user's
    message."""
    tokenizer = run_tokenizer(run)
    params, _ = restore_params(run, make_mesh(MeshSpec(), jax.devices()[:1]))
    ids = [chat_prompt(tokenizer, p) if chat else [tokenizer.bos, *tokenizer.encode(p).tolist()] for p in prompts]
    out = generate(
        params, run_model_config(run), ids, num_tokens, temperature=temperature, seed=seed, eos=tokenizer.eos
    )
    return _texts(tokenizer, out)


def run_key(run: Path) -> str:
    """A hash of what is measured: the run's content and its newest checkpoint's step."""
    described = [latest_step(run), json.dumps(read_run_file(run), sort_keys=True)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _texts(tokenizer: TextTokenizer, answers: list[list[int]]) -> list[str]:
    return [tokenizer.decode(np.array(answer, np.int32)) for answer in answers]


def _read(path: Path) -> dict[str, Any]:
    """eval.json; empty where there is none, or where it cannot be read and so is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def run_tokenizer(run: Path) -> TextTokenizer:
    """The tokenizer that lies in the run's folder; ValueError where it is not the run's."""
    tokenizer = load_text_tokenizer(run / "text_tokenizer.yaml")
    if tokenizer.fingerprint != read_run_file(run)["tokenizer_fingerprint"]:
        raise ValueError(f"{run}: text_tokenizer.yaml is not the tokenizer that the model was trained with")
    return tokenizer
