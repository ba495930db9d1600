"""What a run continues from, and what it refuses. That the numbers go on is in `tests/test_resume.py`."""

import pytest
import yaml

from post_training import checkpoints, output, resume
from post_training.checkpoint_origin import origin
from post_training.errors import SetupError


@pytest.fixture
def args(parse):
    return parse()


def make_checkpoint(folder, iteration=5, facts=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoints.begin_save(folder, iteration)
    (path / "__0_0.distcp").write_bytes(b"weights")
    checkpoints.finish_save(folder, iteration, facts or {})
    return path


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


def test_a_copied_checkpoint_knows_its_model(parse, tmp_path):
    make_checkpoint(tmp_path / "elsewhere", facts={"origin": origin(parse())})
    load = ["--load", str(tmp_path / "elsewhere")]
    resume.choose_checkpoint(parse(*load))
    args = parse(*load)
    args.num_layers = 4
    with pytest.raises(SetupError, match=r"its num_layers is 2, this run's is 4"):
        resume.choose_checkpoint(args)
