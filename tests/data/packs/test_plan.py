import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.packs.plan import PACKING_MODES, plan_epoch

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@pytest.mark.parametrize("mode", PACKING_MODES)
@given(lengths=lengths_lists, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_document_stands_in_exactly_one_pack_that_holds_it(mode, lengths, seed, epoch):
    plan = plan_epoch(np.array(lengths), 40, seed=seed, epoch=epoch, mode=mode)
    assert sorted(plan.documents) == list(range(len(lengths)))
    for pack in range(len(plan)):
        assert 1 <= sum(lengths[d] for d in plan.pack(pack)) <= 40


@pytest.mark.parametrize("mode", PACKING_MODES)
def test_plan_depends_on_seed_and_epoch_and_nothing_else(mode):
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    plan = plan_epoch(lengths, 40, seed=1, epoch=0, mode=mode)
    same = plan_epoch(lengths, 40, seed=1, epoch=0, mode=mode)
    assert np.array_equal(plan.documents, same.documents)
    for seed, epoch in ((2, 0), (1, 1)):
        other = plan_epoch(lengths, 40, seed=seed, epoch=epoch, mode=mode)
        assert not np.array_equal(plan.documents, other.documents)


def test_pack_count_of_best_fit_depends_on_lengths_alone():
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    counts = {len(plan_epoch(lengths, 40, seed=1, epoch=epoch)) for epoch in range(20)}
    assert len(counts) == 1


def test_sequential_without_shuffle_keeps_file_order():
    lengths = np.array([3, 3, 5, 2, 8])
    plan = plan_epoch(lengths, 8, seed=0, epoch=0, mode="sequential", shuffle=False)
    packs = [list(plan.pack(p)) for p in range(len(plan))]
    assert packs == [[0, 1], [2, 3], [4]]


def test_best_fit_without_shuffle_orders_packs_by_first_document():
    plan = plan_epoch(np.array([4, 8, 3, 5]), 8, seed=0, epoch=0, shuffle=False)
    assert [list(plan.pack(p)) for p in range(len(plan))] == [[0], [1], [2, 3]]


def test_balancing_keeps_each_global_batch_and_levels_the_ranks():
    lengths = np.random.default_rng(0).integers(1, 512, 4000)
    packs: dict[str, list[tuple[int, ...]]] = {}
    spread = {}
    for name, balance in (("plain", None), ("level", 64)):
        works, packs[name] = [], []
        for epoch in range(3):
            plan = plan_epoch(
                lengths, 512, seed=1, epoch=epoch,
                balance_every=balance, begins_at=len(packs[name]),
            )  # fmt: skip
            works.append(np.add.reduceat(lengths[plan.documents] ** 2, plan.pack_offsets[:-1]))
            packs[name] += [tuple(plan.pack(pack)) for pack in range(len(plan))]
        # Ranks of one step: groups of 8 neighbouring packs, the step waits for the costliest.
        work = np.concatenate(works)
        work = work[: len(work) // 64 * 64].reshape(-1, 8)
        spread[name] = work.max(axis=1) / work.mean(axis=1)
    assert len(packs["plain"]) // 3 % 64  # global batches straddle the epochs
    assert spread["level"].mean() < 1.05 < 1.2 < spread["plain"].mean()
    assert spread["level"].max() < 1.3
    for begin in range(0, len(packs["plain"]), 64):
        plain, level = (sorted(packs[name][begin : begin + 64]) for name in ("plain", "level"))
        assert plain == level


def test_document_longer_than_a_pack_is_refused():
    with pytest.raises(DataError, match="document 1 has 41 tokens.*--overlong"):
        plan_epoch(np.array([3, 41]), 40, seed=0, epoch=0)


@pytest.mark.slow
def test_ten_million_documents_are_planned_in_seconds():
    lengths = np.random.default_rng(0).lognormal(5, 1, 10_000_000).astype(np.int64).clip(1, 4096)
    plan = plan_epoch(lengths, 4096, seed=0, epoch=0)
    assert lengths.sum() / (len(plan) * 4096) > 0.999
