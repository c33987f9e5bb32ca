"""The training blocks of several sources, each source cut separately.

Without weights, an epoch takes all blocks of all sources. With weights, each source gives its share. The epoch ends
when the first source is used up, so no block appears twice in an epoch. The other sources continue in the next epoch
where they stopped: each of their blocks is used once before any repeats. `block_order` shuffles the blocks of an epoch.

A stream does not know its length. Each block comes from the source that is furthest behind its share. The epoch ends
when the first source ends. A longer source continues in the next epoch. When it ends, it restarts in a different order;
only at such a restart may a block appear twice in an epoch.

T: tokens in a block, n: blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train_loop.data.blocks import Split
from train_loop.data.row_files import digest_of
from train_loop.data.streaming import BEGINNING, Stream
from train_loop.position import Place
from train_loop.settings import Settings

WEIGHTS = "weights of the sources"  # in a checkpoint's identity


class JoinedBlocks:
    """Blocks [n, T] of several arrays, joined without a copy. `chosen`: their numbers among all blocks, counted through
    the arrays in order. It supports len, shape, indexing and np.asarray, like a numpy array."""

    def __init__(self, parts: Sequence[np.ndarray], chosen: np.ndarray | None = None) -> None:
        self.parts, self.begins = parts, np.cumsum([0, *map(len, parts)])
        self.chosen = np.arange(self.begins[-1]) if chosen is None else chosen
        self.shape, self.dtype = (len(self.chosen), parts[0].shape[1]), parts[0].dtype

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = np.asarray(self.chosen[index])
        found = np.empty((*numbers.shape, self.shape[1]), dtype=self.dtype)
        for begin, part in zip(self.begins, self.parts, strict=False):
            own = (numbers >= begin) & (numbers < begin + len(part))
            found[own] = part[numbers[own] - begin]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def blocks_of_shares(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The number of blocks of each source in an epoch, at least 1 each. The epoch ends when the first source is used
    up. `sizes`: blocks of each source. `shares` sum to 1."""
    num_blocks = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [max(1, round(num_blocks * share)) for share in shares]


def blocks_of_epoch(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The numbers [n] of an epoch's blocks, counted through all sources in order: `counts` of each source's `sizes`.
    The seed gives each source's blocks an order. Each epoch takes the next blocks in that order, and starts again at
    its end."""
    found, begin = [], 0
    for i, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        order = np.random.Generator(np.random.PCG64([seed, i, size])).permutation(size)
        found.append(begin + order[(epoch * count + np.arange(count)) % size])
        begin += size
    return np.concatenate(found)


def _rounded(shares: Mapping[str, float] | None) -> list[float] | None:
    return [round(share, 6) for share in shares.values()] if shares else None


class Mixture(Split):
    """The prepared blocks of several sources: a `TrainingData`. `blocks` holds those of all sources; `num_blocks` is
    the number in an epoch."""

    def __init__(self, splits: Mapping[str, Split], shares: Mapping[str, float] | None) -> None:
        self.splits, self.shares = splits, shares
        self.sizes = [split.num_blocks for split in splits.values()]
        self.counts_in_epoch = blocks_of_shares(self.sizes, list(shares.values())) if shares else self.sizes
        joined: Any = JoinedBlocks([split.blocks for split in splits.values()])
        apart = any(split.documents_apart for split in splits.values())
        super().__init__("training", joined, documents_apart=apart)

    @property
    def num_blocks(self) -> int:
        return sum(self.counts_in_epoch)

    @property
    def num_targets(self) -> int:
        """Target tokens of an epoch, estimated: epochs take different blocks."""
        counts = zip(self.splits.values(), self.counts_in_epoch, strict=True)
        return round(sum(split.num_targets * count / split.num_blocks for split, count in counts))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The numbers of an epoch's blocks, [n], in the order that `block_order` gives them. Raises ValueError as
        `Split.order` does."""
        taken = blocks_of_epoch(self.sizes, self.counts_in_epoch, seed, epoch) if self.shares else None
        part: Any = JoinedBlocks(self.blocks.parts, taken)  # type: ignore[attr-defined]
        return part.chosen[Split(self.name, part).order(seed, epoch)]

    def identity(self) -> dict[str, Any]:
        digests = [split.digest() for split in self.splits.values()]
        return {"training blocks": digest_of(digests), WEIGHTS: _rounded(self.shares)}

    def summary(self) -> str:
        block_size, lines = self.blocks.shape[1], []
        for (name, split), count in zip(self.splits.items(), self.counts_in_epoch, strict=True):
            share = f"an epoch takes {count:,} blocks = {count * block_size:,} tokens, {count / self.num_blocks:.1%}"
            lines.append(f"{name}: {split.summary()}; {share}")
        return "\n".join(lines)


class MixedStream(Stream):
    """The blocks of several streams, mixed by their shares: a `TrainingData`.

    `Place.stream` holds {"sources": the place in each source, and its number of completed passes; "taken": blocks of
    each in this epoch; "last": the source that ends the epoch, None while unknown}.
    """

    def __init__(self, streams: Mapping[str, Stream], shares: Mapping[str, float], settings: Settings) -> None:
        self.streams, self.shares, self.settings = streams, list(shares.values()), settings
        self.blocks = next(iter(streams.values())).blocks
        self.documents_apart = any(stream.documents_apart for stream in streams.values())
        identities = [stream.identity() for stream in streams.values()]
        self._identity = {name: digest_of([each[name] for each in identities]) for name in identities[0]}
        self._identity |= {"shuffle_buffer_size": settings.shuffle_buffer_size, WEIGHTS: _rounded(shares)}

    def summary(self) -> str:
        parts = zip(self.streams.items(), self.shares, strict=True)
        return "\n".join(f"{name}: {share:.1%} of the blocks; {stream.summary()}" for (name, stream), share in parts)

    def blocks_from(self, start: Place, settings: Settings, W: int, rank: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields (block, `Place.stream` after it) for each block from `start` to the end of its epoch."""
        streams, num = list(self.streams.values()), len(self.streams)
        state = start.stream or {"sources": [{**BEGINNING, "round": 0}] * num, "taken": [0] * num, "last": None}
        places, taken, last = list(state["sources"]), list(state["taken"]), state["last"]
        if start.stream and not start.window:  # of the previous epoch: the source due next had ended
            last = self._next(taken)
            places[last] = {**BEGINNING, "round": places[last]["round"] + 1}
            taken = [0] * num

        def read(i: int) -> Iterator[tuple[np.ndarray, Any]]:
            return streams[i].blocks_at(places[i], settings.seed, places[i]["round"], W, rank)

        readers = [read(i) for i in range(num)]
        while True:
            i = self._next(taken)
            found = next(readers[i], None)
            if found is None and last in (None, i):
                return
            if found is None:
                places[i] = {**BEGINNING, "round": places[i]["round"] + 1}
                readers[i] = read(i)
                found = next(readers[i])
            block, place = found
            places[i], taken[i] = {**place, "round": places[i]["round"]}, taken[i] + 1
            yield block, {"sources": list(places), "taken": list(taken), "last": last}

    def _next(self, taken: Sequence[int]) -> int:
        """The source furthest behind its share, after `taken` blocks of each."""
        return min(range(len(taken)), key=lambda i: ((taken[i] + 0.5) / self.shares[i], i))
