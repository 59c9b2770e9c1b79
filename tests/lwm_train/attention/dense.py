"""Dense attention over packed rows in float64, written out in numpy: what every kernel is judged by.

It builds its own mask and its own gradients and shares no code with the package:

    P = softmax(Q K^T / sqrt(D) where seen)     dV = P^T dO     dS = P * (dO V^T - rowsum(dO * O))
    O = P V                                     dQ = dS K / sqrt(D)     dK = dS^T Q / sqrt(D)
"""

import numpy as np


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segment: np.ndarray, position: np.ndarray, d_out: np.ndarray
) -> tuple[np.ndarray, ...]:
    """out, dq, dk, dv in float64, one row and one head at a time."""
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = q.shape[-1] ** -0.5
    for row in range(q.shape[0]):
        seen = np.array(segment[row][:, None] == segment[row][None, :])
        seen &= position[row][None, :] <= position[row][:, None]
        seen &= segment[row][:, None] > 0
        blind = ~seen.any(axis=1)
        for head in range(q.shape[2]):
            kv_head = head // (q.shape[2] // k.shape[2])
            qh, kh, vh, doh = q[row, :, head], k[row, :, kv_head], v[row, :, kv_head], d_out[row, :, head]
            score = np.where(seen, qh @ kh.T * scale, -np.inf)
            score[blind] = 0
            p = np.exp(score - score.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            p[blind] = 0
            out[row, :, head] = p @ vh
            ds = p * (doh @ vh.T - (doh * out[row, :, head]).sum(axis=1, keepdims=True))
            dq[row, :, head] = ds @ kh * scale
            dk[row, :, kv_head] += ds.T @ qh * scale
            dv[row, :, kv_head] += p.T @ doh
    return out, dq, dk, dv


def _pack(lengths: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments of the given lengths end to end, cut at `length`, then padding; segment and position ids [L]."""
    segment = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(length)])[:length]
    position = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(length)])[:length]
    return segment.astype(np.int32), position.astype(np.int32)


def packed_ids(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    packed = [_pack(lengths, length) for lengths in rows]
    return np.stack([s for s, _ in packed]), np.stack([p for _, p in packed])
