"""What a run continues from, and what it refuses. That the numbers go on is in `tests/test_resume.py`."""

import argparse
import json

import pytest
import yaml

from data import prepare_documents
from post_training import checkpoints, output, resume
from post_training.arguments import parse_arguments
from post_training.datasets import plan_split
from post_training.errors import SetupError
from tests.helpers.models import make_tokenizer


@pytest.fixture
def parse(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def parse(*flags, out="out"):
        words = ["--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path / out)]
        return parse_arguments([*words, "--train-iters", "9", "--global-batch-size", "4", *flags])

    return parse


@pytest.fixture
def args(parse):
    return parse()


def make_checkpoint(folder, iteration=5, facts=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoints.begin_save(folder, iteration)
    (path / "__0_0.distcp").write_bytes(b"weights")
    checkpoints.finish_save(folder, iteration, facts or {})
    return path


def manifest_of(checkpoint):
    return json.loads((checkpoint / checkpoints.MANIFEST).read_text())


# --- which checkpoint ----------------------------------------------------------------------------


def test_a_fresh_folder_has_nothing_to_continue(args):
    assert resume.choose_checkpoint(args) is None and args.load is None


def test_own_checkpoint_comes_before_load(parse, tmp_path):
    other = make_checkpoint(tmp_path / "other/checkpoints")
    load = ["--load", str(other.parent)]
    args = parse(*load)
    assert resume.choose_checkpoint(args) == other and args.ckpt_step == 5
    own = make_checkpoint(tmp_path / "out/checkpoints", 7)
    args = parse(*load)
    assert resume.choose_checkpoint(args) == own
    assert args.load == args.save and args.ckpt_step == 7
    # --ckpt-step is about --load, which this run has left behind.
    args = parse(*load, "--ckpt-step", "5")
    assert resume.choose_checkpoint(args) == own and args.ckpt_step == 7


def test_an_older_checkpoint_of_its_own(parse, tmp_path):
    old = make_checkpoint(tmp_path / "out/checkpoints", 3)
    make_checkpoint(tmp_path / "out/checkpoints", 6)
    args = parse("--ckpt-step", "3")
    assert resume.choose_checkpoint(args) == old
    assert (tmp_path / "out/checkpoints" / checkpoints.TRACKER).read_text() == "6"


def test_config_yaml_does_not_pin_the_checkpoint(args, tmp_path):
    make_checkpoint(tmp_path / "out/checkpoints")
    resume.choose_checkpoint(args)
    assert args.ckpt_step == 5
    output.save_config(args)
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert "ckpt_step" not in written and "load" not in written


def test_load_without_a_checkpoint_is_refused(parse, tmp_path):
    with pytest.raises(SetupError, match=r"--load .*no complete checkpoint[^?]*$"):
        resume.choose_checkpoint(parse("--load", str(tmp_path)))


def test_load_of_a_folder_above_or_below_says_which_was_meant(parse, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "run/checkpoints")
    meant = rf"did you mean --load {checkpoint.parent}\?"
    with pytest.raises(SetupError, match=meant):
        resume.choose_checkpoint(parse("--load", str(tmp_path / "run")))
    meant = rf"did you mean --load {checkpoint.parent} --ckpt-step 5\?"
    with pytest.raises(SetupError, match=meant):
        resume.choose_checkpoint(parse("--load", str(checkpoint)))


def test_its_own_folder_in_another_spelling_is_its_own(parse, tmp_path):
    old = make_checkpoint(tmp_path / "out/checkpoints", 3)
    make_checkpoint(tmp_path / "out/checkpoints", 6)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for spelling in (tmp_path / "out/../out/checkpoints", tmp_path / "link/checkpoints"):
        args = parse("--load", str(spelling), "--ckpt-step", "3")
        assert resume.choose_checkpoint(args) == old
        assert args.ckpt_step == 3 and args.load == args.save


def test_a_damaged_checkpoint_is_told_of_and_the_tracker_mended(parse, tmp_path, capsys):
    folder = tmp_path / "out/checkpoints"
    old = make_checkpoint(folder, 5)
    (make_checkpoint(folder, 7) / "__0_0.distcp").write_bytes(b"weigh")
    assert resume.choose_checkpoint(parse()) == old
    told = capsys.readouterr().err
    assert "iter_0000007: __0_0.distcp has 5 of 7 bytes; continuing from" in told
    assert (folder / checkpoints.TRACKER).read_text() == "5"
    (old / "__0_0.distcp").unlink()
    with pytest.raises(SetupError, match="no older complete checkpoint"):
        resume.choose_checkpoint(parse())


# --- which data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(chat_data):
    return prepare_documents(
        files=[str(chat_data.file)],
        tokenizer=make_tokenizer(),
        seq_length=192,
        cache_dir=None,
        on_bad_row="error",
    )


@pytest.fixture(scope="module")
def other_documents(chat_data, tmp_path_factory):
    lines = chat_data.file.read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("other") / "train.jsonl"
    file.write_text("".join(lines[:-1]))
    return prepare_documents(
        files=[str(file)],
        tokenizer=make_tokenizer(),
        seq_length=192,
        cache_dir=None,
        on_bad_row="error",
    )


def position_of(args: argparse.Namespace, documents, checkpoint=None):
    train = plan_split(args, "train", documents, make_tokenizer())
    return resume.find_position(args, train, checkpoint)


def begins_at(args: argparse.Namespace, documents, checkpoint):
    """Consumed packs at which a run that continues from `checkpoint` begins its data."""
    position_of(args, documents, checkpoint)
    return args.data_begins_at


SEQ = ("--seq-length", "192")


@pytest.fixture
def saved(parse, documents, tmp_path):
    """Saves what a run of these flags has consumed, and gives the checkpoint."""

    def save(consumed, *flags, out="out", iteration=5, **more):
        args = parse(*SEQ, *flags, out=out)
        position = position_of(args, documents)
        args.consumed_train_samples = consumed
        args.virtual_pipeline_model_parallel_size = None
        facts = position.facts() | more
        return make_checkpoint(tmp_path / out / "checkpoints", iteration, facts)

    return save


def test_the_checkpoint_says_where_in_the_data_it_is(saved, documents):
    facts = manifest_of(saved(28))
    packs = 24  # of the 60 documents, at this length
    assert facts["consumed_samples"] == 28
    assert (facts["data"]["epoch"], facts["data"]["pack"]) == divmod(28, packs)
    assert facts["data"]["documents"] == documents.fingerprint
    assert len(facts["data"]["plan_hash"]) == 32


def test_a_copied_checkpoint_knows_its_model(parse, saved, tmp_path):
    copied = saved(28).parent.rename(tmp_path / "elsewhere")
    load = ["--load", str(copied)]
    resume.choose_checkpoint(parse(*load, out="new"))
    args = parse(*load, out="new")
    args.num_layers = 4
    with pytest.raises(SetupError, match=r"its num_layers is 2, this run's is 4"):
        resume.choose_checkpoint(args)


def test_the_same_data_goes_on(parse, documents, saved):
    checkpoint = saved(28)
    for flags in ([], ["--restart-data"], ["--micro-batch-size", "2"]):
        assert begins_at(parse(*SEQ, *flags), documents, checkpoint) == 0


def test_more_epochs_of_the_same_data_go_on(parse, documents, saved):
    flags = ["--train-iters", "0", "--num-epochs"]
    checkpoint = saved(28, *flags, "2")
    args = parse(*SEQ, *flags, "3")
    assert begins_at(args, documents, checkpoint) == 0
    assert args.train_iters == 18


def test_warm_up_must_fit_into_the_epochs(parse, documents):
    """Whose steps are known only now."""
    args = parse(*SEQ, "--train-iters", "0", "--num-epochs", "1", "--lr-warmup-iters", "6")
    with pytest.raises(SetupError, match=r"at step 6 \(--num-epochs 1\); use fewer than 6"):
        position_of(args, documents, None)


def test_packs_that_filler_stands_for_are_told_of(parse, documents, saved, capsys):
    """A finished run that is given more epochs: its last batch was filled up behind the last one."""
    flags = ["--train-iters", "0", "--num-epochs"]
    checkpoint = saved(28, *flags, "1")  # 24 packs, and a batch of filler
    position_of(parse(*SEQ, *flags, "1"), documents, checkpoint)
    assert capsys.readouterr().err == ""
    position_of(parse(*SEQ, *flags, "2"), documents, checkpoint)
    assert "held 4 empty packs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seq-length", "200"], "--seq-length was 192, now 200"),
        (["--seed", "7"], "--seed was 1234, now 7"),
        (["--packing", "none"], "--packing was best-fit, now none"),
    ],
    ids=["seq-length", "seed", "packing"],
)
def test_another_plan_is_refused(parse, documents, saved, flags, told):
    checkpoint = saved(8)
    with pytest.raises(SetupError, match=told + ".*--restart-data"):
        position_of(parse(*SEQ, *flags), documents, checkpoint)
    assert begins_at(parse(*SEQ, *flags, "--restart-data"), documents, checkpoint) == 8


def test_other_data_is_refused_even_in_a_copied_checkpoint(parse, other_documents, saved, tmp_path):
    checkpoint = saved(8)
    with pytest.raises(SetupError, match=r"the training data differs.*--restart-data"):
        position_of(parse(*SEQ), other_documents, checkpoint)
    copied = checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(SetupError, match=r"the training data differs.*--restart-data"):
        position_of(parse(*SEQ, out="new"), other_documents, copied)


def test_another_global_batch_is_refused(parse, documents, saved):
    checkpoint = saved(8)
    for flags in ([], ["--restart-data"]):
        with pytest.raises(SetupError, match=r"--global-batch-size 4, this run's is 8"):
            args = parse(*SEQ, "--global-batch-size", "8", *flags)
            position_of(args, documents, checkpoint)


def test_other_base_weights_are_refused_in_the_own_folder_only(parse, documents, saved):
    checkpoint = saved(8, base_weights="of another model")
    with pytest.raises(SetupError, match="other weights than those of --hf-model"):
        position_of(parse(*SEQ), documents, checkpoint)
    assert begins_at(parse(*SEQ, out="new"), documents, checkpoint) == 0


def test_restarted_data_is_not_restarted_again(parse, documents, other_documents, saved, tmp_path):
    """The same command, given again, continues."""
    checkpoint = saved(8, out="old")
    args = parse(*SEQ, "--restart-data", "--load", str(checkpoint.parent))
    position = position_of(args, other_documents, checkpoint)
    assert args.data_begins_at == 8
    args.consumed_train_samples = 20
    args.virtual_pipeline_model_parallel_size = None
    own = make_checkpoint(tmp_path / "out/checkpoints", 7, position.facts())
    assert manifest_of(own)["data"]["pack"] == 12
    assert begins_at(args, other_documents, own) == 8
    assert begins_at(parse(*SEQ), other_documents, own) == 8, "without the flag too"


def test_epochs_count_from_where_the_data_began_anew(parse, other_documents, saved):
    checkpoint = saved(8)
    words = ["--restart-data", "--train-iters", "0", "--num-epochs", "2"]
    args = parse(*SEQ, *words)
    plan = position_of(args, other_documents, checkpoint).plan
    assert args.train_iters == 8 // 4 + -(-2 * plan.packs_per_epoch() // 4)


def test_a_checkpoint_that_does_not_know_its_data_gives_only_weights(parse, documents, tmp_path):
    folder = tmp_path / "old/iter_0000005"
    folder.mkdir(parents=True)
    with pytest.raises(SetupError, match="does not say where in which data.*--finetune"):
        position_of(parse(*SEQ), documents, folder)
    assert begins_at(parse(*SEQ, "--finetune"), documents, folder) == 0


def test_a_manifest_that_contradicts_itself_is_refused(parse, documents, saved):
    checkpoint = saved(8)
    file = checkpoint / checkpoints.MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"consumed_samples": 12}))
    with pytest.raises(SetupError, match="manifest.json has been changed"):
        position_of(parse(*SEQ), documents, checkpoint)
