"""A checkpoint that a run cannot go on with is refused, wherever it lies and whatever lies beside it."""

import json

import pytest
import yaml

from post_training.arguments.parser import parse_arguments
from post_training.arguments.refused import ARCHITECTURE
from post_training.checkpoint import resume, store
from post_training.checkpoint.origin import check_origin, origin
from post_training.errors import SetupError
from post_training.hf.config import load_hf_config, megatron_flags
from post_training.job import output
from post_training.layout.sizes import _numbers_of_the_run


@pytest.fixture
def parse(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def parse(*flags, family="qwen3"):
        words = ["--hf-model", str(hf_model(family)), "--output-dir", str(tmp_path / "out")]
        return parse_arguments([*words, "--train-iters", "9", "--global-batch-size", "4", *flags])

    return parse


@pytest.fixture
def written(tmp_path):
    """A complete checkpoint, far from any config.yaml, of a run with these arguments."""

    def write(args, **changed):
        folder = tmp_path / "copied/here"
        folder.mkdir(parents=True, exist_ok=True)
        path = store.begin_save(folder, 5)
        (path / "__0_0.distcp").write_bytes(b"weights")
        (path / "metadata.json").write_text("{}")
        facts = origin(args)
        facts["architecture"] |= changed
        store.finish_save(folder, 5, {"origin": facts})
        return store.Checkpoint.at(path)

    return write


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_its_own_checkpoint_is_taken(parse, written, family):
    args = parse(family=family)
    check_origin(parse(family=family), written(args))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_whatever_makes_a_model_is_compared(hf_model, family):
    """Only what changes no weight and no output of a trained model is left out."""
    flags = megatron_flags(load_hf_config(str(hf_model(family))))
    assert set(flags) - set(ARCHITECTURE) == {"max_position_embeddings", "init_method_std"}


@pytest.mark.parametrize("key", [*ARCHITECTURE, "rope_parameters", "sliding_window"])
def test_another_models_checkpoint_is_refused(parse, written, key):
    args = parse(family="qwen3_moe")
    checkpoint = written(args, **{key: "another"})
    with pytest.raises(SetupError, match=rf"its {key} is another, this run's.*--output-dir"):
        check_origin(args, checkpoint)
    with pytest.raises(SetupError, match="another model's checkpoint"):
        check_origin(args, checkpoint, weights_only=True)


def test_a_manifest_from_before_falls_back_to_config_yaml(parse, tmp_path):
    args = parse()
    folder = tmp_path / "out/checkpoints"
    folder.mkdir(parents=True)
    (store.begin_save(folder, 5) / "__0_0.distcp").write_bytes(b"weights")
    store.finish_save(folder, 5, {})
    output.save_config(args)
    resume.choose_checkpoint(args)
    file = tmp_path / "out/config.yaml"
    config = yaml.safe_load(file.read_text())
    for change, told in (
        ({"hidden_size": 4096}, r"hidden_size is 4096, this run's is 64.*--output-dir"),
        ({"no_save_optim": True}, "no optimizer state.*--no-load-optim"),
        ({"optimizer": "sgd"}, "--optimizer sgd, this run's is adam.*--no-load-optim"),
    ):
        file.write_text(yaml.safe_dump(config | change))
        with pytest.raises(SetupError, match=told):
            resume.choose_checkpoint(args)


@pytest.mark.parametrize(
    "text",
    ["a: [", "[1, 2]", "7", "", "hidden_size: 4096\noptimizer: {name: sgd}", "\x00"],
    ids=["broken", "list", "number", "empty", "keys", "bytes"],
)
def test_another_tools_config_yaml_says_nothing(parse, tmp_path, text):
    folder = tmp_path / "theirs/checkpoints"
    folder.mkdir(parents=True)
    path = store.begin_save(folder, 5)
    (path / "__0_0.distcp").write_bytes(b"weights")
    store.finish_save(folder, 5, {})
    (tmp_path / "theirs/config.yaml").write_text(text)
    args = parse("--load", str(folder), "--finetune")
    check_origin(args, store.Checkpoint.at(path), weights_only=True)
    # Nor where a layout is looked for that the run in a folder can go on with.
    args.output_dir, args.save = str(folder.parent), str(folder)
    assert _numbers_of_the_run(args) == {}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--no-save-optim"], "no optimizer state .*--no-load-optim"),
        (["--optimizer", "sgd"], "state of --optimizer sgd, this run's is adam.*--no-load-optim"),
    ],
    ids=["none", "sgd"],
)
def test_an_optimizer_that_is_not_there_is_refused(parse, written, flags, told):
    checkpoint = written(parse(*flags))
    with pytest.raises(SetupError, match=told):
        check_origin(parse(), checkpoint)
    check_origin(parse("--no-load-optim"), checkpoint)
    check_origin(parse(), checkpoint, weights_only=True)


def test_a_draft_does_not_go_on_from_a_model_without_one(parse, written):
    with pytest.raises(SetupError, match="has no draft: export it"):
        check_origin(parse("--draft", "eagle3"), written(parse()), weights_only=True)


def test_it_is_plain_json(parse):
    found = origin(parse(family="qwen3_moe"))
    assert json.loads(json.dumps(found)) == found
