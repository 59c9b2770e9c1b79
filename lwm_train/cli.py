"""lwm-train: train, evaluate and sample from the command line. Heavy imports wait inside the verbs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lwm_data.terminal import run_app

app = typer.Typer(
    name="lwm-train",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Train, evaluate and sample a Large World Model from packed shards.\n\n"
    "For instance: `lwm-train run manifests/demo/train.yaml`, then `lwm-train eval manifests/demo/eval.yaml`.",
)

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. optimizer.lr=1e-3.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command()
def run(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A `kind: train` or `kind: curriculum` file.")],
    overrides: Sets = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="KEY", help="Resume although this key changed.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Steps whose trace goes to RUN/profile, e.g. 10:13.")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of several processes, where the first one listens.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="How many processes the run has.")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="Which of them this is, from 0.")] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Several processes, found by JAX: Slurm, MPI, Cloud TPU.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a manifest's stages, or go on where they were.

    Example: `lwm-train run manifests/demo/train.yaml`

    Ctrl-C saves a checkpoint and ends (twice: ends at once); the next run goes on from there, bit for bit. A
    finished stage is left alone. On a machine without accelerators the mesh's devices are simulated on the CPU.
    """
    from lwm_train.config import read_train_manifests
    from lwm_train.train import train_stages

    stages = read_train_manifests(manifest, overrides or ())
    if distributed or coordinator or num_processes or process_id is not None:
        from lwm_train.processes import join_processes

        join_processes(coordinator, num_processes, process_id, [stage.mesh for stage in stages])
    results = train_stages(stages, allow or (), _steps(profile))
    for result in results:
        state = f"stopped by {result.stopped}, saved" if result.stopped else "done" if result.seconds else "done before"
        if as_json:
            print(json.dumps({"run": str(result.run), "step": result.step, "stopped": result.stopped}))
        else:
            print(f"{min(os.path.relpath(result.run), str(result.run), key=len)}: {state} at step {result.step}")
    if results[-1].stopped == "SIGINT":
        raise KeyboardInterrupt


def _steps(text: str | None) -> range | None:
    """Steps FIRST to LAST, both of them."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not first.isdigit() or not last.isdigit() or not 1 <= int(first) <= int(last):
        raise ValueError(f"--profile: got {text}; wanted FIRST:LAST, steps from 1, e.g. 10:13")
    return range(int(first), int(last) + 1)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    step: Annotated[int, typer.Option(min=1, help="The step to run again.")],
    as_json: Json = False,
) -> None:
    """Run one step again from the checkpoint before it, on the same rows, and compare its loss with the logged one.

    Example: `lwm-train replay runs/demo/train-long --step 120`

    On the same mesh both are equal bit for bit; if not, the hardware or the software differs. The rows of the step
    are shown, with their sources. The run's folder is not changed.
    """
    from lwm_train.replay import replay_step, summary

    result = replay_step(run, step)
    print(json.dumps(result) if as_json else summary(result))


@app.command("eval")
def evaluate(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A `kind: eval` YAML file.")],
    overrides: Sets = None,
    as_json: Json = False,
) -> None:
    """Measure a run: held-out loss beside n-gram models, needle retrieval, samples.

    Example: `lwm-train eval manifests/demo/eval.yaml`

    The result is RUN/eval.json; an evaluation that is already there, of the same checkpoint, is not repeated.
    """
    from lwm_train.config import read_eval_manifest
    from lwm_train.evaluate.run import evaluate_run, summary

    result = evaluate_run(read_eval_manifest(manifest, overrides or ()))
    print(json.dumps(result) if as_json else summary(result))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "It was a dark night",
    num_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed, another text.")] = 0,
    chat: Annotated[bool, typer.Option(help="The prompt is a user's message.")] = False,
) -> None:
    """Write text with a run's newest checkpoint.

    Example: `lwm-train generate runs/demo/train-long --prompt "The captain" --tokens 60`
    """
    from lwm_train.evaluate.run import write_text

    print(write_text(run, [prompt], num_tokens, temperature, seed, chat)[0])


Name = Annotated[str | None, typer.Option(help="What requests call the model; the run's name by default.")]
Context = Annotated[
    int | None, typer.Option(min=2, help="Tokens of prompt and answer; the run's row length by default.")
]


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network, without any key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Name = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that are answered together.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 1024,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Answer OpenAI's chat/completions and completions with a run's newest checkpoint, until Ctrl-C.

    Example: `lwm-train serve runs/demo/train-long --name demo`

    Whoever reaches the port may ask: keep it on this machine, or put a server that knows keys before it.
    """
    import signal

    from lwm_train.chat_protocol import ServedModel
    from lwm_train.serve import load_model
    from lwm_train.serve import serve as serve_until_signal

    def ready(url: str, model: ServedModel) -> None:
        if as_json:
            said = json.dumps({"url": url, "model": model.name, "step": model.step, "context": model.context})
        else:
            said = f"{model.name} (step {model.step:,}, {model.context:,} tokens) at {url}; Ctrl-C ends it"
        print(said, flush=True)

    ended_by = serve_until_signal(lambda: load_model(run, name, context, max_tokens), host, port, max_batch, ready)
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    system: Annotated[str | None, typer.Option(help="What stands before the chat.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed, other answers.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 256,
    context: Context = None,
) -> None:
    """Chat with a run's newest checkpoint; Ctrl-D ends it.

    Example: `lwm-train chat runs/demo/train-long`
    """
    from lwm_train.chat import chat as chat_until_the_end
    from lwm_train.serve import load_model

    chat_until_the_end(load_model(run, None, context, max_tokens), temperature, seed, system)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; RUN/report.html by default.")] = None,
) -> None:
    """Write one self-contained page: curves, evaluation, rows of the data, samples, what was built from what.

    Example: `lwm-train report runs/demo/train-long --out runs/demo/report.html`
    """
    from lwm_train.lineage import report_content
    from lwm_train.report import write_report

    out = out or run / "report.html"
    write_report(out, report_content(run))
    print(out)


@app.command()
def schema(kind: Annotated[str, typer.Argument(metavar="KIND", help="train, curriculum or eval")] = "train") -> None:
    """Print the JSON Schema of a manifest, for editors.

    Example: `lwm-train schema train > train.schema.json`
    """
    from lwm_train.config import KINDS

    if kind not in KINDS:
        raise ValueError(f"KIND: got {kind}; wanted {' or '.join(KINDS)}")
    print(json.dumps(KINDS[kind].model_json_schema(), indent=2))


def main() -> None:
    """The console script."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
