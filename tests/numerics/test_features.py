"""Extracted features are those of the HuggingFace model on each document alone, on every layout."""

import functools
import shutil
from types import SimpleNamespace

import pytest
import torch

from data.features.reader import FeatureReader
from tests.data.features.extraction_kills import killed_and_whole
from tests.helpers.launch import run_ranks
from tests.helpers.models import VOCABULARY, load_model
from tests.numerics.equivalence import EP2, PP2, SP, TP2

K = 5


def _extract(argv):
    from scripts import extract_features

    return extract_features.main(argv)


def extracted(model, data, folder, *layout, world=1, more=()):
    argv = [
        "--hf-model",
        str(model),
        "--finetune-data-files",
        str(data),
        "--output-dir",
        str(folder),
    ]
    argv += ["--seq-length", "192", "--features-dtype", "fp32", "--top-k", str(K), *layout, *more]
    assert run_ranks(_extract, world, argv) == [0] * world
    return FeatureReader(folder / "train")


@torch.no_grad()
def check(reader, folder, layers=(-1, 0, 1)):
    """Compare some documents with transformers."""
    base, before_norm = load_model(folder), []
    base.model.layers[-1].register_forward_hook(
        lambda m, a, out: before_norm.append(out[0] if isinstance(out, tuple) else out)
    )
    for number in range(0, len(reader.documents), 5):
        ids, mask = (torch.from_numpy(part.copy()) for part in reader.documents[number])
        out = base(ids.long()[None], output_hidden_states=True)
        last = before_norm.pop().view(1, len(ids), -1)
        states = [*out.hidden_states[:-1], last]
        found = reader.read(number)
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)
        close(found["hidden_states"], out.hidden_states[-1][0])
        aux = torch.cat([states[layer + 1] for layer in layers], dim=-1)[0]
        close(found["aux_hidden_states"], aux)
        predicts = torch.nonzero(mask[1:]).flatten()
        logits = out.logits[0, predicts, :VOCABULARY].log_softmax(-1)
        values, tokens = logits.topk(K)
        close(found["topk_logprobs"], values)
        assert (found["topk_ids"] == tokens).float().mean() > 0.99  # but for equals
        rest = (1 - values.exp().sum(-1, keepdim=True)).log()
        torch.testing.assert_close(found["rest_logprobs"], rest, rtol=1e-3, atol=1e-4)


def test_one_process(hf_model, chat_data, tmp_path):
    folder = hf_model("qwen3")
    check(extracted(folder, chat_data.file, tmp_path / "F"), folder)


def _crowded(argv):
    from scripts import extract_features

    names = extract_features.__dict__
    sizes, room_for = [], names["room_for"]

    def noted(*args):
        sizes.append(room_for(*args))
        return sizes[-1]

    names["room_for"] = noted
    shutil.__dict__["disk_usage"] = lambda at: SimpleNamespace(free=max(sizes, default=1 << 40))
    return extract_features.main(argv), len(sizes)


def test_all_splits_have_to_fit_together(hf_model, chat_data, tmp_path):
    argv = ["--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path / "F")]
    argv += ["--finetune-data-files", str(chat_data.file), "--split-ratio", "0.5,0.5,0"]
    assert run_ranks(_crowded, 1, [*argv, "--seq-length", "192"]) == [(2, 2)]
    # Factors make another base of it, which the folder would not name.
    assert run_ranks(_extract, 1, [*argv, "--seq-length", "192", "--lora-rank", "4"]) == [2]
    assert not (tmp_path / "F").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "world"),
    [
        ("qwen3", TP2 + SP, 2),
        ("llama", PP2, 2),
        ("qwen3", TP2 + PP2, 4),
        ("qwen3_moe", EP2, 2),
        ("qwen3", (), 2),
    ],
    ids=["tp2-sp", "pp2", "tp2-pp2", "ep2", "dp2"],
)
def test_layouts(hf_model, chat_data, tmp_path, family, layout, world):
    """Of several shards, which data parallel ranks take in turn."""
    folder = hf_model(family, tied=True)
    more = ("--shard-megabytes", "1")
    reader = extracted(folder, chat_data.file, tmp_path / "F", *layout, world=world, more=more)
    assert len(reader.manifest.shards) > 3
    check(reader, folder)


@pytest.mark.slow
def test_killed_and_gone_on_the_bytes_are_the_same(tmp_path):
    """`python tests/data/features/extraction_kills.py` kills ten times."""
    assert killed_and_whole(tmp_path, kills=2, seed=1)
