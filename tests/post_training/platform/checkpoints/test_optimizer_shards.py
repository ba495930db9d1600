"""That runs are resumed bit for bit, and in other layouts, is in `tests/runs/test_resume.py`."""

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica

from post_training.platform.checkpoints import optimizer_shards
from tests.helpers import megatron_model
from tests.helpers.launch import run_ranks

# Several buckets, of sizes that need padding between them.
BUCKETS = ("--overlap-grad-reduce", "--ddp-bucket-size", "3000")


def _shares(argv):
    """Of a rank: what it writes, and with upstream's own way; and what it reads.

    Each as the number of a parameter -> (its elements, whether this rank's word counts, what is wrong).
    """
    optimizer_shards.PIECE = 1000  # several pieces of a parameter
    _, (chunks, chain, _) = megatron_model.set_up(argv)
    (optimizer,) = chain.chained_optimizers
    optimizer.state_dict()
    for main, state in optimizer.optimizer.state.items():
        state["exp_avg"].copy_(main * 2)
        state["exp_avg_sq"].copy_(main * 3)
    model = chunks[0].sharded_state_dict()
    parameters = [each for buffer in optimizer.buffers for each in buffer.param_index_map]
    found = []
    function = type(optimizer).sharded_param_state_fully_reshardable
    for way, loading in ((function, False), (function.__wrapped__, False), (function, True)):
        share = {}
        for number, state in way(optimizer, model, loading, {}).items():
            expected = parameters[number].detach().float()
            assert set(state) == {"param", "exp_avg", "exp_avg_sq"}
            wrong = [
                name
                for name, factor in (("param", 1), ("exp_avg", 2), ("exp_avg_sq", 3))
                if not torch.equal(state[name].data, expected * factor)
            ]
            (place,) = [each for each in nested_values(model) if each.data is parameters[number]]
            assert state["param"].key == f"optimizer.state.param.{place.key}"
            share[number] = expected.numel(), is_main_replica(state["param"].replica_id), wrong
        found.append(share)
    return len(parameters), found


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), BUCKETS], ids=["one bucket", "several"])
def test_a_rank_writes_and_reads_its_own_share(hf_model, tmp_path, flags):
    argv = megatron_model.flags(str(hf_model("qwen2")), str(tmp_path / "out"), *flags)
    ranks = run_ranks(_shares, 2, argv)
    count = ranks[0][0]
    written, gathered, read = zip(*(found for _, found in ranks), strict=True)

    def elements(share):
        return sum(size for size, _, _ in share.values())

    everything = elements(gathered[0])
    # Written once, whole, and with the right values, by one rank or the other.
    assert sorted([*written[0], *written[1]]) == list(range(count))
    assert all(main and not wrong for share in written for _, main, wrong in share.values())
    assert max(map(elements, written)) < 0.7 * everything
    # Read by those that keep a part, of which one counts.
    counts = [sum(share[number][1] for share in read if number in share) for number in range(count)]
    assert counts == [1] * count
    if not flags:
        assert max(map(elements, read)) < 0.8 * everything
    # Upstream has everything everywhere, and beyond the first bucket not in its place.
    assert len(gathered[0]) == len(gathered[1]) == count, "still needed"
    assert any(wrong for _, _, wrong in gathered[0].values()) == bool(flags), "still needed"
