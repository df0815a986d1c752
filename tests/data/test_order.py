"""The order of an epoch and its shares: every row once, nothing twice, equal numbers of batches."""

from math import ceil

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from genkl_ext.data.order import epoch_order, num_batches, shard_batches


@given(
    count=st.integers(0, 200),
    batch_size=st.integers(1, 40),
    ranks=st.integers(1, 9),
)
def test_ranks_share_every_row_once(count, batch_size, ranks):
    rows = np.arange(100, 100 + count)
    try:
        expected = num_batches(count, batch_size, ranks, drop_last=False)
    except ValueError:
        # Impossible indeed: more batches for each rank than the last rank has images.
        assert ceil(ceil(count / ranks) / batch_size) > count // ranks
        assume(False)
    shares = [shard_batches(rows, batch_size, (r, ranks), drop_last=False) for r in range(ranks)]
    assert [len(share) for share in shares] == [expected] * ranks
    batches = [batch for share in shares for batch in share]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    seen = np.concatenate(batches) if batches else np.empty(0, int)
    np.testing.assert_array_equal(np.sort(seen), rows)


@given(count=st.integers(0, 200), batch_size=st.integers(1, 40), ranks=st.integers(1, 9))
def test_drop_last_gives_full_batches(count, batch_size, ranks):
    rows = np.arange(count)
    shares = [shard_batches(rows, batch_size, (r, ranks), drop_last=True) for r in range(ranks)]
    assert {len(share) for share in shares} == {num_batches(count, batch_size, ranks, True)}
    batches = [batch for share in shares for batch in share]
    assert all(len(batch) == batch_size for batch in batches)
    seen = [int(row) for batch in batches for row in batch]
    assert len(set(seen)) == len(seen)
    assert count - len(seen) < batch_size * ranks + ranks


def test_one_rank_without_shuffling_goes_through_in_order():
    rows = np.array([7, 3, 11, 5, 2])
    batches = shard_batches(rows, 2, (0, 1), drop_last=False)
    assert [batch.tolist() for batch in batches] == [[7, 3], [11, 5], [2]]


def test_a_rank_that_comes_out_even_gives_one_image_to_its_last_batch():
    # 9 images on 2 ranks: 5 and 4. Batches of 4: the first rank needs two, so the second has two.
    shares = [shard_batches(np.arange(9), 4, (rank, 2), drop_last=False) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 1], [3, 1]]


@pytest.mark.parametrize(("count", "batch_size", "ranks"), [(3, 8, 4), (5, 1, 2)])
def test_ranks_that_cannot_have_as_many_batches_are_refused(count, batch_size, ranks):
    with pytest.raises(ValueError, match="drop_last=True or a larger batch_size"):
        num_batches(count, batch_size, ranks, drop_last=False)
    assert num_batches(count, batch_size, ranks, drop_last=True) >= 0


def test_the_order_depends_on_seed_and_epoch_alone():
    rows = np.arange(50, 150)
    order = epoch_order(rows, True, seed=3, epoch=2)
    np.testing.assert_array_equal(order, epoch_order(rows, True, seed=3, epoch=2))
    np.testing.assert_array_equal(np.sort(order), rows)
    for seed, epoch in ((3, 3), (4, 2), (2, 3)):
        assert (order != epoch_order(rows, True, seed, epoch)).any()
    assert epoch_order(rows, False, 3, 2) is rows
