"""Documents with pictures are the same in a pack as alone, in every way of packing."""

import functools

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from post_training.batch.assemble import assemble_batch
from post_training.batch.iterators import MicroBatchIterator
from post_training.errors import RunStopped, SetupError
from post_training.hf_models.model import HFModel
from post_training.hf_models.vision import check_positions, freeze
from tests.helpers import vision
from tests.helpers.reference import Recipe

RECIPE = Recipe(global_batch=4, seq_length=160)


def wrapped(model):
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1)
    return HFModel(config, model, None)


def micro_batch(dataset, filler=True):
    """The first packs as a batch, and what `HFModel` takes of their pictures."""
    data = next(MicroBatchIterator(dataset, 3))
    if not filler:
        data["filler"] = data["filler"][:0]
    batch = assemble_batch(data, qkv_format="sbhd", filler=data["filler"])
    axes = F.pad(data["rope_positions"].flatten(0, 1), (0, 0, 0, len(data["filler"])))
    pictures = {name: data[name] for name in ("pixel_values", "image_grid_thw")}
    return batch, {**pictures, "rope_positions": axes}


def losses(model, way, batch, pictures):
    chosen = batch.trained.indices
    lengths = batch.packed.query_lengths
    logits = model.packed_logits(way, batch.tokens[0], lengths, chosen, pictures)
    return F.cross_entropy(logits, batch.labels[0][chosen], reduction="none")


@pytest.mark.parametrize("kind", vision.KINDS)
def test_packed_is_alone(kind, tmp_path):
    folder = vision.save_model(tmp_path / "model", kind)
    rows = vision.make_rows(tmp_path, 30, 0.5)
    dataset = vision.prepared(tmp_path, folder, RECIPE)
    plain = vision.make_model(kind)
    documents = [int(row) for pack in range(3) for row in dataset.document_indices(pack)]
    examples = [
        vision.example(rows[row], tmp_path, vision.make_tokenizer(), dataset.processor.theirs)
        for row in documents
    ]
    assert {len(each.get("image_grid_thw", ())) for each in examples} == {0, 1, 2}
    with torch.no_grad():
        alone = [vision.losses(plain, each) for each in examples]
        model = wrapped(plain)
        batch, pictures = micro_batch(dataset)
        for way in ("attention", "positions", "rows"):
            found = losses(model, way, batch, pictures)
            apart = ((found - torch.cat(alone)) / torch.cat(alone)).abs().max()
            assert apart < 1e-6, (way, apart)
            # Another picture in the first document that has one moves nobody else by a bit.
            changed = next(i for i, each in enumerate(examples) if "image_grid_thw" in each)
            count = int(examples[changed]["image_grid_thw"].prod(-1).sum())
            before = pictures["pixel_values"].clone()
            pictures["pixel_values"][:count] += 1.0
            moved = found != losses(model, way, batch, pictures)
            pictures["pixel_values"] = before
            begin = sum(map(len, alone[:changed]))
            own = torch.zeros_like(moved)
            own[begin : begin + len(alone[changed])] = True
            assert not moved[~own].any() and moved[own].any(), way


def test_a_filler_changes_nothing_and_reaches_the_tower(tmp_path):
    folder = vision.save_model(tmp_path / "model", "qwen2_5_vl")
    vision.make_rows(tmp_path, 30, 0.0)
    (tmp_path / "x.png").write_bytes(vision.picture(0, 32, 32))
    dataset = vision.prepared(tmp_path, folder, RECIPE)
    model = wrapped(vision.make_model("qwen2_5_vl"))
    found, gradients = [], []
    for filler in (True, False):
        batch, pictures = micro_batch(dataset, filler)
        model.zero_grad()
        value = losses(model, "attention", batch, pictures if filler else None)
        value.sum().backward()
        found.append(value.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*found)
    seen = [name for name in gradients[0] if "visual" in name]
    assert seen and not any(gradients[0][name].any() for name in seen)
    assert all(torch.allclose(gradients[0][n], g, atol=1e-5) for n, g in gradients[1].items())


def test_a_model_that_places_pictures_otherwise_is_refused(monkeypatch):
    model = vision.make_model("qwen2_5_vl")
    check_positions(model)
    own = model.model.get_rope_index

    @functools.wraps(own)
    def other(*args, **options):
        positions, deltas = own(*args, **options)
        return positions.flip(0), deltas

    monkeypatch.setattr(model.model, "get_rope_index", other, raising=False)
    with pytest.raises(RunStopped, match="Qwen2_5_VLForConditionalGeneration gives pictures other"):
        check_positions(model)


def test_freezing_takes_the_tower_alone():
    model = vision.make_model("qwen3_vl")
    freeze(model, "vision")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith("model.visual.")
    }
    with pytest.raises(SetupError, match="--freeze vision"):
        freeze(model.model.language_model, "vision")
