"""A dry run of the paper's size: plans rows for 10^9 records by their lengths alone, part by part, in bounded memory.

Records are captioned pictures, videos, chats and books, in the paper's proportions, as synthetic lengths. Each part is
what one build plans: mixed and packed by the build's own code. Nothing is written.

    python benchmarks/plan_scale.py                                    10^7 records, in seconds
    python benchmarks/plan_scale.py --records 1e9 --parts 20           the whole, in a quarter of an hour
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from lwm_data.mix import mixed_order
from lwm_data.pack import pack

FRAME = 257
SOURCES = ("text-image", "text-video", "chats", "books")
OF_RECORDS = (
    0.979,
    0.012,
    0.0085,
    0.0005,
)  # about the paper's: some 10^9 pictures, 10^7 videos, 10^7 chats, 5 * 10^5 books


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=float, default=1e7)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--row-length", type=int, default=1 << 20)
    args = parser.parse_args()
    begin = time.process_time()  # others may use the machine
    records, tokens, rows = 0, 0, 0
    for part in range(args.parts):
        count = int(args.records) // args.parts
        sources, lengths = synthetic(part, count, args.row_length)
        order = mixed_order(sources, lengths, [None] * len(SOURCES), "tokens", seed=0)
        groups = np.zeros(len(order), np.int32)
        rows += sum(1 for _ in pack(lengths[order], groups, args.row_length, "masked"))
        records, tokens = records + count, tokens + int(lengths.sum())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        seconds = time.process_time() - begin
        print(
            f"part {part + 1}/{args.parts}: {records:,} records, {tokens / 1e9:,.1f}G tokens, {rows:,} rows of "
            f"{args.row_length:,}, {100 * tokens / (rows * args.row_length):.3f}% full; {seconds:,.0f} s of a core, "
            f"{records / seconds / 1e6:.2f}M records/s, peak {peak:.2f} GiB",
            flush=True,
        )


def synthetic(part: int, count: int, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """sources int32[count] and lengths int64[count]: a picture is one frame and a caption, a video 4 to 120 frames."""
    rng = np.random.default_rng(part)
    sources = rng.choice(len(SOURCES), count, p=OF_RECORDS).astype(np.int32)
    captions = rng.lognormal(3.0, 0.7, count).astype(np.int64)
    lengths = captions + 5 + FRAME
    for source, drawn in ((1, FRAME * rng.integers(4, 121, count)), (2, None), (3, None)):
        inside = sources == source
        n = int(inside.sum())
        if drawn is not None:
            lengths[inside] = captions[inside] + 5 + drawn[inside]
        else:
            mean, sigma = ((7.0, 0.8), (11.3, 0.7))[source - 2]
            lengths[inside] = rng.lognormal(mean, sigma, n).astype(np.int64)
    return sources, np.clip(lengths, 1, row_length)


if __name__ == "__main__":
    main()
