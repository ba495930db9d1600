"""That a way that leaks is not taken, whatever it leaks through, and that none is taken where all do."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from post_training.errors import RunStopped
from post_training.hf.causal_lm import build_model
from post_training.hf_models import attention
from post_training.hf_models.model import HFModel
from post_training.hf_models.packing import Documents
from post_training.hf_models.probe import _agreed, choose_way
from tests.helpers.architectures import tiny


def wrapped(family: str) -> HFModel:
    torch.manual_seed(0)
    model = build_model(tiny(family), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.06)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    return HFModel(config, model, None)


def choice(model: HFModel) -> tuple[str, str]:
    """The way, and what is told of it."""
    told: list[str] = []
    return choose_way(model, told.append), told[0]


def mixed(model, mix):
    """Add a thousandth of what `mix` makes of its input to the output of a layer's MLP."""

    def hook(mlp, inputs, output):
        return output + 1e-3 * mix(inputs[0])

    model.model.model.layers[0].mlp.register_forward_hook(hook)
    return model


def shifted(hidden: torch.Tensor) -> torch.Tensor:
    """A convolution: each token sees the one before it, [rows, tokens, hidden]."""
    return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)


@pytest.mark.parametrize("mechanism", [shifted, lambda hidden: hidden.cumsum(1)])
def test_a_convolution_or_a_state_needs_rows(mechanism):
    way, told = choice(mixed(wrapped("llama"), mechanism))
    assert way == "rows"
    assert told.count("a change in one document moves") == 2, told


def test_attention_that_takes_a_row_for_one_document_is_not_taken(monkeypatch):
    seen = attention._seen
    monkeypatch.setattr(attention, "_seen", lambda m, lengths, w: seen(m, [sum(lengths)], w))
    way, told = choice(wrapped("llama"))
    assert way == "positions" and "attention: a change in one document moves" in told


@pytest.mark.parametrize("family", ["mistral", "llama4_text"])
def test_attention_without_its_window_or_chunks_is_not_taken(monkeypatch, family):
    """Though the documents that it is tried with are shorter than these."""
    monkeypatch.setattr(attention, "_seen", lambda module, lengths, window: (lengths, None))
    model = wrapped(family)
    way, told = choice(model)
    assert way == "positions" and "from the same alone" in told
    found = vars(model.model.config)
    assert 64 in (found.get("sliding_window"), found.get("attention_chunk_size")), "as it was"


def test_positions_that_run_on_are_seen(monkeypatch):
    def running_on(lengths, device):
        return torch.arange(sum(lengths), device=device).unsqueeze(0)

    monkeypatch.setattr(Documents, "positions", staticmethod(running_on))
    way, told = choice(wrapped("gpt2"))
    assert way == "rows" and "attention: packed documents are" in told


def test_what_one_rank_complains_of_counts_on_all(monkeypatch):
    """Else ranks would go on in different ways, and wait for each other's weights."""

    def gather(every, own):
        every[:] = [own, "attention leaks" if own is None else None]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert _agreed(None) == "attention leaks" and _agreed("mine") == "mine"


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(lambda hidden: hidden.mean((0, 1), keepdim=True), id="rows"),
        pytest.param(lambda hidden: hidden.flip(1), id="future"),
    ],
)
def test_a_model_that_leaks_in_every_way_is_refused(mechanism):
    with pytest.raises(RunStopped, match=r"apart in no way \(attention: .*positions: .*rows: "):
        choice(mixed(wrapped("llama"), mechanism))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt_oss", "attention"),  # sinks, windows, experts
        ("gemma2", "attention"),  # soft caps
        ("gptj", "positions attention"),  # of the versions before 5.24, and of later ones
        ("qwen3_next", "rows"),
        ("mamba2", "rows"),
        ("falcon_h1", "rows"),
    ],
)
def test_each_architecture_finds_its_way(family, expected):
    """And in longer documents, of its own windows, each is what it is alone; seven more by a command."""
    model = wrapped(family).eval()
    way, _ = choice(model)
    assert way in expected.split()
    lengths = [70, 3, 100, 1, 26]
    ids = torch.randint(391, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    wanted = torch.arange(0, sum(lengths), 3)
    with torch.no_grad():
        found = model.packed_logits(way, ids, lengths, wanted)
        model.documents.begin("stock", None)
        alone = [model.run(part.unsqueeze(0), None, None)[0] for part in ids.split(lengths)]
    assert torch.allclose(found, torch.cat(alone)[wanted], rtol=0, atol=3e-6)
