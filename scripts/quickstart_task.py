"""Makes the quickstart's own base model, tokenizer and dataset, reproducible byte for byte.

    python scripts/quickstart_task.py --out DIR [--seed N]

    DIR/base/         a HuggingFace folder: Qwen3 architecture with random float32 weights, and a
                      tokenizer with a chat template
    DIR/train.jsonl   rows {"kind": ..., "messages": [...]} to finetune on
    DIR/test.jsonl    500 held-out rows; the last assistant turn is the one right answer

The task is a small helpful assistant: it looks facts up in the system prompt and in earlier turns,
compares, sorts, counts, adds, translates and tells words apart. The kinds are chosen so that a
model of 0.6 million parameters learns them from nothing in about two minutes on a CPU, and each has
so many combinations that the held-out questions are new.
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

# ChatML. The stop token of every turn is TURN_END; END_OF_TEXT never stands inside a conversation,
# so it can separate and pad documents.
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
    """Flags that learn the task in about two minutes on a CPU; a field is a Megatron flag's name.

    Many small steps beat few large ones here: learning waits for attention heads that copy from the
    context, and these form after a number of updates, not of tokens.
    """

    seq_length: int = 256  # tokens a pack; the longest conversation has about half of that
    global_batch_size: int = 4  # packs a step
    micro_batch_size: int = 4  # packs a forward pass
    train_iters: int = 1000
    lr: float = 3e-3  # 6e-3 is clearly slower: the copying heads form late
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


# --- the words ------------------------------------------------------------------------------------

NAMES = "Adam Anna Ben Clara David Emma Frank Jack Kate Leo Lucy Mark Nina Paul Rosa Tom".split()
CITIES = "Athens Berlin Cairo Delhi Lima London Madrid Oslo Paris Rome Tokyo Vienna".split()
COLOURS = "red blue green yellow black white brown pink".split()
THINGS = "bag ball bell book box clock cup drum hat kite lamp map pen ring shoe torch".split()
ANIMALS = "bear cat cow dog duck fox goat horse lion mouse owl pig".split()
FOODS = "apple bean bread cake cheese corn egg lemon melon pear plum rice".split()
JOBS = "baker cook doctor farmer judge nurse painter pilot singer teacher".split()
OPPOSITES = (
    "big small|hot cold|fast slow|old young|tall short|rich poor|light dark|wet dry|early late|"
    "loud quiet|full empty|hard soft|open closed|clean dirty|happy sad|strong weak|high low|"
    "near far|thick thin|first last"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SPANISH = (
    "bear oso|cat gato|cow vaca|dog perro|duck pato|fox zorro|goat cabra|horse caballo|lion león|"
    "mouse ratón|owl búho|pig cerdo|apple manzana|bread pan|cheese queso|egg huevo|melon melón|"
    "pear pera|plum ciruela|rice arroz"
)
GERMAN = (
    "bear Bär|cat Katze|cow Kuh|dog Hund|duck Ente|fox Fuchs|goat Ziege|horse Pferd|lion Löwe|"
    "mouse Maus|owl Eule|pig Schwein|apple Apfel|bread Brot|cheese Käse|egg Ei|melon Melone|"
    "pear Birne|plum Pflaume|rice Reis"
)
TITLES = "boss captain chief friend madam professor".split()


# --- the kinds of conversation --------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """One conversation before it is a row.

    Attributes:
        turns: (user, assistant) texts in order; the last assistant text is the checkable answer.
        content: what the conversation is about without its wording. Train and test share no
            content, so a held-out question is not a reworded training question.
        system: system prompt, if there is one.
    """

    turns: Sequence[tuple[str, str]]
    content: tuple[object, ...]
    system: str | None = None


def _listing(parts: Sequence[str]) -> str:
    """Joins ``["a", "b", "c"]`` to ``"a, b and c"``."""
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def house(rng: random.Random) -> Conversation:
    """The keeper of a house, who knows it from the system prompt."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    shade, thing = rng.choice(COLOURS), rng.choice(THINGS)
    system = (
        f"You look after the house of {name} in {city}. "
        f"The door is {shade} and the key is under the {thing}."
    )
    asked = [
        ("Whose house is this?", f"It is the house of {name}."),
        ("In which city is the house?", f"The house is in {city}."),
        ("What colour is the door?", f"The door is {shade}."),
        ("Where is the key?", f"The key is under the {thing}."),
    ]
    return Conversation(rng.sample(asked, rng.randint(1, 4)), (name, city, shade, thing), system)


def shop(rng: random.Random) -> Conversation:
    """A shop assistant whose system prompt holds what customers ask for."""
    food, day = rng.choice(FOODS), rng.choice(DAYS)
    coins, shuts = rng.randint(2, 9), rng.randint(12, 19)
    system = (
        f"You work in a shop for {food}. One piece costs {coins} coins. "
        f"We close at {shuts} and rest on {day}."
    )
    asked = [
        ("What do you sell?", f"We sell {food}."),
        ("How much is one piece?", f"One piece costs {coins} coins."),
        ("When do you close?", f"We close at {shuts}."),
        ("On which day do you rest?", f"We rest on {day}."),
    ]
    return Conversation(rng.sample(asked, rng.randint(1, 4)), (food, day, coins, shuts), system)


def memory(rng: random.Random) -> Conversation:
    """The user says who they are in the first turn and asks for it later."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    job, shade = rng.choice(JOBS), rng.choice(COLOURS)
    facts = [
        f"my name is {name}",
        f"I live in {city}",
        f"I work as a {job}",
        f"I like the colour {shade}",
    ]
    rng.shuffle(facts)
    asked = [
        ("What is my name?", f"Your name is {name}."),
        ("Where do I live?", f"You live in {city}."),
        ("What is my job?", f"You work as a {job}."),
        ("Which colour do I like?", f"You like the colour {shade}."),
    ]
    turns = [
        (f"Hello, {_listing(facts)}.", f"Nice to meet you, {name}."),
        *rng.sample(asked, rng.randint(1, 4)),
    ]
    return Conversation(turns, (name, city, job, shade))


def title(rng: random.Random) -> Conversation:
    """The system prompt says how to address the user; the facts come from the user."""
    how, city, thing, name = (
        rng.choice(TITLES),
        rng.choice(CITIES),
        rng.choice(THINGS),
        rng.choice(NAMES),
    )
    asked = [
        ("Where do I fly?", f"You fly to {city}, {how}."),
        ("What do I bring?", f"You bring the {thing}, {how}."),
        ("Who comes along?", f"It is {name}, {how}."),
    ]
    note = f"Please note that I fly to {city} and bring the {thing} along with {name}."
    turns = [(note, f"Noted, {how}."), *rng.sample(asked, rng.randint(1, 3))]
    system = f"You are a helpful assistant. Call the user {how}."
    return Conversation(turns, (how, city, thing, name), system)


def biggest(rng: random.Random) -> Conversation:
    """Finds the biggest and the smallest of some numbers."""
    numbers = rng.sample(range(1, 16), rng.randint(3, 4))
    ends = [("biggest", max(numbers)), ("smallest", min(numbers))]
    rng.shuffle(ends)
    listed = _listing([str(number) for number in numbers])
    turns = [
        (
            f"Here are the numbers {listed}. Which is the {ends[0][0]}?",
            f"The {ends[0][0]} is {ends[0][1]}.",
        )
    ]
    if rng.random() < 0.5:
        turns.append((f"And the {ends[1][0]}?", f"The {ends[1][0]} is {ends[1][1]}."))
    return Conversation(turns, tuple(numbers))


def total(rng: random.Random) -> Conversation:
    """Adds two numbers from 1 to 7 told as a story."""
    name, food = rng.choice(NAMES), rng.choice(FOODS)
    first, second = rng.randint(1, 7), rng.randint(1, 7)
    text = (
        f"Today {name} has {first} pieces of {food} and gets {second} more. How many are there now?"
    )
    return Conversation(
        [(text, f"There are {first + second} pieces.")], (name, food, first, second)
    )


def translate(rng: random.Random) -> Conversation:
    """Translates two words into the language that the system prompt names."""
    language, pairs = rng.choice([("Spanish", SPANISH), ("German", GERMAN)])
    (left, left_answer), (right, right_answer) = (
        pair.split() for pair in rng.sample(pairs.split("|"), 2)
    )
    system = f"You are a translator. Answer in {language}."
    text = (
        rng.choice(["Please translate", "I need the words for", "Tell me the words for"])
        + f" {left} and {right}."
    )
    return Conversation(
        [(text, f"In {language}: {left_answer}, {right_answer}.")], (language, left, right), system
    )


def swap(rng: random.Random) -> Conversation:
    """Says two words in the other order."""
    left, right = rng.sample(ANIMALS + FOODS + THINGS, 2)
    return Conversation(
        [(f"Please swap these words: {left} {right}.", f"Swapped: {right} {left}.")], (left, right)
    )


def sort(rng: random.Random) -> Conversation:
    """Sorts three numbers."""
    numbers = rng.sample(range(1, 16), 3)
    listed, in_order = " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    return Conversation(
        [(f"Please sort the numbers {listed}.", f"Sorted: {in_order}.")], tuple(sorted(numbers))
    )


def category(rng: random.Random) -> Conversation:
    """Finds the one animal, food, job or city in a list."""
    kinds = [("animal", ANIMALS), ("food", FOODS), ("job", JOBS), ("city", CITIES)]
    chosen = rng.sample(kinds, 3)
    words = [rng.choice(members) for _, members in chosen]
    listed = ", ".join(rng.sample(words, 3))
    turns = [
        (
            f"Look at these words: {listed}. Which is the {chosen[0][0]}?",
            f"The {chosen[0][0]} is {words[0]}.",
        ),
    ]
    if rng.random() < 0.5:
        turns.append((f"And the {chosen[1][0]}?", f"The {chosen[1][0]} is {words[1]}."))
    return Conversation(turns, tuple(sorted(words)))


def opposite(rng: random.Random) -> Conversation:
    """Gives the opposites of two words."""
    pairs = [pair.split() for pair in OPPOSITES.split("|")]
    (left, left_answer), (right, right_answer) = (
        rng.sample(pair, 2) for pair in rng.sample(pairs, 2)
    )
    text = (
        rng.choice(["Please give", "Please tell me", "I need"])
        + f" the opposites of {left} and {right}."
    )
    return Conversation([(text, f"They are {left_answer} and {right_answer}.")], (left, right))


def count(rng: random.Random) -> Conversation:
    """Counts the words of a list."""
    words = rng.sample(ANIMALS + FOODS + THINGS, rng.randint(2, 6))
    text = f"How many words are in this list: {', '.join(words)}?"
    return Conversation([(text, f"The list has {len(words)} words.")], tuple(words))


KINDS: dict[str, Callable[[random.Random], Conversation]] = {
    function.__name__: function
    for function in (
        house,
        shop,
        memory,
        title,
        biggest,
        sort,
        total,
        swap,
        category,
        opposite,
        translate,
        count,
    )
}


# --- the dataset ----------------------------------------------------------------------------------


def make_rows(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Draws the training and the held-out rows.

    Kinds take turns, so both splits hold them in equal parts. The held-out rows are drawn first, each
    with a content of its own; their contents are refused afterwards. No row comes twice.

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
        for _ in range(1000):
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
        raise ValueError(f"the kind {kind!r} has too few different conversations for so many rows")

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


# --- the base model -------------------------------------------------------------------------------


def make_tokenizer(rows: Sequence[dict[str, object]]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the rows; it encodes any text, the task's words best."""
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
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden_size). With the usual 0.02 so narrow a model takes several times as
        # many steps.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[
            tokenizer.convert_tokens_to_ids(TURN_END),
            tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        ],
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
    parser.add_argument(
        "--out", type=Path, help="folder to write base/, train.jsonl and test.jsonl to"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the rows and the weights (default 0)"
    )
    parser.add_argument(
        "--print-flags", action="store_true", help="print the recommended training flags and exit"
    )
    args = parser.parse_args(argv)
    if args.print_flags:
        print(" ".join(TRAIN_FLAGS.to_args()))
        return
    if args.out is None:
        parser.error(
            "--out DIR is needed: the folder to write base/, train.jsonl and test.jsonl to"
        )
    make_task(args.out, args.seed)


if __name__ == "__main__":
    main()
