"""Recipes that build on others, and what names one on a command line."""

import pytest

from post_training.arguments.command_line import CommandLine
from post_training.errors import SetupError
from post_training.recipes.recipe import read_recipe


@pytest.fixture
def write(tmp_path):
    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{next(iter(files))}.yaml"

    return write


def test_a_recipe_wins_over_what_it_builds_on(write):
    file = write(
        run="base: middle.yaml\nlr: 1e-5\n--seq_length: 64",
        middle="base: bottom.yaml\nlr: 1\nmicro-batch-size: 2",
        bottom="seq-length: 32\nmicro_batch_size: 1\nweight_decay: 0.1",
    )
    recipe = read_recipe(file)
    assert dict(recipe.settings) == {
        "weight_decay": 0.1,
        "micro-batch-size": 2,
        "lr": "1e-5",
        "--seq_length": 64,
    }
    assert recipe.where("weight_decay").endswith("bottom.yaml: weight_decay")


def test_a_recipe_builds_on_another_systems_file_and_on_a_runs_own(write):
    file = write(
        run="base: roll.yaml\nlr: 0.5\ntrain_iters: 3",
        roll="pretrain: model\nsft_train: {training_args: {num_train_epochs: 2}}",
        config="base: made.yaml\nnum_layers: 4",
        made="lr: 1.0\nnum_layers: 2\nhidden_size: 64\nderived_flags: [num_layers, hidden_size]",
    )
    settings = read_recipe(file).settings
    assert (settings["lr"], settings["hf_model"], settings["train_iters"]) == (0.5, "model", 3)
    assert "num_epochs" not in settings and "base" not in settings
    # What the run derived is derived anew; what is said over it counts.
    assert dict(read_recipe(file.with_name("config.yaml")).settings) == {"lr": 1.0, "num_layers": 4}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"run": "base: run.yaml"}, r"builds on itself \(run.yaml -> run.yaml\)"),
        ({"run": "base: a.yaml", "a": "base: run.yaml"}, r"\(run.yaml -> a.yaml -> run.yaml\)"),
        ({"run": "base: nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"run": "base: [a.yaml]"}, "base: expects the name of one file"),
        ({"run": "base: a.yaml", "a": "lr: 1\nlr: 2"}, "a.yaml: .*lr is given twice"),
        ({"run": "base: a.yaml\nbase: a.yaml"}, "base is given twice"),
        ({"run": "{lr: 1, lr: 2}"}, "lr is given twice"),
    ],
)
def test_bases_that_cannot_be(write, files, told):
    with pytest.raises(SetupError, match=told):
        read_recipe(write(**files))


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--train-iters", "5"], {"fp32", "lr_warmup_iters"}),
        (["--bf16", "--lr-warmup-fraction=0.1"], {"num_epochs"}),
        ([], {"num_epochs", "fp32", "lr_warmup_iters"}),
    ],
)
def test_a_flag_takes_the_place_of_what_a_file_says_otherwise(write, words, left):
    file = write(run="num_epochs: 2\nfp32: true\nlr-warmup-iters: 3")
    settings = CommandLine(["--config", str(file), *words]).recipe.settings
    assert {name.replace("-", "_") for name in settings} == left


@pytest.mark.parametrize(
    "words",
    [
        "--config DIR/run.yaml lr=2 seq_length=8 --bf16",
        "lr=2 ++seq_length=8 --config=DIR/run.yaml --bf16",
        "--config_path DIR --config_name run lr=2 +seq_length=8 --bf16",
        "--config-path=DIR --config-name=run.yaml lr=2 seq_length=8 min_lr=0 ~min_lr --bf16",
        "--bf16 --config-name run --config-path DIR lr=2 seq_length=8",
    ],
)
def test_ways_to_name_a_recipe(write, words):
    folder = write(run="defaults: [_self_, low]\nweight_decay: 0", low="lr: 1").parent
    command = CommandLine(words.replace("DIR", str(folder)).split())
    assert command.argv == ["--bf16"]
    assert dict(command.recipe.settings) == {"lr": 2, "weight_decay": 0, "seq_length": 8}


def test_an_override_that_yaml_cannot_read_is_text(write):
    for text in ("2024-13-45", "[" * 3000, "[1"):
        words = ["--config", str(write(run="lr: 1")), f"chat_template={text}"]
        assert CommandLine(words).recipe.settings == {"lr": 1, "chat_template": text}


def test_a_value_of_another_flag_is_no_override():
    words = ["--finetune-data-files", "a=0.5", "b=0.5"]
    assert CommandLine(words).argv == words
    assert CommandLine(["--config", "run.yaml", *words]).argv == words
    assert CommandLine(["lr=3"]).argv == ["lr=3"]  # of no file: the parser tells


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--config-path DIR", "add --config-name"),
        ("--config-name", "expected one argument"),
        ("--config a.yaml --config-name b", "give one"),
        ("--config-name nowhere", "nowhere.yaml: No such file"),
        ("--config DIR/run.yaml lr.a=3", "lr.a=3: lr is 1 there, no group"),
        ("--config DIR/run.yaml ~lrr", "~lrr: there is no such key"),
    ],
)
def test_recipes_that_are_not_named_right(write, words, told):
    folder = write(run="lr: 1").parent
    with pytest.raises(SetupError, match=told):
        CommandLine(words.replace("DIR", str(folder)).split()).recipe  # noqa: B018


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("actor: &a {seed: *a}", "the anchor in line 1 holds itself"),
        ("lr: &a [*a]", "the anchor in line 1 holds itself"),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
            + "actor: {seed: *a29}",
            "on more than 100000 values, with aliases",
        ),
        ("actor: {seed: 3}\nactor.seed: 4", "actor.seed is given twice"),
        ('base: "a\\0b"', "base: expects the name of one file"),
    ],
)
def test_yaml_that_never_ends_or_says_two_things(write, text, told):
    with pytest.raises(SetupError, match=told):
        read_recipe(write(run=text))


def test_a_key_of_another_system_without_a_value_says_nothing(write):
    silent = read_recipe(write(run="sft_train: {training_args: {}}"))
    null = read_recipe(write(run="save_steps:\nsft_train: {training_args: {learning_rate: null}}"))
    assert null.settings == silent.settings and null.settings["lr"] == 5e-5
    assert null.origin["lr"].endswith("(default of ROLL)")
