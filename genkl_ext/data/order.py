"""Which images make up which batch: the order of an epoch, and its share for one of several ranks.

Pure arithmetic on row numbers; every rank computes the same order and takes its own part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def epoch_order(rows: Rows, shuffle: bool, seed: int, epoch: int) -> Rows:
    """The rows of one epoch: as given, or in an order that seed and epoch determine."""
    if not shuffle:
        return rows
    return np.random.default_rng([seed, epoch]).permutation(rows)


def num_batches(count: int, batch_size: int, shards: int, drop_last: bool) -> int:
    """Batches of every rank when ``shards`` ranks share ``count`` images; the same on each.

    Raises:
        ValueError: without ``drop_last``, an equal number of batches would leave a rank with an
            empty one: fewer images than ranks, or batches of one image that do not come out even.
    """
    if drop_last:
        return count // shards // batch_size
    largest_share = -(-count // shards)
    batches = -(-largest_share // batch_size)
    if count and count // shards < batches:
        raise ValueError(
            f"make_loader: {count} images in batches of {batch_size} cannot be shared by {shards} "
            "ranks with as many batches for each; use drop_last=True or a larger batch_size"
        )
    return batches


def shard_batches(
    order: Rows, batch_size: int, shard: tuple[int, int], drop_last: bool
) -> list[Rows]:
    """The batches of one rank.

    Each row of ``order`` is in exactly one batch of exactly one rank, without padding (with
    ``drop_last``: in at most one, and all batches are full). All ranks have the same number of
    batches, of at most ``batch_size`` rows and at least one.

    Args:
        order: rows of the epoch.
        shard: (rank, number of ranks). The rank takes every so many-th row.
    """
    rank, shards = shard
    batches = num_batches(len(order), batch_size, shards, drop_last)
    mine = order[rank::shards]
    if drop_last:
        return list(mine[: batches * batch_size].reshape(batches, batch_size))
    cuts = np.minimum(np.arange(1, batches) * batch_size, len(mine) - 1)
    return np.split(mine, cuts) if batches else []
