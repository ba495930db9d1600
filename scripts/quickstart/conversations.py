"""The kinds of conversation that the quickstart teaches, and the words they are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    how, city = rng.choice(TITLES), rng.choice(CITIES)
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
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
