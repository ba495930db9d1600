"""What a run continues from, and what it refuses; that its numbers go on: `tests/runs/test_resume.py`."""

import sys

import pytest
import yaml

from data.prepare.prepare import DAY
from post_training.arguments.completion import complete_run, keep_date, validate
from post_training.batch.splits import plan_split
from post_training.checkpoint import resume, store
from post_training.checkpoint.position import find_position
from post_training.errors import RunStopped, SetupError
from post_training.job import output
from post_training.platform.checkpoints.loading import load_hooks
from tests.helpers.models import make_tokenizer
from tests.helpers.positions import SEQ, make_checkpoint


@pytest.fixture
def args(parse):
    return parse()


def chosen(args):
    """The folder that a run continues from."""
    checkpoint = resume.choose_checkpoint(args).checkpoint
    return checkpoint and checkpoint.path


def told(args):
    """What Megatron is told of it: folder and step."""
    flags = resume.choose_checkpoint(args).flags()
    return flags["load"], flags["ckpt_step"]


# --- which checkpoint ----------------------------------------------------------------------------


def test_a_fresh_folder_has_nothing_to_continue(args):
    assert chosen(args) is None and told(args) == (None, None)


def test_own_checkpoint_comes_before_load(parse, tmp_path):
    other = make_checkpoint(tmp_path / "other/checkpoints")
    load = ["--load", str(other.parent)]
    args = parse(*load)
    assert chosen(args) == other and told(args) == (str(other.parent), 5)
    own = make_checkpoint(tmp_path / "out/checkpoints", 7)
    args = parse(*load)
    assert chosen(args) == own
    assert told(args) == (args.save, 7)
    # --ckpt-step is about --load, which this run has left behind.
    args = parse(*load, "--ckpt-step", "5")
    assert chosen(args) == own and told(args) == (args.save, 7)


def test_the_day_of_the_first_start_is_kept(parse, tmp_path):
    made_of = [{}, {DAY: "2024-02-29"}]
    make_checkpoint(tmp_path / "out/checkpoints", facts={"data": {"made_of": made_of}})
    for flags, day in (([], "2024-02-29"), (["--template-date", "2024-03-01"], "2024-03-01")):
        args = parse(*flags)  # a resume refuses other data
        keep_date(args, resume.choose_checkpoint(args).template_date)
        assert args.template_date == day
    args = parse("--load", str(tmp_path / "out/checkpoints"), "--finetune", out="new")
    assert resume.choose_checkpoint(args).template_date is None


def test_an_older_checkpoint_of_its_own(parse, tmp_path):
    old = make_checkpoint(tmp_path / "out/checkpoints", 3)
    make_checkpoint(tmp_path / "out/checkpoints", 6)
    args = parse("--ckpt-step", "3")
    assert chosen(args) == old
    assert (tmp_path / "out/checkpoints" / store.TRACKER).read_text() == "6"


def test_config_yaml_does_not_pin_the_checkpoint(args, tmp_path):
    own = make_checkpoint(tmp_path / "out/checkpoints")
    assert chosen(args) == own
    output.save_config(args)
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert written["ckpt_step"] is None and written["load"] is None


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
        assert chosen(args) == old
        assert told(args) == (args.save, 3)


def test_a_damaged_checkpoint_is_told_of_and_the_tracker_mended(parse, tmp_path, capsys):
    folder = tmp_path / "out/checkpoints"
    old = make_checkpoint(folder, 5)
    (make_checkpoint(folder, 7) / "__0_0.distcp").write_bytes(b"weigh")
    assert chosen(parse()) == old
    said = capsys.readouterr().err
    assert "iter_0000007: __0_0.distcp has 5 of 7 bytes; continuing from" in said
    assert (folder / store.TRACKER).read_text() == "5"
    (old / "__0_0.distcp").unlink()
    with pytest.raises(SetupError, match="no older complete checkpoint"):
        resume.choose_checkpoint(parse())


def test_a_copied_checkpoint_knows_its_model(parse, saved, tmp_path):
    copied = saved(28).parent.rename(tmp_path / "elsewhere")
    load = ["--load", str(copied)]
    resume.choose_checkpoint(parse(*load, out="new"))
    args = parse(*load, out="new")
    args.num_layers = 4
    with pytest.raises(SetupError, match=r"its num_layers is 2, this run's is 4"):
        resume.choose_checkpoint(args)


def test_a_checkpoint_that_does_not_know_its_data_gives_only_weights(parse, tmp_path):
    folder = tmp_path / "old/iter_0000005"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    store.point_at(folder.parent, 5)
    load = ["--load", str(folder.parent)]
    with pytest.raises(SetupError, match="does not say where in which data.*--finetune$"):
        resume.choose_checkpoint(parse(*load))
    start = resume.choose_checkpoint(parse(*SEQ, *load, "--finetune"))
    assert start.checkpoint is not None and start.continued is None
    # In its own folder --finetune says nothing else.
    (tmp_path / "out").mkdir()
    folder.parent.rename(tmp_path / "out/checkpoints")
    with pytest.raises(SetupError, match="--finetune and another --output-dir"):
        resume.choose_checkpoint(parse("--finetune"))


def test_finetune_is_about_load_and_says_so(parse, tmp_path, capsys):
    assert chosen(parse("--finetune")) is None
    assert capsys.readouterr().err.startswith("--finetune changes nothing: no --load")
    own = make_checkpoint(tmp_path / "out/checkpoints")
    assert chosen(parse()) == own and capsys.readouterr().err == ""
    start = resume.choose_checkpoint(parse("--finetune"))
    assert start.checkpoint == store.Checkpoint.at(own) and not start.finetune
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--finetune is left out") and str(own) in line and "--output-dir" in line


# --- damage that is met while a checkpoint is loaded ------------------------------------------------


@pytest.fixture
def fall_back(documents, capsys):
    """Chooses a checkpoint as a run does, and has it fail."""

    def fall(args, documents=documents):
        start = resume.choose_checkpoint(args)
        train = plan_split(args, "train", documents, make_tokenizer())
        position = find_position(args, train, start.continued)
        assert position is not None
        complete_run(args, **start.flags(), **position.flags())
        validate(args)
        capsys.readouterr()
        resume.Fallback(args, start, position, sys.stderr).take("it cannot be read")

    return fall


def test_the_one_before_is_loaded(parse, saved, fall_back, tmp_path, capsys):
    saved(8, iteration=2)
    make_checkpoint(tmp_path / "out/checkpoints", 3)
    (tmp_path / "out/checkpoints/iter_0000003" / store.MANIFEST).unlink()
    saved(16, iteration=4)
    args = parse(*SEQ)
    fall_back(args)
    assert args.ckpt_step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "iter_0000004: it cannot be read; continuing from" in line
    tracker = tmp_path / "out/checkpoints" / store.TRACKER
    assert tracker.read_text() == "4", "nobody knows yet whether that one can be read"
    assert load_hooks.loaded is not None
    load_hooks.loaded()
    assert tracker.read_text() == "2"
    with pytest.raises(RunStopped, match="iter_0000002: .*no older complete checkpoint"):
        fall_back(parse(*SEQ))


def test_what_somebody_named_is_not_replaced(parse, saved, fall_back, tmp_path):
    saved(8, iteration=2)
    saved(16, iteration=4)
    load = ["--load", str(tmp_path / "out/checkpoints"), "--restart-data"]
    for args in (parse(*SEQ, "--ckpt-step", "4"), parse(*SEQ, *load, out="new")):
        with pytest.raises(RunStopped, match="iter_0000004: it cannot be read; .*--ckpt-step"):
            fall_back(args)


def test_another_number_of_steps_needs_another_start(
    parse, saved, other_documents, fall_back, tmp_path
):
    """`--restart-data` begins its epochs where the checkpoint was: the schedule has been built for that."""
    saved(8, iteration=2)
    saved(16, iteration=4)
    args = parse(*SEQ, "--restart-data")
    with pytest.raises(RunStopped, match=r"same command again, it continues from .*iter_0000002"):
        fall_back(args, other_documents)
    again = parse(*SEQ, "--restart-data")
    assert chosen(again).name == "iter_0000002"
