"""Which rank reads which packs: cut by data parallel rank alone.

Reference's fault: shards by expert data parallel rank, so that expert parallel ranks train on the same
packs twice.
"""

import pytest

from tests.helpers.launch import run_ranks
from tests.numerics.equivalence import CP2, EP2, PP2, TP2


def _packs_read(argv):
    """This rank's data parallel rank, and the packs it would train on by their place in the plan."""
    from megatron.core import parallel_state
    from megatron.training import training
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    import finetune
    from post_training.arguments.completion import complete_run
    from post_training.arguments.parser import parse_arguments
    from post_training.batch.splits import prepare_data

    args = parse_arguments(argv)
    _, splits = prepare_data(args)
    complete_run(args, load=None, ckpt_step=None, finetune=False, by_modelopt=False)
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    training.initialize_megatron()
    args.consumed_train_samples = 0
    train, *_ = finetune.train_valid_test_sft_datasets_provider([8, 0, 0], args=args, splits=splits)
    rank = parallel_state.get_data_parallel_rank()
    if train is None:
        return rank, None
    shard = train.dataset
    places = [shard.global_index(i) for i in range(len(shard))]
    for index, place in enumerate(places):
        found = shard[index]["document_lengths"]
        assert int((found > 0).sum()) == len(shard.document_indices(place)) > 0
    return rank, places


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world", "shards"),
    [(EP2, 4, 4), (EP2 + TP2, 4, 2), (EP2 + PP2, 4, 2), (EP2 + CP2, 4, 2)],
    ids=["ep2-dp4", "ep2-tp2", "ep2-pp2", "ep2-cp2"],
)
def test_every_pack_is_read_by_one_data_parallel_rank(
    hf_model, chat_data, tmp_path, layout, world, shards
):
    argv = ["--hf-model", str(hf_model("qwen3_moe")), "--output-dir", str(tmp_path / "out")]
    argv += ["--finetune-data-files", str(chat_data.file), "--train-iters", "2", *layout]
    argv += ["--global-batch-size", "4", "--seq-length", "192"]
    answers = run_ranks(_packs_read, world, argv)
    by_rank: dict[int, list[int]] = {}
    for rank, places in answers:
        if places is not None:
            assert by_rank.setdefault(rank, places) == places, "pipeline stages, context ranks"
    assert sorted(by_rank) == list(range(shards))
    assert sorted(place for places in by_rank.values() for place in places) == list(range(8))
