"""Held-out loss while a run trains, by source and by place in the segment: the `heldout` of a line of metrics.

    {"text_loss": 3.1, "vision_loss": null,
     "by_source": {"books": {"text": 3.0}, "photos": {"text": 2.2, "vision": 6.1}},
     "by_position": {"0-63": {"text": 3.6}, "64-255": {"text": 3.0}, ...}}

Mean cross-entropy in nats of each trained token, each counted once. position: of the token that is predicted, in its
own segment; the buckets grow by 4. The model runs once; the heads once a group, over the chunks that have some of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lwm_data.format.dataset import open_dataset
from lwm_train.batch import Batch, make_batch, put_on_mesh
from lwm_train.config import EvaluateSpec, ModelConfig
from lwm_train.evaluate.heldout import padding_row
from lwm_train.loss import ModalitySums, loss_and_sums
from lwm_train.mesh import sharding
from lwm_train.model import Params, forward, heads
from lwm_train.row_sources import places_of

BATCH_TOKENS = 16_384
FIRST_BUCKET, GROWTH = 64, 4


class WhileTraining:
    """Measures on the steps that the spec names; never without a spec."""

    def __init__(self, spec: EvaluateSpec | None, config: ModelConfig, content: dict[str, Any], mesh: Mesh) -> None:
        """ValueError where the dataset has another tokenizer than the run, or rows that the mesh cannot take."""
        self._spec, self._config, self._mesh = spec, config, mesh
        if spec is None:
            return
        self._dataset = open_dataset(spec.dataset)
        info = self._dataset.info
        if info.tokenizer_fingerprint != content["tokenizer_fingerprint"]:
            raise ValueError(
                f"evaluate: {spec.dataset}: built with tokenizer {info.tokenizer_fingerprint[:12]}, the training data "
                f"with {content['tokenizer_fingerprint'][:12]}; build it with theirs"
            )
        if info.fingerprint in {of["fingerprint"] for of in content["datasets"]}:
            raise ValueError(f"evaluate: {spec.dataset}: the run trains on it; wanted rows that it never saw")
        if info.row_length % mesh.shape["sp"]:
            raise ValueError(f"evaluate: {spec.dataset}: sp {mesh.shape['sp']} does not divide {info.row_length:,}")
        self._rows = range(min(spec.rows, len(self._dataset)))
        self._places = places_of(self._dataset, self._rows)
        found = {example.source for place in self._places.values() for example in place.examples}
        self._sources = sorted(found)
        self._edges = [0]
        while (edge := FIRST_BUCKET * GROWTH ** (len(self._edges) - 1)) < info.row_length:
            self._edges.append(edge)
        self._sums = jax.jit(self._group_sums)

    def loss(self, step: int, params: Params, beat: Callable[[], None]) -> dict[str, Any] | None:
        """The loss after `step`; None on a step without evaluation. `beat` is called after each batch."""
        if self._spec is None or step % self._spec.every:
            return None
        length = self._dataset.info.row_length
        size = self._mesh.shape["dp"] * self._mesh.shape["fsdp"]
        size *= max(1, BATCH_TOKENS // (size * length))
        totals = np.zeros((len(self._sources) + len(self._edges), 2, 2))  # group; ce, tokens; text, vision
        for first in range(0, len(self._rows), size):
            rows = list(self._rows[first : first + size])
            filled = [padding_row(length)] * (size - len(rows))
            batch = make_batch([*(self._dataset[row] for row in rows), *filled])
            sources = self._source_ids(rows, np.asarray(batch.segment_ids))
            on_mesh = jax.device_put(sources, sharding(self._mesh, "batch", "length"))
            sums = self._sums(params, put_on_mesh(batch, self._mesh), on_mesh)
            totals += np.stack([np.asarray(sums.ce), np.asarray(sums.num_trained)], axis=1).astype(np.float64)
            beat()
        by_source, by_position = totals[: len(self._sources)], totals[len(self._sources) :]
        return {
            "text_loss": _means(by_source.sum(0)).get("text"),
            "vision_loss": _means(by_source.sum(0)).get("vision"),
            "by_source": {name: _means(of) for name, of in zip(self._sources, by_source, strict=True)},
            "by_position": {
                name: _means(of) for name, of in zip(self._buckets(length), by_position, strict=True) if of[1].any()
            },
        }

    def _buckets(self, length: int) -> list[str]:
        return [f"{a}-{b - 1}" for a, b in zip(self._edges, [*self._edges[1:], length], strict=True)]

    def _source_ids(self, rows: list[int], segment_ids: np.ndarray) -> np.ndarray:
        """int32 [B, L]: the number of each token's source; padding has any."""
        ids = np.zeros_like(segment_ids)
        for at, row in enumerate(rows):
            examples = self._places[row].examples
            of_segment = np.zeros(max([1, *(e.segment for e in examples)]) + 1, np.int32)
            for example in examples:  # in a naive row all have segment 1: its tokens count for the last of them
                of_segment[example.segment] = self._sources.index(example.source)
            ids[at] = of_segment[segment_ids[at]]
        return ids

    def _group_sums(self, params: Params, batch: Batch, sources: jax.Array) -> ModalitySums:
        hidden = forward(
            params,
            self._config,
            batch.tokens,
            batch.vision_mask,
            batch.segment_ids,
            batch.position_ids,
            self._mesh,
        )
        buckets = jnp.searchsorted(jnp.array(self._edges), batch.position_ids + 1, side="right") - 1

        def of_group(groups: jax.Array, group: jax.Array) -> ModalitySums:
            chosen = replace(batch, target_weights=batch.target_weights * (groups == group))
            return loss_and_sums(hidden, *heads(params), chosen, None, self._mesh)[1]

        by_source = jax.lax.map(lambda group: of_group(sources, group), jnp.arange(len(self._sources)))
        by_position = jax.lax.map(lambda group: of_group(buckets, group), jnp.arange(len(self._edges)))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), by_source, by_position)


def _means(of: np.ndarray) -> dict[str, float]:
    """Nats per token of the modalities that are there; `of` is [ce or tokens, modality]."""
    return {name: ce / num for name, ce, num in zip(("text", "vision"), *of.tolist(), strict=True) if num}
