"""lwm-train chat: a chat with a run's newest checkpoint, in a terminal or from a pipe. Ctrl-D ends it.

you: Who is the captain?        a line is a message; an empty one is passed over
demo: The captain ...           as it is written
"""

from __future__ import annotations

import contextlib
import sys

from rich.console import Console

from lwm_train.chat_answer import AnswerText
from lwm_train.chat_protocol import Message, Question, chat_ids
from lwm_train.generate import Draw, generate_drawn
from lwm_train.serve import LoadedModel

MAX_MESSAGE = 1 << 20  # characters of one line


def chat(loaded: LoadedModel, temperature: float, seed: int, system: str | None) -> None:
    """Read messages from stdin and answer each, with what was said before as far as it fits the context.

    seed: of the first answer; each later one has the next.
    """
    served, console = loaded.served, Console(highlight=False)
    before = [Message(role="system", content=system)] if system is not None else []
    said: list[Message] = []
    while True:
        words = _message(console)
        if words is None:
            return
        if not words:
            continue
        said.append(Message(role="user", content=words))
        num_dropped = 0
        while len(prompt := chat_ids(served.tokenizer, [*before, *said])) >= served.context and len(said) > 1:
            del said[:2]
            num_dropped += 2
        if num_dropped:
            console.print(f"({num_dropped} messages forgotten: the model reads {served.context:,} tokens)", style="dim")
        if len(prompt) >= served.context:
            console.print(f"({len(prompt):,} tokens; the model reads {served.context:,}: say less)", style="dim")
            said.pop()
            continue
        num_tokens = min(served.max_tokens, served.context - len(prompt))
        draw = Draw(num_tokens, temperature, (seed + len(said) // 2) % 2**32)
        console.print(f"{served.name}: ", style="bold", end="", markup=False)
        said.append(Message(role="assistant", content=_answer(loaded, prompt, draw)))


def _message(console: Console) -> str | None:
    """The next line; None at the end of the input."""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            return console.input("[bold]you: [/]").strip()
        return None
    line = sys.stdin.readline(MAX_MESSAGE)
    return line.strip() if line else None


def _answer(loaded: LoadedModel, prompt: list[int], draw: Draw) -> str:
    """What the model says, which is printed as it comes."""
    tokenizer = loaded.served.tokenizer
    question = Question(prompt, draw, stop=(), is_chat=True, stream=True, include_usage=False, before=None)
    answer = AnswerText(tokenizer, question)

    def show(number: int, ids: list[int], finished: bool) -> bool:
        print(answer.add(ids, finished), end="", flush=True)
        return True

    generate_drawn(loaded.params, loaded.config, [prompt], [draw], eos=tokenizer.eos, watch=show)
    print(flush=True)
    return answer.text
