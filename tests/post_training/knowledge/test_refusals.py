"""What a student cannot be taught with is one message, before anything starts."""

import json

import pytest

from post_training.errors import SetupError
from post_training.knowledge.settings import KnowledgeSettings, LayerPair, knowledge_settings
from post_training.knowledge.teacher import choose_teacher
from tests.helpers.models import edit_json, save_model

OFFLINE = ("--offline-distillation-data", "nowhere")


@pytest.fixture
def settings_of(parse, hf_model, tmp_path):
    """The settings of a file, of a run with more flags."""

    def settings_of(text, *flags):
        (tmp_path / "kd.yaml").write_text(text)
        if flags != OFFLINE:
            flags = ("--export-kd-teacher-load", str(hf_model("qwen3")), *flags)
        return knowledge_settings(parse("--export-kd-cfg", str(tmp_path / "kd.yaml"), *flags))

    return settings_of


def test_every_key_is_heeded(settings_of, parse):
    assert settings_of("") == KnowledgeSettings()
    assert knowledge_settings(parse()) is None
    assert settings_of(
        "logit_layers: [output_layer, output_layer]\nskip_lm_loss: false\nkd_loss_scale: 3\n"
        "logit_kl_temperature: 2e0\nlogit_kl_topk: 7\nintermediate_loss_scale: 0.5\n"
        "intermediate_layer_pairs:\n- [decoder.layers.1, decoder.final_layernorm, mse]\n"
    ) == KnowledgeSettings(
        skip_lm_loss=False,
        kd_loss_scale=3.0,
        logit_kl_temperature=2.0,
        logit_kl_topk=7,
        pairs=(LayerPair("decoder.layers.1", "decoder.final_layernorm", "mse"),),
        intermediate_loss_scale=0.5,
    )


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("temperature: 2", (), "temperature: no such key; there are logit_layers"),
        ("criterion: null", (), "criterion: losses and their fixed weights"),
        ("[1", (), "cannot be read"),
        ("7", (), "holds no keys"),
        ("logit_layers: [output_layer, decoder]", (), "logit_layers"),
        ("logit_layers: 7", (), "logit_layers 7"),
        ("intermediate_layer_pairs: 7", (), "must be a list of pairs"),
        ("intermediate_layer_pairs: [[decoder.layers.00, decoder.layers.0]]", (), "no whole layer"),
        ("logit_kl_temperature: [1]", (), "must be a number above 0"),
        ("skip_lm_loss: maybe", (), "true or false"),
        ("kd_loss_scale: 2.0", (), "set skip_lm_loss: false"),
        ("{skip_lm_loss: false, kd_loss_scale: 0}", (), "kd_loss_scale 0: must be"),
        ("logit_kl_temperature: .nan", (), "logit_kl_temperature nan: must be"),
        ("logit_kl_temperature: 1.0e+20", (), "logit_kl_temperature 1e+20: must be"),
        ("logit_kl_topk: 392", (), "the vocabulary has 391 tokens"),
        ("logit_kl_topk: 0", (), "at least 1"),
        ("intermediate_loss_scale: 2", (), "there are no intermediate_layer_pairs"),
        ("intermediate_layer_pairs: [[decoder.layers.0]]", (), "must be [student's layer"),
        ("intermediate_layer_pairs: [[output_layer, output_layer]]", (), "no whole layer"),
        (
            "intermediate_layer_pairs: [[decoder.layers.0, decoder.layers.0, l1]]",
            (),
            "neither cosine nor mse",
        ),
        (
            "intermediate_layer_pairs: [[decoder.layers.0, decoder.layers.0]]",
            (
                *("--recompute-granularity", "full", "--recompute-method", "uniform"),
                *("--recompute-num-layers", "1"),
            ),
            "computes layers without gradients",
        ),
        ("logit_kl_temperature: 2", OFFLINE, "those of temperature 1"),
        ("logit_kl_topk: 5", OFFLINE, "that of the stored features"),
        (
            "intermediate_layer_pairs: [[decoder.layers.0, decoder.layers.0]]",
            OFFLINE,
            "no teacher is at hand",
        ),
    ],
)
def test_what_a_file_cannot_ask_for(settings_of, text, flags, said):
    with pytest.raises(SetupError, match="--export-kd-cfg") as caught:
        settings_of(text, *flags)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--export-kd-cfg", "x"), "name a teacher"),
        (("--export-kd-teacher-model-config", "x"), "config.json or config.yaml"),
        (("--export-kd-teacher-ckpt-format", "torch"), "is seen in the teacher's folder"),
        (("--export-kd-teacher-load", "x", "--draft", "eagle3"), "its base"),
        (("--export-kd-teacher-load", "x", *OFFLINE), "either at hand or stored"),
        (("--export-kd-teacher-load", "x", "--use-torch-fsdp2"), "cuts the student only"),
    ],
)
def test_flags_that_contradict_each_other(parse, flags, said):
    with pytest.raises(SetupError) as caught:
        parse(*flags)
    assert said in str(caught.value)


def test_teachers_that_are_none(parse, hf_model, tmp_path):
    def refused(source):
        with pytest.raises(SetupError, match="--export-kd-teacher-load") as caught:
            choose_teacher(parse("--export-kd-teacher-load", str(source)))
        return str(caught.value)

    larger = save_model(tmp_path / "larger", "qwen3", vocab_size=400)
    assert "has 400 entries, the student's 391" in refused(larger)
    assert "experts" in refused(hf_model("qwen3_moe"))
    other = save_model(tmp_path / "other", "qwen3")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    edit_json(other / "tokenizer.json", model=tokens["model"])
    assert "other ids" in refused(other)
    assert "config.json" in refused(tmp_path)
