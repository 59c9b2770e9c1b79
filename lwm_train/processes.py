"""The processes of one run: how they find each other, and what they agree on.

One process a host, all of them with the same command. Each holds its own devices of the mesh and reads its own part
of the rows; the first of them writes the files that are written once. When one of them dies, the others end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from lwm_train.config import MeshSpec
from lwm_train.mesh import AXES

HEARTBEAT_SECONDS = 30  # without a sign of life from another process, a process ends itself


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None, meshes: Sequence[MeshSpec]
) -> None:
    """Become one of the run's processes; must run before the first use of a device.

    Without arguments JAX finds them by itself, under Slurm, Open MPI and on Cloud TPU.
    ValueError where only some of the three are given.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(
            "--coordinator, --num-processes and --process-id go together (or --distributed alone, where JAX knows the "
            f"cluster); got {given}"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # train.py hears SIGTERM itself
    flags = os.environ.get("XLA_FLAGS", "")
    if num_processes is not None and "xla_force_host_platform_device_count" not in flags:
        wanted = max(math.prod(size for axis in AXES if (size := getattr(mesh, axis)) != -1) for mesh in meshes)
        devices = max(1, wanted // num_processes)
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ValueError(
            f"no cluster that JAX knows ({error}); say --coordinator HOST:PORT --num-processes N --process-id I"
        ) from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process. All of them must ask at the same point."""
    return flag if jax.process_count() == 1 else bool(_gather(flag).any())


def all_of(flag: bool) -> bool:
    """Whether the flag is set in every process. All of them must ask at the same point."""
    return flag if jax.process_count() == 1 else bool(_gather(flag).all())


def meet(name: str) -> None:
    """Wait here for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _gather(flag: bool) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(np.array([flag])))
