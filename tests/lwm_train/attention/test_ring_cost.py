"""What the ring sends, computes and holds: counted in the compiled program, and by a kernel that keeps a tally."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lwm_train.attention import attention, dispatch, ring
from lwm_train.attention.xla import XlaKernel

AXES = ("dp", "fsdp", "tp", "sp")
COLLECTIVE = re.compile(r"= \S+ (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(")


def ring_mesh(num_devices: int) -> Mesh:
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((1, 1, 1, num_devices), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def compile_step(num_devices: int, length: int, *, backward: bool) -> jax.stages.Compiled:
    mesh = ring_mesh(num_devices)
    over_sp = NamedSharding(mesh, PartitionSpec(None, "sp"))
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32, sharding=over_sp)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=over_sp)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, position: jax.Array) -> jax.Array:
        return attention(q, k, v, segment, position, mesh=mesh, schedule="ring")

    def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.vjp(partial(_swap, loss, arrays[3:]), *arrays[:3])[1](arrays[0]))

    return jax.jit(gradients if backward else loss).lower(x, x, x, ids, ids).compile()


def _swap(function, ids, *qkv):  # type: ignore[no-untyped-def]
    return function(*qkv, *ids)


def test_collectives_are_exactly_those_of_the_schedule() -> None:
    forward = Counter(COLLECTIVE.findall(compile_step(4, 512, backward=False).as_text() or ""))
    # In the loop keys, values and ids; before it the ranges of the tiles and the number of hops.
    assert forward == {"collective-permute": 3, "all-gather": 1, "all-reduce": 1}
    both = Counter(COLLECTIVE.findall(compile_step(4, 512, backward=True).as_text() or ""))
    # Backward adds, where hop 1 is the last: there (3) and home (2); else to hops 1 and 2 (6), in the loop (5), before
    # the last block (2), home from hop 2 or 3 (4). What is sent how often: the next test.
    assert both == {"collective-permute": 3 + 5 + 17, "all-gather": 1, "all-reduce": 1}


def test_memory_is_linear_in_the_local_chunk_and_not_in_the_row() -> None:
    temporary = []
    for num_devices in (4, 8):
        analysis = compile_step(num_devices, 512 * num_devices, backward=True).memory_analysis()
        assert analysis is not None
        temporary.append(analysis.temp_size_in_bytes)
    assert max(temporary) < 1.1 * min(temporary)


def test_each_pass_sends_one_block_a_hop_and_none_that_no_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Counter[str] = Counter()
    send = ring._send

    def counted(tree: Any, axis: str, distance: int = 1) -> Any:
        kind = "block" if isinstance(tree, ring._Block) else "gradients"
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(tree))
        jax.debug.callback(lambda: sent.update({kind: 1, f"{kind} bytes": num_bytes}))
        return send(tree, axis, distance)

    monkeypatch.setattr(ring, "_send", counted)
    num_devices, local, key_heads, head_dim = 4, 64, 2, 8
    block_bytes = local * (2 * key_heads * head_dim * 2 + 8)  # keys and values in bfloat16, two int32 for each token
    x = jnp.ones((1, 256, key_heads, head_dim), jnp.bfloat16)

    @jax.jit
    def forward(segment: jax.Array, position: jax.Array) -> jax.Array:
        return attention(x, x, x, segment, position, mesh=ring_mesh(num_devices))

    @jax.jit
    def both(segment: jax.Array, position: jax.Array) -> jax.Array:
        attend = partial(attention, segment_ids_BL=segment, position_ids_BL=position, mesh=ring_mesh(num_devices))
        return jax.grad(lambda k: attend(x, k, x).astype(jnp.float32).sum())(x)

    for document, last_hop in ((64, 0), (128, 1), (192, 2), (256, 3)):
        token = jnp.arange(256, dtype=jnp.int32)[None]
        sends = num_devices * last_hop
        for passes, run in ((1, forward), (2, both)):
            jax.block_until_ready(run(token // document + 1, token % document))
            jax.effects_barrier()
            blocks = {"block": passes * sends, "block bytes": passes * sends * block_bytes}
            gradient_sends = (passes - 1) * sends
            gradients = {
                "gradients": gradient_sends,
                "gradients bytes": gradient_sends * 8 * key_heads * head_dim * local,
            }
            assert sent == Counter(blocks | gradients), f"{document} tokens a document, {passes} passes"
            sent.clear()


def test_only_needed_meetings_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    tally: list[int] = []

    class Counting(XlaKernel):
        def forward(self, *arguments):  # type: ignore[no-untyped-def]
            jax.debug.callback(lambda: tally.append(1))
            return super().forward(*arguments)

    monkeypatch.setitem(dispatch.KERNELS, "counting", lambda platform: Counting(64))
    segment = jnp.asarray([[1] * 128 + [2] * 384], jnp.int32)  # devices 0 | 1, 2, 3
    position = jnp.arange(512, dtype=jnp.int32)[None]
    x = jnp.ones((1, 512, 2, 8))
    run = jax.jit(partial(attention, mesh=ring_mesh(4), kernel="counting"))
    run(x, x, x, segment, position).block_until_ready()
    jax.effects_barrier()
    assert len(tally) == 1 + 1 + 2 + 3
