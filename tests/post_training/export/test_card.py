import json

import pytest

from post_training.errors import SetupError
from post_training.export.card import make_repository, push, serve_line, write_card
from tests.helpers import hub

START = {
    "iteration": 0,
    "command": "finetune.py --prompt-key '```'",
    "versions": {"torch": "2.14.1"},
}
STEPS = [
    {"iteration": 1, "lm_loss": 7.5, "total_trained_tokens": 10},
    {"iteration": 20, "lm_loss": 2.25, "total_trained_tokens": 2000},
    {"iteration": 20, "split": "valid", "loss": 2.5},
    {"iteration": 30, "lm_loss": 1.0, "total_trained_tokens": 3000},
    {"iteration": 30, "split": "valid", "loss": 9.0},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    (folder / "hf").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "derived_flags: []\nhf_model: org/base\ntrain_iters: 30\nreasoning: last\nlr: 1.0e-05\n"
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    (folder / "starts.jsonl").write_text(json.dumps(START) + "\n")
    (folder / "data.txt").write_text("train: 12 documents, 300 tokens\n")
    return folder


def test_a_card_says_what_the_checkpoint_is(run):
    """Of the exported step, not of later ones; and no text of a run ends a block of code early."""
    write_card(run / "hf", run, 20, "hf")
    card = (run / "hf" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\n') and "# first" in card
    for text in (
        'base_model: "org/base"',
        "| steps | 20 of 30 |",
        "7.5000 at step 1, 2.2500 at step 20",
        "| valid loss | 2.5000 at step 20 |",
        "| trained tokens | 2,000 |",
        "reasoning: last",
        "| versions | torch 2.14.1 |",
        "train: 12 documents",
        "````\nfinetune.py --prompt-key '```'\n````",
        f"vllm serve {run / 'hf'}",
    ):
        assert text in card, text
    assert "9.0" not in card and "3,000" not in card


def test_a_card_of_values_of_other_types(run):
    other = {"iteration": 20, "lm_loss": 1.0, "total_trained_tokens": "x"}
    lines = [json.dumps(each) for each in (other, other | {"split": "valid", "loss": []})]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "starts.jsonl").write_text('{"iteration": 0}\n')
    write_card(run / "hf", run, 20, "hf")
    assert "| trained tokens | unknown |" in (run / "hf" / "README.md").read_text()


def test_lines_that_serve(run):
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text('{"r": 24}')
    config = {"hf_model": "org/base"}
    line = serve_line(run / "adapter", "adapter", config)
    assert line.startswith("vllm serve org/base --enable-lora --lora-modules mine=")
    assert line.endswith("--max-lora-rank 32")
    draft = serve_line("runs/d/draft", "draft", config)
    assert '"method": "eagle3", "model": "runs/d/draft"' in draft


def test_an_export_goes_to_the_hub_whole(run, tmp_path, monkeypatch):
    write_card(run / "hf", run, 30, "hf")
    (run / "hf" / "config.json").write_text("{}")
    (run / "hf" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    from huggingface_hub import constants

    with hub.serve({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.environment(tmp_path)["HF_ENDPOINT"])
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", constants.ENDPOINT, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(SetupError, match=r"--push-to-hub me/tiny: .*401"):
            make_repository("me/tiny", private=True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        make_repository("me/tiny", private=True)
        push(run / "hf", "me/tiny")
    assert server.made["me/tiny"]["name"] == "tiny"
    assert "private" in str(server.made["me/tiny"])
    pushed = server.pushed["me/tiny"]
    assert pushed == {path.name: path.read_bytes() for path in (run / "hf").iterdir()}
    with pytest.raises(SetupError, match="--push-to-hub no/such/name: "):
        make_repository("no/such/name", private=True)
