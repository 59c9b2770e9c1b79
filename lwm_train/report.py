"""The report of a training run: one HTML page that needs nothing but itself.

    datasets ---> what they hold, and some rows drawn: segments by source, prompts pale, loss weights, pieces, pictures
    metrics.jsonl -> loss, vision's share of it and learning rate of all stages on one axis of steps
    evaluation -> held-out loss beside n-grams, needle heat map with some answers, samples
                        |  report.html.j2 (escapes all that it is given)
                        v
                   report.html

Figures are inline SVG and tables; lines stretch with the page, so their labels are HTML at percentages of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lwm_data.format.atomic import write_whole
from lwm_data.format.dataset import Dataset
from lwm_data.vision.page_pictures import Pictures
from lwm_train.evaluate.heldout import HeldoutLoss
from lwm_train.evaluate.needle import CHANCE, NeedleAnswer, NeedleResult
from lwm_train.report_lines import loss_chart, mean_share, median_speed, rate_chart, read_metrics, share_chart
from lwm_train.report_rows import draw_rows

SHOWN_ANSWERS = 3  # right ones, and as many wrong ones


@dataclass(frozen=True)
class StageFacts:
    """One stage: what ran where, for how long. tokens: seen by the stage; manifest: its text, as YAML or JSON."""

    name: str
    steps: int
    tokens: int
    num_params: int
    num_devices: int
    mesh: str
    wall_s: float
    data: str
    manifest: str


@dataclass(frozen=True)
class HeldoutPoint:
    """Held-out text loss in nats, after `step` steps of `stage`."""

    stage: str
    step: int
    loss: float


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class ReportContent:
    """All that a report shows; a part that was not measured is None or empty and leaves no trace.

    facts: further lines of the header, name -> value (device, version, date).
    metrics: files of JSON lines, oldest stage first; one object a step: stage, step, loss, text_loss, vision_loss,
        vision_share, lr, tokens_per_s and others. Where a resumed run wrote a step twice, the later line counts.
    datasets: role ("trained on", "held out") -> datasets.
    unigram_loss, bigram_loss: nats per token on the dataset of `heldout`.
    """

    title: str
    facts: Mapping[str, str]
    stages: tuple[StageFacts, ...]
    metrics: tuple[Path, ...]
    datasets: Mapping[str, tuple[Dataset, ...]]
    heldout_points: tuple[HeldoutPoint, ...] = ()
    heldout: HeldoutLoss | None = None
    unigram_loss: float | None = None
    bigram_loss: float | None = None
    needle: NeedleResult | None = None
    samples: tuple[Sample, ...] = ()


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page to `path`, whole or not at all. ValueError where the metrics or a dataset cannot be read."""
    metrics = read_metrics(*content.metrics)
    heldout_points = [(point.stage, point.step, point.loss) for point in content.heldout_points]
    baselines = (("unigram", content.unigram_loss), ("bigram", content.bigram_loss))
    levels = [(name, loss) for name, loss in baselines if loss is not None]
    sources = {name: i for i, name in enumerate(_source_names(content))}
    pictures = Pictures()
    rows = [row for group in content.datasets.values() for d in group for row in draw_rows(d, sources, pictures)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["exp"] = math.exp
    page = environment.get_template("report.html.j2").render(
        c=content,
        losses=loss_chart(metrics, heldout_points, levels),
        shares=share_chart(metrics),
        mean_share=mean_share(metrics),
        rate=rate_chart(metrics),
        speed=median_speed(metrics),
        sources=sources,
        rows=rows,
        no_pictures=pictures.problems,
        answers=_chosen_answers(content.needle),
        chance=CHANCE,
    )
    write_whole(path, page)


def _source_names(content: ReportContent) -> list[str]:
    return sorted({name for group in content.datasets.values() for d in group for name in d.info.sources})


def _chosen_answers(needle: NeedleResult | None) -> list[tuple[NeedleAnswer, tuple[str, str, str] | None]]:
    """Some answers, right ones first, from all over the grid; of a right one, its text in parts around the number."""
    if needle is None:
        return []
    chosen: list[NeedleAnswer] = []
    for is_right in (True, False):
        answers = [answer for answer in needle.answers if answer.is_right == is_right]
        every = max(1, len(answers) // SHOWN_ANSWERS)
        chosen += answers[every - 1 :: every][:SHOWN_ANSWERS]
    return [(a, a.answer.partition(str(a.number)) if a.is_right else None) for a in chosen]
