"""Ring attention beside dense attention and beside PyPI `ringattention`: time, balance and hops, on this machine.

    python benchmarks/attention.py                                  8,192 tokens, 1 and 8 devices
    python benchmarks/attention.py --length 32768 --devices 8 --rows packed
    python benchmarks/attention.py --balance                        no timing, only the critical paths of the orders

All ratios are of times taken in this one run, alternating, the least of `--repeats`. `dense` is
`jax.nn.dot_product_attention` with the same mask on one device. `ringattention` is measured when it is installed
(`pip install --no-deps ringattention==0.1.2 flax einops`); it is no requirement of the project, and needs a name that
this script gives back to jax.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--length", type=int, default=8192)
parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--head-dim", type=int, default=64)
parser.add_argument("--rows", nargs="+", choices=("causal", "packed"), default=["causal", "packed"])
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--forward-only", action="store_true")
parser.add_argument("--no-dense", action="store_true")
parser.add_argument("--cpu-time", action="store_true", help="of all threads: says more where others use the machine")
parser.add_argument("--balance", action="store_true")
OPTIONS = parser.parse_args()

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(OPTIONS.devices)}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402
from ringattention_peer import import_ringattention, peer  # noqa: E402

from lwm_train.attention import attention, token_order  # noqa: E402
from lwm_train.attention.balance import critical_path, hop_work  # noqa: E402

AXES = ("dp", "fsdp", "tp", "sp")
MOST_DENSE = 8192  # beyond, its scores alone take gigabytes
SOURCES = {"chat": (600, 1.0), "web": (1000, 1.5), "books": (8000, 1.0)}


def packed_row(median: float, sigma: float, seed: int, length: int) -> np.ndarray:
    lengths = 1 + np.random.default_rng(seed).lognormal(np.log(median), sigma, size=length).astype(int)
    ends = np.minimum(np.cumsum(lengths), length)
    return (np.searchsorted(ends, np.arange(length), side="right") + 1).astype(np.int32)


def print_balance(length: int = 32768, num_devices: int = 8, tile: int = 128, rows: int = 25) -> None:
    print(f"{length} tokens over {num_devices} devices, tiles of {tile}, {rows} rows")
    print("source  order        path/balanced  worst row  less than a full causal ring  last hop  ms/row")
    full_causal = num_devices * (length // num_devices // tile) ** 2
    for source, (median, sigma) in SOURCES.items():
        for order in ("contiguous", "zigzag", "striped", "dealt"):
            ratios, paths, hops, seconds = [], [], [], 0.0
            for seed in range(rows):
                row = packed_row(median, sigma, seed, length)
                start = time.perf_counter()
                permutation = token_order(order, row, num_devices, tile)
                seconds += time.perf_counter() - start
                work = hop_work(permutation, row, num_devices, tile)
                paths.append(critical_path(work))
                ratios.append(paths[-1] / (work.sum() / num_devices))
                hops.append(int(np.flatnonzero(work.any(axis=0))[-1]))
            gain = full_causal / np.mean(paths)
            print(
                f"{source:7} {order:12} {np.mean(ratios):13.3f} {max(ratios):10.3f} {gain:28.1f}x"
                f" {np.mean(hops):9.1f} {1e3 * seconds / rows:7.1f}"
            )


def make_mesh(num_devices: int) -> Mesh:
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((1, 1, 1, num_devices), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def ours(mesh: Mesh, q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, position: jax.Array) -> jax.Array:
    return attention(q, k, v, segment, position, mesh=mesh, schedule="ring")


def dense(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, position: jax.Array) -> jax.Array:
    seen = (segment[:, :, None] == segment[:, None, :]) & (position[:, None, :] <= position[:, :, None])
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])


def least_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least time of each, taken in turn so that a busy machine is busy for all."""
    clock = time.process_time if OPTIONS.cpu_time else time.perf_counter
    least = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            jax.block_until_ready(run())
            least[name] = min(least[name], clock() - start)
    return least


def compare(kind: str, num_devices: int, ringattention: Callable[..., Any] | None) -> None:
    rng = np.random.default_rng(0)
    length = OPTIONS.length
    segment = np.ones(length, np.int32) if kind == "causal" else packed_row(*SOURCES["chat"], 0, length)
    starts = np.flatnonzero(np.diff(segment, prepend=0))
    position = (np.arange(length) - np.repeat(starts, np.diff(np.append(starts, length)))).astype(np.int32)
    q, k, v, d_out = rng.normal(size=(4, 1, length, OPTIONS.heads, OPTIONS.head_dim)).astype(np.float32)
    mesh = make_mesh(num_devices)
    order = token_order("auto", segment, num_devices)
    over_sp = NamedSharding(mesh, PartitionSpec(("dp", "fsdp"), "sp"))

    def step(function: Callable[..., jax.Array], permutation: np.ndarray | None) -> Callable[[], Any]:
        arrays = [q, k, v, segment[None], position[None], d_out]
        if permutation is not None:
            arrays = [jax.device_put(x[:, permutation], over_sp) for x in arrays]

        def forward_and_backward(q, k, v, segment, position, d_out):  # type: ignore[no-untyped-def]
            out, pull_back = jax.vjp(lambda q, k, v: function(q, k, v, segment, position), q, k, v)
            return out, pull_back(d_out)

        def forward(q, k, v, segment, position, d_out):  # type: ignore[no-untyped-def]
            return function(q, k, v, segment, position)

        return partial(jax.jit(forward if OPTIONS.forward_only else forward_and_backward), *arrays)

    runs = {"ours": step(partial(ours, mesh), order)}
    if length <= MOST_DENSE and not OPTIONS.no_dense:
        runs["dense"] = step(dense, None)
    if ringattention is not None:
        runs["ringattention"] = step(partial(peer, ringattention, mesh), np.arange(length))
    seconds = least_seconds(runs, OPTIONS.repeats)
    ratios = "  ".join(f"ours/{name} {seconds['ours'] / s:.3f}" for name, s in seconds.items() if name != "ours")
    times = "  ".join(f"{name} {s:.3f} s" for name, s in seconds.items())
    print(f"{kind:7} {length} tokens, {num_devices} devices: {ratios}   ({times})", flush=True)


def main() -> None:
    if OPTIONS.balance:
        print_balance()
        return
    ringattention = import_ringattention()
    for kind in OPTIONS.rows:
        for num_devices in OPTIONS.devices:
            compare(kind, num_devices, ringattention)


if __name__ == "__main__":
    main()
