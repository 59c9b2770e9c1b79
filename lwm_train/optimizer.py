"""The optimizer of a manifest, from optax.

adamw   every parameter; norms do not decay, unless `decay: all` says so
muon    the layers' matrices by momentum made orthogonal (Newton-Schulz), which learns from fewer tokens;
        embeddings, heads and norms by AdamW with a rate of their own

`moments: bf16` stores the first moment (AdamW's mean, Muon's momentum) in bfloat16: 2 bytes a parameter less. AdamW's
second moment stays float32, since its root divides the update. Both are computed in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lwm_train.config import OptimizerSpec
from lwm_train.model import Params


def make_schedule(spec: OptimizerSpec, steps: int) -> optax.Schedule:
    """step -> learning rate: linear warm-up from 0, then constant, or cosine or linear to final_lr * lr."""
    return _schedule(spec, spec.lr, steps)


def make_optimizer(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    """A clip of the gradient's global norm, then the optimizer that `spec` names.

    With `skip_nonfinite` a gradient that is not finite moves nothing, neither parameters nor moments nor the
    schedule; the state counts them. Whoever runs the steps stops after so many in a row.
    """
    optimizer = _make(spec, steps)
    return optimizer if spec.skip_nonfinite is None else optax.apply_if_finite(optimizer, spec.skip_nonfinite)


def _make(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(spec.clip)
    if spec.name == "adamw":
        return optax.chain(clip, _adamw(spec, spec.lr, steps))
    assert spec.adam_lr is not None
    muon = optax.chain(
        scale_by_muon(beta=spec.b2, mu_dtype=_mu_dtype(spec), weight_dimension_numbers=_matrix_dims),
        optax.add_decayed_weights(spec.weight_decay),
        optax.scale_by_learning_rate(make_schedule(spec, steps)),
    )
    parts = {"matrices": muon, "rest": _adamw(spec, spec.adam_lr, steps)}
    return optax.chain(clip, optax.partition(parts, _part))


def _adamw(spec: OptimizerSpec, lr: float, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        _schedule(spec, lr, steps),
        b1=spec.b1,
        b2=spec.b2,
        mu_dtype=_mu_dtype(spec),
        weight_decay=spec.weight_decay,
        mask=None if spec.decay == "all" else _decays,
    )


def _mu_dtype(spec: OptimizerSpec) -> jnp.dtype | None:
    return jnp.dtype(jnp.bfloat16) if spec.moments == "bf16" else None


def _schedule(spec: OptimizerSpec, lr: float, steps: int) -> optax.Schedule:
    rest = max(1, steps - spec.warmup)
    after = {
        "constant": optax.constant_schedule(lr),
        "cosine": optax.cosine_decay_schedule(lr, rest, alpha=spec.final_lr),
        "linear": optax.linear_schedule(lr, lr * spec.final_lr, rest),
    }[spec.schedule]
    if not spec.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, spec.warmup), after], [spec.warmup])


def _decays(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].name, params)


def _part(params: Params) -> Params:
    # A layer's matrices are stacked, [layer, in, out]; the other parameters have one or two axes.
    return jax.tree.map(lambda x: "matrices" if x.ndim == 3 else "rest", params)


def _matrix_dims(params: Params) -> Params:
    return jax.tree.map(lambda _: MuonDimensionNumbers((1,), (2,)), params)
