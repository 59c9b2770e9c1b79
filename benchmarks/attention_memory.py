"""Temporary memory of ring attention on TPUs, from programs compiled ahead of time: no TPU is needed.

    pip install --no-deps --target SOMEWHERE libtpu==0.0.42.1           684 MB, no requirement of the project
    PYTHONPATH=SOMEWHERE python benchmarks/attention_memory.py

Row and ring grow together; forward and backward of one layer in bfloat16. `temp` is what the compiler reports for
one device beside arguments and results. PyPI `ringattention` is compiled beside it where it is installed (see
ringattention_peer.py): its XLA way, since its Pallas way does not trace with this jax.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--local", type=int, default=4096, help="tokens on each device")
parser.add_argument("--heads", type=int, default=8)
parser.add_argument("--head-dim", type=int, default=128)
parser.add_argument("--topologies", nargs="+", default=["v5e:4x4", "v5p:4x4x1"])
parser.add_argument("--devices", type=int, nargs="+", default=[2, 8, 16])
OPTIONS = parser.parse_args()

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from ringattention_peer import import_ringattention, peer  # noqa: E402

from lwm_train.attention import attention  # noqa: E402


def ours(kernel: str, mesh: Mesh, *arrays: jax.Array) -> jax.Array:
    return attention(*arrays, mesh=mesh, schedule="ring", kernel=kernel)


def compile_both(function: Callable[..., jax.Array], mesh: Mesh) -> jax.stages.Compiled:
    """Forward and backward of `function(q, k, v, segment, position)` for the devices of `mesh`."""
    length = OPTIONS.local * mesh.size
    over_sp = NamedSharding(mesh, PartitionSpec(("dp", "fsdp"), "sp"))
    shape = (1, length, OPTIONS.heads, OPTIONS.head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=over_sp)
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=over_sp)

    def forward_and_backward(q, k, v, segment, position, d_out):  # type: ignore[no-untyped-def]
        out, pull_back = jax.vjp(lambda q, k, v: function(q, k, v, segment, position), q, k, v)
        return out, pull_back(d_out)

    return jax.jit(forward_and_backward).lower(x, x, x, ids, ids, x).compile()


def main() -> None:
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed: nothing to compile with; the first lines of this file say how to get it")
        return
    ringattention: Callable[..., Any] | None = import_ringattention()
    ways: dict[str, Callable[..., jax.Array]] = {name: partial(ours, name) for name in ("splash", "xla")}
    if ringattention is not None:
        ways["ringattention"] = partial(peer, ringattention)
    for name in OPTIONS.topologies:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        for num_devices in OPTIONS.devices:
            mesh = Mesh(np.array(devices[:num_devices]).reshape(1, 1, 1, -1), ("dp", "fsdp", "tp", "sp"))
            found = []
            for way, function in ways.items():
                start = time.perf_counter()
                try:
                    analysis = compile_both(partial(function, mesh), mesh).memory_analysis()
                    assert analysis is not None
                    found.append(f"{way} {analysis.temp_size_in_bytes / 2**20:.1f} MiB")
                except Exception as error:  # a compiler's refusal is a result here
                    found.append(f"{way} refused ({str(error).strip().splitlines()[0][:80]})")
                found[-1] += f" ({time.perf_counter() - start:.0f} s)"
            length = OPTIONS.local * num_devices
            print(f"{name:10} {num_devices:2} devices, {length:6} tokens: {'  '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
