"""The optimizer of a manifest, from optax."""

from __future__ import annotations

import jax
import optax

from lwm_train.config import OptimizerSpec
from lwm_train.model import Params


def make_schedule(spec: OptimizerSpec, steps: int) -> optax.Schedule:
    """step -> learning rate: linear warm-up from 0, then constant, or cosine or linear to final_lr * lr."""
    rest = max(1, steps - spec.warmup)
    after = {
        "constant": optax.constant_schedule(spec.lr),
        "cosine": optax.cosine_decay_schedule(spec.lr, rest, alpha=spec.final_lr),
        "linear": optax.linear_schedule(spec.lr, spec.lr * spec.final_lr, rest),
    }[spec.schedule]
    if not spec.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, spec.lr, spec.warmup), after], [spec.warmup])


def make_optimizer(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    """AdamW after a clip of the global norm; norms' weights (vectors of a layer) do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(spec.clip),
        optax.adamw(
            make_schedule(spec, steps), b1=spec.b1, b2=spec.b2, weight_decay=spec.weight_decay, mask=_decays
        ),
    )


def _decays(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].name, params)
