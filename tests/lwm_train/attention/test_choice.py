"""Which kernel a program gets depends on the devices it is made for and on the manifest, not on this machine."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lwm_train.attention import dispatch
from lwm_train.attention.splash import SplashKernel
from lwm_train.attention.xla import XlaKernel
from lwm_train.config import AttentionSpec, ModelSpec
from lwm_train.model import forward, init_params


@pytest.mark.parametrize(
    ("platform", "kernel"),
    [("cpu", XlaKernel(64)), ("gpu", XlaKernel(128)), ("tpu", SplashKernel(interpret=False))],
)
def test_the_platform_of_the_program_decides_kernel_and_tile(platform: str, kernel: object) -> None:
    assert dispatch._pick("auto", platform) == kernel


def test_the_manifest_overrides_the_kernel_and_results_stay_equal() -> None:
    config = ModelSpec(preset="tiny").config(97)
    params = init_params(config, jax.random.key(0))
    tokens, text = jnp.arange(24, dtype=jnp.int32)[None] % 97, jnp.zeros((1, 24), bool)
    segment, position = jnp.ones((1, 24), jnp.int32), jnp.arange(24, dtype=jnp.int32)[None]
    chosen = ModelSpec(preset="tiny").config(97, attention=AttentionSpec(kernel="splash"))
    wanted, got = (forward(params, c, tokens, text, segment, position) for c in (config, chosen))
    assert jnp.abs(wanted - got).max() < 1e-5
    with pytest.raises(ValueError, match="attention kernel: got 'fast'"):
        forward(params, replace(config, attention_kernel="fast"), tokens, text, segment, position)
