"""Tiny models that see, rows with pictures, and the loop that their runs are compared with."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import prepare_documents
from data.images.processor import ImageProcessor, open_processor
from data.packs.pictures import PictureDataset
from scripts.quickstart import vision as quickstart
from tests.helpers.reference import Recipe, Right, Trajectory, saved_tensors
from tests.helpers.rows import TEXT

KINDS = ("qwen2_5_vl", "qwen3_vl")
IMAGE = "<|image_pad|>"


def make_tokenizer() -> Any:
    """The quickstart's, of other words."""
    return quickstart.make_vision_tokenizer([TEXT])


def save_model(folder: Path, kind: str) -> Path:
    """Write a model with its tokenizer and image processor."""
    make_model(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    quickstart.save_processor(folder)
    return folder


def make_model(kind: str) -> Any:
    """A model in which no two parameters are alike."""
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig

    tokenizer = make_tokenizer()
    config: Any = quickstart.make_model(tokenizer, 0).config
    if kind == "qwen3_vl":
        text = {"head_dim": 32, "num_hidden_layers": 3, "vocab_size": config.text_config.vocab_size}
        same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                "rope_parameters", "eos_token_id", "pad_token_id", "max_position_embeddings")  # fmt: skip
        text |= {name: getattr(config.text_config, name) for name in same}
        seen = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
                "out_hidden_size": 128, "patch_size": quickstart.CELL // 2, "spatial_merge_size": 2,
                "temporal_patch_size": 2, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1]}  # fmt: skip
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
        ids = {name: getattr(config, name) for name in names}
        config = Qwen3VLConfig(
            text_config=text, vision_config=seen, tie_word_embeddings=False, **ids
        )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = (1.0, 0.2) if "norm" in name and "weight" in name else (0.0, 0.06)
            parameter.normal_(mean, 0.2 if parameter.dim() == 1 else deviation)
    return model.eval()


def picture(seed: int, width: int, height: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_rows(folder: Path, count: int, seen: float = 0.6, seed: int = 3) -> list[dict[str, Any]]:
    """Conversations with 0, 1 or 2 pictures, which are written beside them."""
    rng = random.Random(seed)
    words = TEXT.split()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        pictures = rng.choice((1, 2)) if rng.random() < seen else 0
        parts: list[dict[str, str]] = []
        for which in range(pictures):
            name = f"{number}-{which}.png"
            data = picture(100 * number + which, rng.choice((30, 48, 70)), rng.choice((33, 64)))
            (folder / name).write_bytes(data)
            parts.append({"type": "text", "text": rng.choice(words) + ": "})
            parts.append({"type": "image", "image": name})
        parts.append({"type": "text", "text": " ".join(rng.choices(words, k=rng.randint(2, 12)))})
        answer = " ".join(rng.choices(words, k=rng.randint(1, 9)))
        user = {"role": "user", "content": parts}
        rows.append({"messages": [user, {"role": "assistant", "content": answer}]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    return rows


def example(row: dict[str, Any], folder: Path, tokenizer: Any, theirs: Any) -> dict[str, Tensor]:
    """A row as the model's own processor makes it, and `mask`, 1 for what the assistant says."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    parts = row["messages"][0]["content"]
    pictures = [Image.open(folder / part["image"]) for part in parts if part["type"] == "image"]
    seen = {}
    if pictures:
        seen = dict(theirs(images=pictures, return_tensors="pt"))
        first, *rest = text.split(IMAGE)
        text = first
        for grid, after in zip(seen["image_grid_thw"].tolist(), rest, strict=True):
            text += IMAGE * (math.prod(grid) // theirs.merge_size**2) + after
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    mask = torch.zeros_like(ids)
    begin = next(
        at for at in range(len(ids) - 1, 0, -1) if ids[at : at + len(header)].tolist() == header
    ) + len(header)
    end = begin + int((ids[begin:] == tokenizer.eos_token_id).nonzero()[0])
    mask[begin : end + 1] = 1
    return {"ids": ids, "mask": mask, **seen}


def losses(model: Any, each: dict[str, Tensor], right: Right | None = None) -> Tensor:
    """Of the trained tokens of one document, alone: float32 [trained tokens]; `right` counts them."""
    ids = each["ids"]
    seen = {name: each[name] for name in ("pixel_values", "image_grid_thw") if name in each}
    kinds = (ids == model.config.image_token_id).int().unsqueeze(0)
    logits = model(
        input_ids=ids.unsqueeze(0), mm_token_type_ids=kinds, use_cache=False, **seen
    ).logits
    chosen = each["mask"][1:].nonzero().flatten()
    if right is not None:
        right.count(logits.detach()[0, :-1][chosen], ids[1:][chosen])
    return F.cross_entropy(logits[0, :-1][chosen], ids[1:][chosen], reduction="none")


def prepared(folder: Path, model: Path, recipe: Recipe, **options: Any) -> PictureDataset:
    """The packs of the rows of a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = open_processor(tokenizer, folder / "cache")
    assert isinstance(processor, ImageProcessor), processor
    documents = prepare_documents(
        files=[str(folder / "rows.jsonl")],
        tokenizer=tokenizer,
        seq_length=recipe.seq_length,
        cache_dir=None,
        images=processor.layout,
        image_cache=str(folder / "cache"),
        **options,
    )
    return PictureDataset(
        processor,
        recipe.steps * recipe.global_batch,
        documents,
        tokenizer=tokenizer,
        seq_length=recipe.seq_length,
        seed=recipe.seed,
        packing=recipe.packing,
        global_batch_size=recipe.global_batch,
    )


def train(
    model_folder: Path,
    folder: Path,
    rows: Sequence[dict[str, Any]],
    recipe: Recipe,
    frozen: bool = False,
    adapt: Callable[[Any], dict[str, Tensor]] | None = None,
) -> Trajectory:
    """Train the model of a folder in a plain loop, a document at a time.

    `adapt` is as of `reference.train`.
    """
    from transformers import AutoModelForImageTextToText

    dataset = prepared(folder, model_folder, recipe)
    tokenizer, theirs = make_tokenizer(), dataset.processor.theirs
    examples = [example(row, folder, tokenizer, theirs) for row in rows]
    model: Any = AutoModelForImageTextToText.from_pretrained(
        model_folder, dtype=torch.float32
    ).train()
    model.get_input_embeddings().padding_idx = None
    if frozen:
        model.model.visual.requires_grad_(False)
    named = {} if adapt is None else adapt(model)
    trained = [p for p in named.values() or model.parameters() if p.requires_grad]

    def tensors() -> dict[str, Tensor]:
        if adapt is None:
            return saved_tensors(model)
        return {name: value.detach().clone() for name, value in named.items()}

    result = Trajectory(start=tensors())
    optimizer = recipe.make_optimizer(trained)
    for step in range(recipe.steps):
        packs = range(step * recipe.global_batch, (step + 1) * recipe.global_batch)
        batch = [examples[int(row)] for pack in packs for row in dataset.document_indices(pack)]
        tokens = sum(int(each["mask"][1:].sum()) for each in batch)
        total, right = 0.0, Right()
        for each in batch:
            own = losses(model, each, right)
            (own.sum() / tokens).backward()
            total += own.detach().double().sum().item()
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, recipe.clip / (norm + 1e-6)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        for parameter in trained:  # Adam goes on without a gradient, as it does in shards
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(total / tokens)
        result.grad_norms.append(norm)
        result.right.append(right)
    result.end = tensors()
    return result
