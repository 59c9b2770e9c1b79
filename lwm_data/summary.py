"""A dataset in one view: the table at the end of a build, and the dataset's README.md."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from lwm_data.format.dataset import DatasetInfo

C0 = {code: chr(0x2400 + code) for code in range(0x20)}  # Unicode has a picture of each
SIGNS = C0 | {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def fill(info: DatasetInfo) -> float:
    """The share of the rows that is not padding."""
    return info.num_tokens / (info.num_rows * info.row_length)


def visible(text: str, kept: str = "") -> str:
    """`text` with signs in place of its control characters, except those `kept`: data must not steer a terminal."""
    return text.translate({code: sign for code, sign in SIGNS.items() if chr(code) not in kept})


def dataset_table(info: DatasetInfo) -> Table:
    """A line per source: records, what became of them, examples, tokens, trained; below it why, by source.

    records = kept (whole) + split + truncated + rejected.
    """
    title = f"{info.name}: {info.num_rows:,} rows of {info.row_length:,}, {fill(info):.2%} full ({info.packing})"
    table = Table(  # Text, as a string is read for markup and a dataset may be called [/x]
        title=Text(visible(title), "table.title"),
        caption=Text(_reasons(info), "table.caption"),
        show_footer=True,
    )
    lines = _lines(info)
    shown = [i for i, heading in enumerate(HEADINGS) if heading not in OPTIONAL or lines[-1][i] != "0"]
    for i in shown:
        # Numbers are never cut; a narrow terminal folds the sources' names.
        width = max(len(line[i]) for line in [HEADINGS, *lines]) if i else None
        table.add_column(HEADINGS[i], lines[-1][i], justify="right" if i else "left", min_width=width, overflow="fold")
    for line in lines[:-1]:
        table.add_row(*(line[i] for i in shown))
    return table


HEADINGS = (
    *("source", "records", "kept", "split", "truncated", "rejected"),
    *("left out", "examples", "tokens", "vision", "trained"),
)
OPTIONAL = ("split", "truncated", "left out", "vision")  # columns that a terminal need not show where they are all 0


def dataset_card(info: DatasetInfo) -> str:
    """README.md of the dataset's folder."""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *_lines(info)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# {info.name}

{info.num_rows:,} packed rows of {info.row_length:,} tokens in {len(info.shards):,} shards, {fill(info):.3%} full.
Packing `{info.packing}`, loss weighting `{info.loss_weighting}`, format version {info.format_version}.

{table}

{_reasons(info)} `rejected.jsonl` names each record with its reason.

Text tokenizer: {info.text_vocab_size:,} pieces, in this folder.
Dataset fingerprint `{info.fingerprint}`.

```python
from lwm_data import open_dataset

dataset = open_dataset(".")
dataset[0]["tokens"], dataset[0]["loss_weights"]
```

The shards are WebDataset tars; `webdataset` and `datasets` open them as they are, a page of rows at a time.
"""


def _lines(info: DatasetInfo) -> list[tuple[str, ...]]:
    """A line of text per source, and the sum."""
    numbers = [
        (
            of.records,
            of.kept,
            of.split,
            of.truncated,
            of.rejected,
            of.left_out,
            of.examples,
            of.tokens,
            of.vision_tokens,
            of.trained_tokens,
        )
        for of in info.sources.values()
    ]
    names = [*info.sources, "all"]
    total = tuple(map(sum, zip(*numbers, strict=True)))
    return [(name, *(f"{n:,}" for n in line)) for name, line in zip(names, [*numbers, total], strict=True)]


def _reasons(info: DatasetInfo) -> str:
    if not info.rejected:
        return "No record was rejected, cut or split."
    of_sources = {name: of.reasons for name, of in info.sources.items() if of.reasons}
    if len(info.sources) < 2 or not of_sources:  # an index of before has no reasons by source
        return f"Rejected, cut or split: {_counted(info.rejected)}."
    return "Rejected, cut or split: " + "; ".join(f"{name}: {_counted(of)}" for name, of in of_sources.items()) + "."


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
