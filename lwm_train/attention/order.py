"""The order of a row's tokens over the ring: which device holds which token. On the host, from segment ids alone.

A row of 8 chunks, 2 devices, device 0's chunks first (`token_order` gives the permutation, new place -> old place):

    contiguous   0 1 2 3 | 4 5 6 7      as the row is: few hops for short documents, no balance
    zigzag       0 1 6 7 | 2 3 4 5      chunk c and 2N - 1 - c: balanced for one document as long as the row
    striped      token t to device t % N: balanced, but tiles mix documents and little can be skipped
    dealt        0 2 5 6 | 1 3 4 7      chunks of one tile, dealt so that the devices wait for each other least
    auto         the cheapest of contiguous, zigzag and dealt for this row

An order is a pure function of its arguments: it draws nothing, and it counts in whole numbers.
"""

import numpy as np

from lwm_train.attention.balance import critical_path, deal_chunks, hop_work

ORDERS = ("auto", "dealt", "zigzag", "striped", "contiguous")


def token_order(
    order: str, segment_ids_L: np.ndarray, num_devices: int, tile: int = 128, send_cost: float = 0.0
) -> np.ndarray:
    """The permutation int32 [L] that puts a row in ring order: `new = old[permutation]`.

    Device d holds places d * L / N to (d + 1) * L / N of the new row. To undo, `old[permutation] = new`.

    Args:
        order: one of `ORDERS`.
        segment_ids_L: integers [L], 0 is padding; a segment is one stretch of the row.
        num_devices: the size N of the mesh axis `sp`; L must be a multiple of it.
        tile: the tile of the block kernel; `dealt` deals chunks of this size, or of the next divisor of L / N.
        send_cost: for `auto`, the time to send one block of keys on, in units of one pair of tiles.

    Raises:
        ValueError: for an unknown order, or a row that cannot be cut as the order asks.
    """
    length = len(segment_ids_L)
    if order not in ORDERS:
        raise ValueError(f"token order: got {order!r}, wanted one of {', '.join(ORDERS)}")
    if length % num_devices:
        raise ValueError(f"token order: a row of {length} tokens cannot be split over sp = {num_devices}")
    if order == "auto":
        return _cheapest(segment_ids_L, num_devices, tile, send_cost)
    if order == "dealt":
        return _dealt(segment_ids_L, num_devices, tile)
    places = np.arange(length, dtype=np.int32)
    if order == "striped":
        return places.reshape(-1, num_devices).T.reshape(-1)
    if order == "zigzag":
        if length % (2 * num_devices):
            raise ValueError(
                f"token order: zigzag cuts a row into 2 x sp = {2 * num_devices} chunks, and {length} tokens are not "
                "a multiple of that; use dealt, or another row length"
            )
        chunks = places.reshape(2 * num_devices, -1)
        return np.concatenate([chunks[:num_devices], chunks[: num_devices - 1 : -1]], axis=1).reshape(-1)
    return places


def _dealt(segment_ids_L: np.ndarray, num_devices: int, tile: int) -> np.ndarray:
    chunk = _chunk_size(len(segment_ids_L) // num_devices, tile)
    device_of_chunk = deal_chunks(segment_ids_L, num_devices, chunk)
    chunks = np.arange(len(segment_ids_L), dtype=np.int32).reshape(-1, chunk)
    return chunks[np.argsort(device_of_chunk, kind="stable")].reshape(-1)


def _chunk_size(local_length: int, tile: int) -> int:
    """The greatest divisor of the local length that is at most a tile."""
    return next(size for size in range(min(tile, local_length), 0, -1) if local_length % size == 0)


def _cheapest(segment_ids_L: np.ndarray, num_devices: int, tile: int, send_cost: float) -> np.ndarray:
    names = ["contiguous"] if num_devices == 1 else ["contiguous", "zigzag", "dealt"]
    if len(segment_ids_L) % (2 * num_devices):
        names = [name for name in names if name != "zigzag"]
    orders = [token_order(name, segment_ids_L, num_devices, tile) for name in names]
    costs = [critical_path(hop_work(each, segment_ids_L, num_devices, tile), send_cost) for each in orders]
    return orders[int(np.argmin(costs))]
