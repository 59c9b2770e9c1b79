"""What the ring sends, computes and holds: counted in the compiled program, and by a kernel that keeps a tally."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lwm_train.attention import attention, dispatch, xla
from lwm_train.attention.ring import last_needed_hop

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
    # In the loop keys with values, and ids; before it the ranges of the tiles and the number of hops.
    assert forward == {"collective-permute": 2, "all-gather": 1, "all-reduce": 1}
    both = Counter(COLLECTIVE.findall(compile_step(4, 512, backward=True).as_text() or ""))
    # Backward adds: to the first hop (2), in the loop (3), before the last block (1), home from hop 1, 2 or 3 (3).
    assert both == {"collective-permute": 2 + 9, "all-gather": 1, "all-reduce": 1}


def test_memory_is_linear_in_the_local_chunk_and_not_in_the_row() -> None:
    temporary = []
    for num_devices in (4, 8):
        analysis = compile_step(num_devices, 512 * num_devices, backward=True).memory_analysis()
        assert analysis is not None
        temporary.append(analysis.temp_size_in_bytes)
    assert max(temporary) < 1.1 * min(temporary)


@pytest.mark.parametrize(
    ("document", "last_hop"),
    [(64, 0), (128, 1), (192, 2), (512, 7)],  # 8 devices hold 64 tokens each
)
def test_hops_that_no_device_needs_are_not_sent(document: int, last_hop: int) -> None:
    segment = (np.arange(512) // document + 1).astype(np.int32)[None]
    position = (np.arange(512) % document).astype(np.int32)[None]
    spec = PartitionSpec(("dp", "fsdp"), "sp")

    def count_hops(segment: jax.Array, position: jax.Array) -> jax.Array:
        return last_needed_hop("sp", AXES, segment, position)[None]

    count = jax.shard_map(
        count_hops,
        mesh=ring_mesh(8),
        in_specs=(spec, spec),
        out_specs=PartitionSpec("sp"),
        check_vma=False,
    )
    assert set(np.asarray(count(jnp.asarray(segment), jnp.asarray(position))).tolist()) == {last_hop}


def test_only_needed_meetings_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    tally: list[int] = []

    class Counting:
        backward = staticmethod(xla.backward)

        @staticmethod
        def forward(*arguments):  # type: ignore[no-untyped-def]
            jax.debug.callback(lambda: tally.append(1))
            return xla.forward(*arguments)

    monkeypatch.setitem(dispatch.KERNELS, "counting", Counting())
    segment = jnp.asarray([[1] * 128 + [2] * 384], jnp.int32)  # devices 0 | 1, 2, 3
    position = jnp.arange(512, dtype=jnp.int32)[None]
    x = jnp.ones((1, 512, 2, 8))
    run = jax.jit(partial(attention, mesh=ring_mesh(4), kernel="counting"))
    run(x, x, x, segment, position).block_until_ready()
    jax.effects_barrier()
    assert len(tally) == 1 + 1 + 2 + 3
