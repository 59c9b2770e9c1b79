"""The one entry to every schedule and kernel.

    q [B, L, H, D]  k, v [B, L, K, D]  ids [B, L]        B over (dp, fsdp), L over sp, H and K over tp
          |  jax.shard_map
    local [B', K', G, L', D]                             keys are put in this layout once, before they travel
          |  schedule: ring | allgather | ulysses        who meets whom, when; one device needs none
          |  kernel:   xla | splash                      one meeting
    out [B, L, H, D]

Legend: B rows, L tokens, H query heads, K key heads, G = H / K, D head size.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from lwm_train.attention.block import BlockKernel, TokenIds
from lwm_train.attention.gathered import allgather_local, ulysses_local
from lwm_train.attention.local import attend_local
from lwm_train.attention.ring import ring_local
from lwm_train.attention.splash import SplashKernel
from lwm_train.attention.xla import XlaKernel

SCHEDULES = ("auto", "ring", "allgather", "ulysses")
KERNELS: dict[str, Callable[[str], BlockKernel]] = {
    "xla": lambda platform: XlaKernel(64 if platform == "cpu" else 128),
    "splash": lambda platform: SplashKernel(interpret=platform != "tpu"),
}
"""What each kernel is for the platform that the program is made for, which need not be that of this machine."""

_ROWS = ("dp", "fsdp")
_IDS = PartitionSpec(_ROWS, "sp")
_HEADS = PartitionSpec(_ROWS, "sp", "tp", None)


_TOKENS_THAT_HIDE_A_HOP = {"tpu": 8192, "gpu": 4096}  # on each device, with one query head per key head
_MOST_TOKENS_GATHERED = 65536


def choose_schedule(local_tokens: int, group: int, local_key_heads: int, num_devices: int, platform: str) -> str:
    """What `auto` means: ring where computing one block hides sending the next, or where nothing else fits.

    A hop computes local_tokens^2 * H * D and sends local_tokens * K * D, so it is hidden when local_tokens * H / K
    is large enough (docs/attention.md). Below that one exchange beats many: heads against tokens if the key heads
    can be split, else the keys of a row that is short enough to be held by everybody.
    """
    if platform not in _TOKENS_THAT_HIDE_A_HOP or local_tokens * group >= _TOKENS_THAT_HIDE_A_HOP[platform]:
        return "ring"
    if local_key_heads % num_devices == 0:
        return "ulysses"
    return "allgather" if local_tokens * num_devices <= _MOST_TOKENS_GATHERED else "ring"


def attention(
    q_BLHD: jax.Array,
    k_BLKD: jax.Array,
    v_BLKD: jax.Array,
    segment_ids_BL: jax.Array,
    position_ids_BL: jax.Array,
    *,
    mesh: Mesh | None,
    schedule: str = "auto",
    kernel: str = "auto",
) -> jax.Array:
    """Causal attention within segments, exact for any order of the tokens; differentiable in q, k and v.

    Query i sees key j iff their segments are equal and not 0 and position[j] <= position[i]. Scores are scaled by
    1 / sqrt(D). A query that sees no key gives 0 and no gradient. Sums are kept in float32 (float64 for float64
    inputs); the result [B, L, H, D] has q's dtype.

    `mesh` has the axes dp, fsdp, tp, sp, with B over (dp, fsdp), L over sp, H and K over tp; None is one device.
    `kernel`: auto is splash on TPU and xla elsewhere. The platform is that of the mesh's devices, which may be a
    topology to compile for; without a mesh it is this machine's.

    Raises:
        ValueError: for shapes that do not fit each other or the mesh, or an unknown schedule or kernel.
    """
    _check_shapes(q_BLHD, k_BLKD, v_BLKD, segment_ids_BL, position_ids_BL)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    block_kernel = _pick(kernel, platform)
    if schedule not in SCHEDULES:
        raise ValueError(f"attention schedule: got {schedule!r}, wanted one of {', '.join(SCHEDULES)}")
    ids = TokenIds(segment_ids_BL, position_ids_BL)
    if mesh is None:
        return _one_device(block_kernel, q_BLHD, k_BLKD, v_BLKD, ids)
    _check_mesh(q_BLHD, k_BLKD, mesh, schedule)

    def on_each_device(q: jax.Array, k: jax.Array, v: jax.Array, ids: TokenIds) -> jax.Array:
        num_devices = mesh.shape["sp"]
        if num_devices == 1:
            return _one_device(block_kernel, q, k, v, ids)
        heads = _split_heads(q, k, v)
        chosen = schedule
        if schedule == "auto":
            group = q.shape[2] // k.shape[2]
            chosen = choose_schedule(q.shape[1], group, k.shape[2], num_devices, platform)
        if chosen == "allgather":
            return _join_heads(allgather_local(block_kernel, "sp", *heads, ids))
        if chosen == "ulysses":
            return _join_heads(ulysses_local(block_kernel, "sp", *heads, ids))
        return _join_heads(ring_local(block_kernel, "sp", tuple(mesh.axis_names), *heads, ids))

    sharded = jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(_HEADS, _HEADS, _HEADS, _IDS), out_specs=_HEADS, check_vma=False
    )
    return sharded(q_BLHD, k_BLKD, v_BLKD, ids)


def _one_device(kernel: BlockKernel, q: jax.Array, k: jax.Array, v: jax.Array, ids: TokenIds) -> jax.Array:
    return _join_heads(attend_local(kernel, *_split_heads(q, k, v), ids, ids))


def _split_heads(q_BLHD: jax.Array, k_BLKD: jax.Array, v_BLKD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, length, _, head_dim = q_BLHD.shape
    q_BLKGD = q_BLHD.reshape(rows, length, k_BLKD.shape[2], -1, head_dim)
    return q_BLKGD.transpose(0, 2, 3, 1, 4), k_BLKD.transpose(0, 2, 1, 3), v_BLKD.transpose(0, 2, 1, 3)


def _join_heads(out_BKGLD: jax.Array) -> jax.Array:
    rows, key_heads, group, length, head_dim = out_BKGLD.shape
    return out_BKGLD.transpose(0, 3, 1, 2, 4).reshape(rows, length, key_heads * group, head_dim)


def _pick(kernel: str, platform: str) -> BlockKernel:
    name = kernel if kernel != "auto" else "splash" if platform == "tpu" else "xla"
    if name not in KERNELS:
        raise ValueError(f"attention kernel: got {kernel!r}, wanted auto or one of {', '.join(KERNELS)}")
    return KERNELS[name](platform)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, position: jax.Array) -> None:
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape}; wanted [B, L, H, D] and twice [B, L, K, D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if segment.shape != q.shape[:2] or position.shape != q.shape[:2]:
        raise ValueError(
            f"attention: segment ids {segment.shape} and position ids {position.shape} for q {q.shape}; "
            f"wanted {q.shape[:2]}"
        )


def _check_mesh(q: jax.Array, k: jax.Array, mesh: Mesh, schedule: str) -> None:
    if set(mesh.axis_names) != {"dp", "fsdp", "tp", "sp"}:
        raise ValueError(f"attention: got a mesh with axes {mesh.axis_names}, wanted dp, fsdp, tp and sp")
    key_head_axes = (
        ("tp x sp", mesh.shape["tp"] * mesh.shape["sp"]) if schedule == "ulysses" else ("tp", mesh.shape["tp"])
    )
    wants = (
        ("rows", q.shape[0], "dp x fsdp", mesh.shape["dp"] * mesh.shape["fsdp"]),
        ("tokens in a row", q.shape[1], "sp", mesh.shape["sp"]),
        ("key heads", k.shape[2], *key_head_axes),
    )
    for what, count, axis, size in wants:
        if count % size:
            raise ValueError(f"attention: {count} {what} cannot be split over {axis} = {size}; make it a multiple")
