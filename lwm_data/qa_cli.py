"""The verb of lwm-data that has questions and answers written. Heavy imports wait inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lwm_data.cli_output import print_view
from lwm_data.terminal import progress_as_json


def qa(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A `kind: qa` YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. endpoint.model=...")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again about chunks that got no answer before.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Have a model write questions and answers about books, chunk by chunk, or go on with a run that was stopped.

    Example: `lwm-data qa manifests/qa/demo.yaml --set endpoint.url=http://127.0.0.1:8000/v1`

    Stop it with Ctrl-C whenever you like: what was answered is kept and never asked again. A key is read from the
    environment variable that `endpoint.key_env` names, and kept nowhere. `lwm-data schema qa` describes the manifest.
    """
    try:
        from lwm_data.qa.generate import generate
    except ImportError as error:
        if error.name not in ("aiohttp", "py3langid"):
            raise
        raise ValueError(f"lwm-data qa: wanted the package {error.name}: pip install 'lwm[qa]'") from error

    with progress_as_json(as_json):
        summary = generate(manifest, overrides or (), retry_failed)
    if as_json:
        print(json.dumps(summary.described()))
        return
    print_view(summary.table())
    print(summary.closing())
