"""One process of a ring that spans processes: prints a digest of the gradients of its whole row.

python ring_process.py PORT NUM_PROCESSES PROCESS DEVICES_PER_PROCESS
"""

import os
import sys

port, num_processes, process, num_local = (int(argument) for argument in sys.argv[1:])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_local}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from lwm_train.attention import attention  # noqa: E402

if num_processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process)
mesh = jax.make_mesh((1, 1, 1, jax.device_count()), ("dp", "fsdp", "tp", "sp"), axis_types=(AxisType.Auto,) * 4)
over_sp = NamedSharding(mesh, PartitionSpec(None, "sp"))


def spread(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, over_sp, lambda index: x[index])


length = 512
segment = (np.arange(length) // 200 + 1).astype(np.int32)[None]
position = (np.arange(length) % 200).astype(np.int32)[None]
q, k, v, d_out = np.random.default_rng(0).normal(size=(4, 1, length, 2, 8)).astype(np.float32)


@jax.jit
def gradients(q, k, v, segment, position, d_out):  # type: ignore[no-untyped-def]
    out, pull_back = jax.vjp(lambda q, k, v: attention(q, k, v, segment, position, mesh=mesh), q, k, v)
    return out, *pull_back(d_out)


results = gradients(*(spread(x) for x in (q, k, v, segment, position, d_out)))
whole = [multihost_utils.process_allgather(x, tiled=True) for x in results]
if process == 0:
    print(*(np.asarray(x).tobytes().hex() for x in whole))
