import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from post_training.arguments.parser import parse_arguments
from post_training.layout import flops
from post_training.layout.flops import model_flops, peak_flops
from tests.helpers.models import make_config, make_model

# Documents of 10 and 6 tokens, of which 5 are trained.
TOTALS = {"trained_tokens": 5, "real_tokens": 16, "squared_lengths": 136}
# Hidden size 64, vocabulary 391 padded to 512; 6 operations a weight and token.
LOGITS = 5 * 6 * 64 * 512


@pytest.mark.parametrize(
    ("family", "layer", "heads_width"),
    [
        # q, k and v of 4, 2 and 2 heads of 32; their output; gate, up and down of 96.
        ("qwen3", 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 96, 128),
        # Heads of 16; one MLP of 96, 2 experts a token of 96, or of 48.
        ("seed_oss", 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 96, 128),
        ("smollm3", 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96, 64),
        ("mixtral", 64 * (64 + 32 + 32) + 64 * 64 + 2 * 3 * 64 * 96, 64),
        ("qwen3_moe", 64 * (64 + 32 + 32) + 64 * 64 + 2 * 3 * 64 * 48, 64),
        ("gpt_oss", 64 * (64 + 32 + 32) + 64 * 64 + 2 * 3 * 64 * 96, 64),
    ],
)
def test_operations_of_a_step(hf_model, tmp_path, family, layer, heads_width):
    """Two layers. Scores and their values take 2 operations each a pair of tokens, three times."""
    folder = str(hf_model(family))
    words = ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "1"]
    attention = 2 * 3 * (2 + 2) * heads_width * 136 / 2  # the half that causal attention sees
    args = parse_arguments(words)
    assert model_flops(args, **TOTALS) == 2 * 6 * layer * 16 + LOGITS + attention
    args = parse_arguments([*words, "--lora-rank", "4", "--lora-targets", "q_proj"])
    factors = 2 * 6 * 16 * 4 * (64 + heads_width)
    frozen = 2 * 4 * layer * 16 + LOGITS * 4 / 6
    assert model_flops(args, **TOTALS) == frozen + factors + attention


def test_operations_of_latent_attention(hf_model, tmp_path):
    """A layer without experts, and one with 4 experts a token and a shared one; and norms."""
    folder = str(hf_model("deepseek_v3"))
    words = ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "1"]
    queries = 64 * 24 + 24 * 4 * 24 + 24
    keys = 64 * (16 + 8) + 16 * 4 * (16 + 12) + 16
    layers = 2 * (queries + keys + 4 * 12 * 64) + 3 * 64 * 96 + (4 + 1) * 3 * 64 * 48
    attention = 2 * 3 * 2 * 4 * (24 + 12) * 136 / 2
    found = model_flops(parse_arguments(words), **TOTALS)
    assert found == 6 * layers * 16 + LOGITS + attention


def test_torch_counts_as_many_in_a_plain_model():
    """In the products of matrices, which are all but attention and the angles of rotary embeddings."""
    model = make_model(make_config("qwen3", vocab_size=512)).train()
    with FlopCounterMode(display=False) as counted:
        hidden = model.model(torch.arange(16).unsqueeze(0)).last_hidden_state[0]
        model.lm_head(hidden[:5]).sum().backward()
    products = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == 2 * 6 * 43008 * 16 + LOGITS


def test_peaks(monkeypatch):
    assert peak_flops() is None, "not known of a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A Toaster", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert flops.peak_flops() == peak, name
