"""A model of `transformers` in this process: no server, no network. torch is imported when the model is loaded.

One answer at a time, in a thread, so that Ctrl-C is heard. Weights are read from safetensors alone, and no code that
lies beside them is run.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from lwm_data.manifest_qa import InProcess, Parameters
from lwm_data.qa.endpoint import Answer, Failed, OutOfBudget, usage_of
from lwm_data.qa.prompts import Messages
from lwm_data.qa.spending import Spending

HEAD = 1 << 20  # bytes of each weight file that its name depends on
MAX_NEW = 512  # tokens, where the manifest says nothing


def model_name(model: InProcess) -> str:
    """The folder's name and a hash of what lies in it: other weights are another model. ValueError where none lies."""
    folder = Path(model.transformers)
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    if len(files) < 2 or not files[0].is_file():
        raise ValueError(
            f"in_process.transformers: got {folder}: no model there; wanted a folder with config.json and *.safetensors"
        )
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(HEAD))
    return f"{folder.name}@{digest.hexdigest()[:12]}"


class InProcessClient:
    """A loaded model, asked in the way an endpoint is; an async context manager."""

    def __init__(self, model: InProcess, spending: Spending) -> None:
        self.model, self.spending = model, spending
        self._stop = threading.Event()
        self._one = asyncio.Lock()

    async def __aenter__(self) -> InProcessClient:
        await asyncio.to_thread(self._load)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._stop.set()

    async def ask(self, messages: Messages, parameters: Parameters, wants_pairs: bool) -> Answer | Failed:
        """What the model says to `messages`. OutOfBudget where none may be asked."""
        async with self._one:
            if not self.spending.allows_another():
                raise OutOfBudget
            self.spending.take()
            try:
                text, read, written, limit = await asyncio.to_thread(self._generate, messages, parameters)
            except asyncio.CancelledError:
                self._stop.set()
                raise
            finally:
                self.spending.in_flight -= 1
            self.spending.charge(read, written)
            if not text.strip():
                return Failed("empty answer", "an empty answer", text, 1)
            return Answer(text, "length" if written >= limit else "stop", usage_of(read, written), 1, False)

    def _load(self) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ValueError(f"in_process: wanted the packages transformers and torch ({error})") from error
        folder = self.model.transformers
        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
            self._model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            told = " ".join(str(error).split())[:300]
            raise ValueError(f"in_process.transformers: got {folder}: transformers cannot load it: {told}") from error
        self._model.to(torch.device(self.model.device)).eval()  # type: ignore[arg-type]

    def _generate(self, messages: Messages, parameters: Parameters) -> tuple[str, int, int, int]:
        """Text, tokens read, tokens written, and the most that it might have written."""
        import torch
        from transformers import StoppingCriteriaList

        if self._tokenizer.chat_template:
            said = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self._tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            said = "\n\n".join(message["content"] for message in messages) + "\n\n"
            ids = self._tokenizer(said, return_tensors="pt")["input_ids"]
        limit = parameters.max_tokens or MAX_NEW
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[1] + limit > longest:
            raise ValueError(
                f"in_process: {ids.shape[1]:,} tokens of question and {limit:,} of answer do not fit the model's "
                f"{longest:,}; lower chunk_tokens or parameters.max_tokens"
            )
        # A function of what is asked, so that the same chunk gives the same answer in whatever order.
        seed = hashlib.sha256(f"{parameters.seed} {said}".encode()).digest()[:6]
        torch.manual_seed(int.from_bytes(seed, "big"))
        drawn: dict[str, Any] = {"do_sample": bool(parameters.temperature)}
        if parameters.temperature:
            drawn |= {"temperature": parameters.temperature, "top_p": parameters.top_p or 1.0}
        if self._tokenizer.pad_token_id is None:
            drawn["pad_token_id"] = self._tokenizer.eos_token_id or 0
        ids = ids.to(self.model.device)
        stop = StoppingCriteriaList([lambda ids, scores, **_: torch.full((ids.shape[0],), self._stop.is_set())])
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, stopping_criteria=stop, **drawn
            )
        new = out[0, ids.shape[1] :]
        return str(self._tokenizer.decode(new, skip_special_tokens=True)), ids.shape[1], len(new), limit
