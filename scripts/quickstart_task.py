"""Makes the quickstart's own base model, tokenizer and dataset: small, offline and reproducible byte for byte.

    python scripts/quickstart_task.py --out DIR [--seed N]

    DIR/base/         a HuggingFace folder: Qwen3 architecture, random float32 weights, tokenizer with a chat template
    DIR/train.jsonl   rows {"kind": ..., "messages": [...]} to finetune on
    DIR/test.jsonl    500 held-out rows; the last assistant turn is the one right answer to the turns before it

The task is a small helpful assistant: it looks facts up in the conversation or in the system prompt, remembers what was
said in earlier turns, compares, counts, adds, sorts words into kinds and turns lists round. Every kind is built from so
many combinations that the held-out questions are new, and is simple enough that a model of under a million parameters
learns the rule itself (not the rows) in about two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

# ChatML. The stop token of every turn is TURN_END; END_OF_TEXT never stands inside a conversation, so it can separate
# and pad documents.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TRAIN_ROWS = 16000
TEST_ROWS = 500
VOCAB_SIZE = 1024
MAX_POSITIONS = 512


@dataclass(frozen=True)
class TrainFlags:
    """Training flags that learn the task in about two minutes; field names are Megatron's, with underscores."""

    seq_length: int = 256  # tokens a pack; the longest conversation has under 150
    global_batch_size: int = 8  # packs a step
    micro_batch_size: int = 4  # packs a forward pass
    train_iters: int = 500
    lr: float = 3e-3
    min_lr: float = 1e-4
    lr_warmup_iters: int = 50
    lr_decay_style: str = "cosine"
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    clip_grad: float = 1.0

    def to_args(self) -> list[str]:
        """Returns the flags as a command line: ``["--seq-length", "256", ...]``."""
        args: list[str] = []
        for field in fields(self):
            args += ["--" + field.name.replace("_", "-"), str(getattr(self, field.name))]
        return args


TRAIN_FLAGS = TrainFlags()


# --- the words ------------------------------------------------------------------------------------------------------

NAMES = (
    "Adam Alice Anna Ben Clara David Emma Eva Frank George Hannah Henry Ivan Jack Jane Kate Leo Lily Lucy Mark Mary "
    "Max Nina Noah Nora Oscar Paul Peter Rosa Ruth Sam Sarah Simon Sofia Tom Victor"
).split()
CITIES = (
    "Athens Berlin Boston Cairo Delhi Dublin Geneva Lima London Madrid Milan Moscow Oslo Paris Prague Rome Seoul "
    "Sydney Tokyo Vienna"
).split()
COLOURS = "red blue green yellow black white brown pink orange purple grey golden".split()
THINGS = (
    "bag ball bell book boat bottle box brush candle chair clock coat cup drum fork glove hat jar kite knife lamp map "
    "mirror pen plate ring rope scarf shoe spoon table tent torch towel watch whistle"
).split()
ANIMALS = "bear cat cow dog duck fox frog goat hen horse lion mouse owl pig rabbit sheep snake wolf".split()
FOODS = "apple bean bread cake carrot cheese corn egg fig honey lemon melon onion peach pear plum rice soup".split()
JOBS = "baker barber cook dentist doctor farmer guard judge nurse painter pilot poet sailor singer tailor teacher".split()
OPPOSITES = (
    "big small|hot cold|fast slow|old young|tall short|rich poor|light dark|wet dry|early late|loud quiet|full empty|"
    "hard soft|open closed|clean dirty|happy sad|strong weak|long brief|high low|near far|cheap dear"
)
TITLES = "captain boss chief friend madam professor doctor coach".split()


# --- the kinds of conversation --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """One conversation before it is a row.

    Attributes:
        turns: (user, assistant) texts in order; the last assistant text is the checkable answer.
        content: what the conversation is about without its wording. Train and test share no content, so a held-out
            question is not a reworded training question.
        system: system prompt, if there is one.
    """

    turns: Sequence[tuple[str, str]]
    content: tuple[object, ...]
    system: str | None = None


def _listing(parts: Sequence[str]) -> str:
    """Joins ``["a", "b", "c"]`` to ``"a, b and c"``."""
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def owner(rng: random.Random) -> Conversation:
    """Who has what: facts in the question, asked in either direction."""
    count = rng.randint(2, 4)
    names, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    facts = _listing([f"{name} has a {thing}" for name, thing in zip(names, things, strict=True)])
    pick = rng.randrange(count)
    name, thing = names[pick], things[pick]
    by_name = rng.random() < 0.5
    question = f"What does {name} have?" if by_name else f"Who has the {thing}?"
    answer = f"{name} has a {thing}." if by_name else f"{name} has the {thing}."
    return Conversation([(f"{facts}. {question}", answer)], (*names, *things))


def colour(rng: random.Random) -> Conversation:
    """Colours stated in the system prompt, asked for over one to three turns."""
    count = rng.randint(3, 5)
    things, colours = rng.sample(THINGS, count), rng.sample(COLOURS, count)
    facts = _listing([f"the {thing} is {shade}" for thing, shade in zip(things, colours, strict=True)])
    system = f"You help people in a house where {facts}."
    turns = []
    for number, pick in enumerate(rng.sample(range(count), rng.randint(1, 3))):
        question = f"And the {things[pick]}?" if number else f"What colour is the {things[pick]}?"
        turns.append((question, f"The {things[pick]} is {colours[pick]}."))
    return Conversation(turns, (*things, *colours), system)


def price(rng: random.Random) -> Conversation:
    """A shop assistant whose system prompt holds the prices; the customer asks after several goods."""
    count = rng.randint(3, 5)
    foods, prices = rng.sample(FOODS, count), rng.sample(range(2, 20), count)
    facts = _listing([f"the {food} costs {coins} coins" for food, coins in zip(foods, prices, strict=True)])
    system = f"You work in a shop where {facts}."
    turns = []
    for number, pick in enumerate(rng.sample(range(count), rng.randint(1, 3))):
        question = f"And the {foods[pick]}?" if number else f"How much is the {foods[pick]}?"
        turns.append((question, f"The {foods[pick]} costs {prices[pick]} coins."))
    return Conversation(turns, (*foods, *prices), system)


def memory(rng: random.Random) -> Conversation:
    """The user says who they are in the first turn and asks for it later."""
    name, city, job, colour_ = rng.choice(NAMES), rng.choice(CITIES), rng.choice(JOBS), rng.choice(COLOURS)
    facts = [f"my name is {name}", f"I live in {city}", f"I work as a {job}", f"I like the colour {colour_}"]
    rng.shuffle(facts)
    opening = f"Hello, {_listing(facts)}."
    asked = [
        ("What is my name?", f"Your name is {name}."),
        ("Where do I live?", f"You live in {city}."),
        ("What is my job?", f"You work as a {job}."),
        ("Which colour do I like?", f"You like the colour {colour_}."),
    ]
    turns = [(opening, f"Nice to meet you, {name}."), *rng.sample(asked, rng.randint(1, 3))]
    return Conversation(turns, (name, city, job, colour_))


def title(rng: random.Random) -> Conversation:
    """The system prompt says how to address the user; the facts come from the user."""
    how, thing_count = rng.choice(TITLES), 3
    things, cities = rng.sample(THINGS, thing_count), rng.sample(CITIES, thing_count)
    facts = _listing([f"the {thing} is in {city}" for thing, city in zip(things, cities, strict=True)])
    pick = rng.randrange(thing_count)
    turns = [
        (f"Please note that {facts}.", f"Noted, {how}."),
        (f"Where is the {things[pick]}?", f"The {things[pick]} is in {cities[pick]}, {how}."),
    ]
    system = f"You are a helpful assistant. Call the user {how}."
    return Conversation(turns, (how, *things, *cities), system)


def oldest(rng: random.Random) -> Conversation:
    """Compares ages; a second turn may ask for the other end."""
    names, ages = rng.sample(NAMES, 3), rng.sample(range(2, 20), 3)
    facts = _listing([f"{name} is {age} years old" for name, age in zip(names, ages, strict=True)])
    by_age = [name for _, name in sorted(zip(ages, names, strict=True))]
    ends = [("oldest", by_age[-1]), ("youngest", by_age[0])]
    rng.shuffle(ends)
    turns = [(f"{facts}. Who is the {ends[0][0]}?", f"{ends[0][1]} is the {ends[0][0]}.")]
    if rng.random() < 0.5:
        turns.append((f"And who is the {ends[1][0]}?", f"{ends[1][1]} is the {ends[1][0]}."))
    return Conversation(turns, (*names, *ages))


def total(rng: random.Random) -> Conversation:
    """Adds two numbers from 1 to 9 told as a story."""
    name, food = rng.choice(NAMES), rng.choice(FOODS)
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    text = rng.choice(
        [
            f"{name} has {first} pieces of {food} and gets {second} more. How many are there now?",
            f"{name} puts {first} pieces of {food} on a plate and then {second} more. How many are there now?",
        ]
    )
    return Conversation([(text, f"There are {first + second} pieces.")], (name, food, first, second))


def reverse(rng: random.Random) -> Conversation:
    """Says a list of words backwards; a follow-up may ask for the first or last of the answer."""
    words = rng.sample(ANIMALS + FOODS + THINGS, rng.randint(2, 4))
    back = words[::-1]
    turns = [(f"Say these words backwards: {', '.join(words)}.", ", ".join(back) + ".")]
    follow = rng.choice(["", "first", "last"])
    if follow:
        word = back[0] if follow == "first" else back[-1]
        turns.append((f"Which word did you say {follow}?", f"I said {word} {follow}."))
    return Conversation(turns, tuple(words))


def category(rng: random.Random) -> Conversation:
    """Finds the one animal, food or thing in a list."""
    kinds = [("an animal", ANIMALS), ("a food", FOODS), ("a job", JOBS), ("a city", CITIES)]
    chosen = rng.sample(kinds, 3)
    words = [rng.choice(members) for _, members in chosen]
    order = rng.sample(range(3), 3)
    listed = ", ".join(words[i] for i in order)
    text = f"Which of these words is {chosen[0][0]}: {listed}?"
    return Conversation([(text, f"The word {words[0]} is {chosen[0][0]}.")], (chosen[0][0], *sorted(words)))


def opposite(rng: random.Random) -> Conversation:
    """Gives the opposites of two words."""
    pairs = [pair.split() for pair in OPPOSITES.split("|")]
    chosen = [rng.sample(pair, 2) for pair in rng.sample(pairs, 2)]
    (left, left_answer), (right, right_answer) = chosen
    text = rng.choice(
        [
            f"What are the opposites of {left} and {right}?",
            f"Please tell me the opposites of {left} and {right}.",
        ]
    )
    return Conversation([(text, f"They are {left_answer} and {right_answer}.")], (left, right))


def count(rng: random.Random) -> Conversation:
    """Counts the words of a list."""
    words = rng.sample(ANIMALS + FOODS + THINGS, rng.randint(2, 6))
    text = f"How many words are in this list: {', '.join(words)}?"
    return Conversation([(text, f"The list has {len(words)} words.")], tuple(words))


KINDS: dict[str, Callable[[random.Random], Conversation]] = {
    function.__name__: function
    for function in (owner, colour, price, memory, title, oldest, total, reverse, category, opposite, count)
}


# --- the dataset ----------------------------------------------------------------------------------------------------


def make_rows(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Draws the training and the held-out rows.

    Kinds take turns, so both splits hold them in equal parts. The held-out rows are drawn first and their contents are
    refused afterwards; no content comes twice in either split.

    Args:
        seed: the only source of randomness.

    Returns:
        Training rows and held-out rows.
    """
    rng = random.Random(seed)
    names = list(KINDS)
    seen_test: set[tuple[object, ...]] = set()
    seen_rows: set[str] = set()

    def draw(number: int, *, held_out: bool) -> dict[str, object]:
        kind = names[number % len(names)]
        while True:
            conversation = KINDS[kind](rng)
            content = (kind, *conversation.content)
            row = _to_row(kind, conversation)
            text = json.dumps(row)
            if content in seen_test or text in seen_rows:
                continue
            seen_rows.add(text)
            if held_out:
                seen_test.add(content)
            return row

    test = [draw(number, held_out=True) for number in range(TEST_ROWS)]
    train = [draw(number, held_out=False) for number in range(TRAIN_ROWS)]
    rng.shuffle(train)
    return train, test


def _to_row(kind: str, conversation: Conversation) -> dict[str, object]:
    messages = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for user, assistant in conversation.turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"kind": kind, "messages": messages}


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Writes one JSON object a line, UTF-8, with a newline after each."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- the base model -------------------------------------------------------------------------------------------------


def make_tokenizer(rows: Sequence[dict[str, object]]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the rows' text; any text can be encoded, the task's words are short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The role names are part of the rendered text, so they are part of the training text.
    texts = (f"{m['role']}\n{m['content']}" for row in rows for m in row["messages"])  # type: ignore[attr-defined]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Builds the randomly initialised model; heads, groups and layers divide by two for parallel runs."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def make_task(out: Path, seed: int) -> None:
    """Writes ``base/``, ``train.jsonl`` and ``test.jsonl`` under ``out``.

    Args:
        out: folder to write to; made when it does not exist.
        seed: draws rows and weights; the same seed gives the same bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    train, test = make_rows(seed)
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "test.jsonl", test)
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(out / "base")
    make_model(tokenizer, seed).save_pretrained(out / "base")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Makes the quickstart's base model and dataset.")
    parser.add_argument("--out", type=Path, help="folder to write base/, train.jsonl and test.jsonl to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and the weights (default 0)")
    parser.add_argument("--print-flags", action="store_true", help="print the recommended training flags and exit")
    args = parser.parse_args(argv)
    if args.print_flags:
        print(" ".join(TRAIN_FLAGS.to_args()))
        return
    if args.out is None:
        parser.error("--out DIR is needed: the folder to write base/, train.jsonl and test.jsonl to")
    make_task(args.out, args.seed)


if __name__ == "__main__":
    main()
