"""What a ring costs for a row, counted in live pairs of tiles, and how to deal chunks so that it costs least.

At hop t device d computes its queries against the keys of device d - t. All wait for the slowest, so

    critical path = sum over hops of max(greatest work of any device at this hop, time to send a block on)

    work of device  0   1   2   3
      hop 0         9   9   8   9     -> 9         balanced work is the sum of all entries over N
      hop 1         5   4   5   5     -> 5         (the lowest critical path that any order can have)
      ...

Legend: L tokens, N devices or hops, C chunks.
"""

import numpy as np

_MOST_CHUNKS = 512  # more are merged, so that dealing a row of a million tokens stays below a second
_SEARCH_WORK = 60_000_000  # numbers looked at before the search stops


def critical_path(work_NN: np.ndarray, send_cost: float = 0.0) -> float:
    """The time of one pass in live pairs of tiles, for `work_NN[device, hop]` as `hop_work` gives it."""
    needed = np.flatnonzero(work_NN.any(axis=0))
    if needed.size == 0:
        return 0.0
    slowest = work_NN[:, : needed[-1] + 1].max(axis=0).astype(float)
    slowest[:-1] = np.maximum(slowest[:-1], send_cost)  # nothing is sent during the last hop
    return float(slowest.sum())


def hop_work(order_L: np.ndarray, segment_ids_L: np.ndarray, num_devices: int, tile: int) -> np.ndarray:
    """Live pairs of tiles for each device and hop, int64 [N, N], when the row is put in `order_L`.

    Counts what the kernel would compute, by the kernel's own rule (see `mask.py`), so tiles that mix documents
    count as live wherever the rule cannot exclude them. The tile is shortened as the kernel does it.
    """
    local = len(order_L) // num_devices
    tile = -(-local // -(-local // tile))
    positions_L = _positions(segment_ids_L)
    segment = _in_tiles(segment_ids_L[order_L], num_devices, tile, fill=0)
    position = _in_tiles(positions_L[order_L], num_devices, tile, fill=0)
    last = np.iinfo(np.int64).max
    live = segment != 0
    first_segment = np.where(live, segment, last).min(axis=-1)
    last_segment = np.where(live, segment, 0).max(axis=-1)
    least = np.where(live, position, last).min(axis=-1)
    greatest = np.where(live, position, -1).max(axis=-1)
    first_position = np.where(live & (segment == first_segment[..., None]), position, last).min(axis=-1)
    last_position = np.where(live & (segment == last_segment[..., None]), position, -1).max(axis=-1)
    work = np.zeros((num_devices, num_devices), np.int64)
    for device in range(num_devices):
        for hop in range(num_devices):
            q, k = (device, slice(None), None), ((device - hop) % num_devices, None, slice(None))
            meet = (first_segment[q] <= last_segment[k]) & (first_segment[k] <= last_segment[q])
            meet &= least[k] <= greatest[q]
            meet &= (first_segment[k] < last_segment[q]) | (
                (first_segment[k] == last_segment[q]) & (first_position[k] <= last_position[q])
            )
            work[device, hop] = meet.sum()
    return work


def deal_chunks(segment_ids_L: np.ndarray, num_devices: int, chunk: int) -> np.ndarray:
    """The device of each chunk, int64 [L / chunk]; every device gets equally many.

    Starts from chunks dealt in turn (already good for long documents) and swaps pairs of chunks as long as that
    shortens the critical path or evens the hops.
    """
    local_chunks = len(segment_ids_L) // num_devices // chunk
    merged = next(m for m in range(1, local_chunks + 1) if local_chunks % m == 0 and _few(m, local_chunks, num_devices))
    work_CC = _chunk_work(segment_ids_L, chunk, merged)
    device_C = np.arange(len(work_CC)) % num_devices
    return np.repeat(_swap_until_even(work_CC, device_C, num_devices), merged)


def _few(merged: int, local_chunks: int, num_devices: int) -> bool:
    return merged == local_chunks or local_chunks // merged * num_devices <= max(_MOST_CHUNKS, 2 * num_devices)


def _chunk_work(segment_ids_L: np.ndarray, tile: int, merged: int) -> np.ndarray:
    """Live pairs of tiles between groups of `merged` tiles: int64 [C, C], queries by keys, from the run table."""
    starts = np.flatnonzero(np.diff(segment_ids_L, prepend=-1))
    ends = np.append(starts[1:], len(segment_ids_L))
    num_tiles = len(segment_ids_L) // tile
    num_groups = num_tiles // merged
    work = np.zeros((num_groups, num_groups), np.int64)
    live_tile = np.zeros(num_tiles, np.int64)
    for start, end in zip(starts, ends, strict=True):
        if segment_ids_L[start] == 0:
            continue
        first, last = start // tile, (end - 1) // tile
        live_tile[first : last + 1] = 1
        groups = np.arange(first // merged, last // merged + 1)
        tiles = np.minimum(last, groups * merged + merged - 1) - np.maximum(first, groups * merged) + 1
        span = slice(int(groups[0]), int(groups[-1]) + 1)
        work[span, span] += np.tril(np.outer(tiles, tiles), -1) + np.diag(tiles * (tiles - 1) // 2)
    return work + np.diag(live_tile.reshape(num_groups, merged).sum(axis=1))


def _swap_until_even(work_CC: np.ndarray, device_C: np.ndarray, num_devices: int) -> np.ndarray:
    """Local search: for one chunk after the other, the swap with any other chunk that lowers the score most.

    With A the chunks' devices as one-hot rows, work between devices is P = A^T W A. Swapping chunks x and y is a
    change of rank one in A, so the new P follows from W A and A^T W without a product.
    """
    num_chunks = len(work_CC)
    one_hot = np.eye(num_devices, dtype=np.int64)
    placed_CN = one_hot[device_C]
    sees_CN, seen_CN = work_CC @ placed_CN, work_CC.T @ placed_CN
    pairs_NN = placed_CN.T @ work_CC @ placed_CN
    own_C = np.diag(work_CC)
    devices = np.arange(num_devices)
    by_hop_NN = devices[:, None] * num_devices + (devices[:, None] - devices) % num_devices
    weight = 5 * num_devices * max(1, int(pairs_NN.sum()) // num_devices**2)

    def score(pairs_XNN: np.ndarray) -> np.ndarray:
        """Critical path, plus the variance within hops: the variance leads over the path's plateaus."""
        hops_XNN = pairs_XNN.reshape(len(pairs_XNN), -1)[:, by_hop_NN]
        variance = num_devices * (hops_XNN**2).sum(axis=(1, 2)) - (hops_XNN.sum(axis=1) ** 2).sum(axis=1)
        return hops_XNN.max(axis=1).sum(axis=1) * weight + variance

    best = score(pairs_NN[None])[0]
    tries = min(4 * num_chunks, _SEARCH_WORK // (num_chunks * num_devices**2))
    since_better = 0
    for x in (np.arange(tries) * _stride(num_chunks)) % num_chunks:
        move_CN = one_hot[device_C] - one_hot[device_C[x]]
        twice_C = own_C[x] + own_C - work_CC[x] - work_CC[:, x]
        pairs_CNN = (
            pairs_NN
            + move_CN[:, :, None] * (sees_CN[x] - sees_CN)[:, None, :]
            + (seen_CN[x] - seen_CN + twice_C[:, None] * move_CN)[:, :, None] * move_CN[:, None, :]
        )
        scores = score(pairs_CNN)
        y = int(scores.argmin())
        if scores[y] >= best:
            since_better += 1
            if since_better == num_chunks:
                break
            continue
        best, since_better = scores[y], 0
        pairs_NN = pairs_CNN[y]
        sees_CN = sees_CN + np.outer(work_CC[:, x] - work_CC[:, y], move_CN[y])
        seen_CN = seen_CN + np.outer(work_CC[x] - work_CC[y], move_CN[y])
        device_C[x], device_C[y] = device_C[y], device_C[x]
    return device_C


def _stride(num_chunks: int) -> int:
    """A step near the golden section that visits every chunk once before it comes round."""
    step = max(1, round(0.618 * num_chunks))
    while np.gcd(step, num_chunks) != 1:
        step += 1
    return step


def _positions(segment_ids_L: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(segment_ids_L, prepend=-1))
    return np.arange(len(segment_ids_L)) - np.repeat(starts, np.diff(np.append(starts, len(segment_ids_L))))


def _in_tiles(x_L: np.ndarray, num_devices: int, tile: int, fill: int) -> np.ndarray:
    """[L] -> int64 [N, tiles, tile], the last tile of each device filled up."""
    local = x_L.reshape(num_devices, -1).astype(np.int64)
    short = -local.shape[1] % tile
    return np.pad(local, ((0, 0), (0, short)), constant_values=fill).reshape(num_devices, -1, tile)
