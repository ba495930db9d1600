"""Makes the picture quickstart's own model and data, reproducible byte for byte.

    python scripts/quickstart/vision.py --out DIR [--seed N]

    DIR/base/                   a HuggingFace folder: Qwen2.5-VL architecture with random float32 weights,
                                image processor, and a tokenizer with a chat template
    DIR/train-*.parquet         question, choices, correct_answer, kind, image (encoded PNG), as Robo2VLM
    DIR/test-00000.parquet      the same of other pictures: a picture's hash says where it belongs
    DIR/shuffled-00000.parquet  the test's questions beside the pictures of others

Coloured shapes stand on a grid of 3 by 3. Every answer is as likely as any other, so who sees nothing
answers one question in four.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from post_training.inference.quiet import hush
from scripts.quickstart.base_model import END_OF_TEXT, TURN_END, make_tokenizer, save_tokenizer

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
}
SHAPES = ("square", "disc", "cross", "frame")
COUNTS = ("one", "two", "three", "four")
TRAIN_ROWS, TEST_ROWS, TRAIN_FILES = 12000, 600, 2
CELL, SIDE = 16, 3  # pixels of a cell, which is a token; cells of a picture on each side
IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
# ChatML with pictures, as Qwen2.5-VL writes them.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '"
    + "".join(IMAGE_TOKENS)
    + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Scene = list[tuple[int, str, str]]
"""Cell, colour and shape of each thing in a picture."""


def draw(scene: Scene) -> bytes:
    """The picture of a scene: PNG."""
    pixels = np.full((SIDE * CELL, SIDE * CELL, 3), 245, np.uint8)
    down, across = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    far = np.maximum(abs(down), abs(across))
    inside = {
        "square": far < 6,
        "disc": down**2 + across**2 < 40,
        "cross": (np.minimum(abs(down), abs(across)) < 2) & (far < 7),
        "frame": (far < 7) & (far > 4),
    }
    for cell, colour, shape in scene:
        top, left = (CELL * place for place in divmod(cell, SIDE))
        pixels[top : top + CELL, left : left + CELL][inside[shape]] = COLOURS[colour]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _scene(rng: random.Random, count: int) -> Scene:
    cells = rng.sample(range(SIDE * SIDE), count)
    shapes = rng.sample(SHAPES, count)
    colours = rng.sample(list(COLOURS), count)
    return list(zip(cells, colours, shapes, strict=True))


def colour(rng: random.Random) -> tuple[Scene, str, Sequence[str], int]:
    """The colour of a shape."""
    scene = _scene(rng, rng.randint(1, 4))
    _, found, shape = rng.choice(scene)
    return scene, f"What colour is the {shape}?", tuple(COLOURS), list(COLOURS).index(found)


def shape(rng: random.Random) -> tuple[Scene, str, Sequence[str], int]:
    """The shape of a colour."""
    scene = _scene(rng, rng.randint(1, 4))
    _, asked, found = rng.choice(scene)
    return scene, f"Which shape is {asked}?", SHAPES, SHAPES.index(found)


def counting(rng: random.Random) -> tuple[Scene, str, Sequence[str], int]:
    """How many there are."""
    right = rng.randrange(4)
    return _scene(rng, right + 1), "How many shapes are there?", COUNTS, right


KINDS: Sequence[Callable[[random.Random], tuple[Scene, str, Sequence[str], int]]] = (
    colour,
    shape,
    counting,
)


def make_rows(
    seed: int, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows; which of them a picture is for, its hash says.

    Args:
        seed: the only source of randomness.
        train_rows: how many.
        test_rows: likewise.
    """
    rng = random.Random(seed)
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    while len(train) < train_rows or len(test) < test_rows:
        kind = KINDS[rng.randrange(len(KINDS))]
        scene, question, choices, right = kind(rng)
        png = draw(scene)
        held_out = hashlib.sha256(png).digest()[0] < 16
        rows = test if held_out else train
        if len(rows) < (test_rows if held_out else train_rows):
            rows.append(
                {
                    "kind": kind.__name__,
                    "question": question,
                    "choices": repr(list(choices)),
                    "correct_answer": right,
                    "image": {"bytes": png, "path": None},
                }
            )
    return train, test


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"kind": pa.string(), "question": pa.string(), "choices": pa.string()}
    fields = [*kinds.items(), ("correct_answer", pa.int64()), ("image", picture)]
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(fields)), path)


def make_vision_tokenizer(texts: Sequence[str]) -> Any:
    """The text quickstart's tokenizer, with the tokens of pictures and a template that writes them."""
    said = (*texts, "assistant")
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": text}]} for text in said
    ]
    tokenizer = make_tokenizer(rows)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *IMAGE_TOKENS]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any, seed: int) -> Any:
    """Builds the randomly initialised model."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in IMAGE_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids(TURN_END),
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * CELL,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.08,
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        video_token_id=len(tokenizer) + 1,
        tie_word_embeddings=True,
        dtype="float32",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    return model


def save_processor(folder: Path) -> None:
    """Write the image processor's configuration beside a model."""
    pixels = CELL * CELL
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": pixels, "longest_edge": 64 * pixels},
        "patch_size": CELL // 2,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_task(out: Path, seed: int) -> None:
    """Write the model and the data under ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    train, test = make_rows(seed)
    for number in range(TRAIN_FILES):
        write_parquet(out / f"train-{number:05d}.parquet", train[number::TRAIN_FILES])
    write_parquet(out / "test-00000.parquet", test)
    pictures = [row["image"] for row in test]
    turned = pictures[1:] + pictures[:1]
    shuffled = [{**row, "image": image} for row, image in zip(test, turned, strict=True)]
    write_parquet(out / "shuffled-00000.parquet", shuffled)
    texts = sorted({row["question"] for row in train} | {*SHAPES, *COLOURS, *COUNTS})
    letters = "".join(f"{letter}. " for letter in "ABCD")
    tokenizer = make_vision_tokenizer([*texts, letters])
    save_tokenizer(tokenizer, out / "base")
    save_processor(out / "base")
    make_model(tokenizer, seed).save_pretrained(out / "base")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Makes the picture quickstart's model and data.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of rows and weights (default 0)")
    args = parser.parse_args(argv)
    make_task(args.out, args.seed)


if __name__ == "__main__":
    hush()
    main()
