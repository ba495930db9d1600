"""Mistakes of users, made of tables (`mistakes.yaml`): words, rows, files, models and checkpoints."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.helpers.launch import finetune
from tests.helpers.models import save_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

TABLES: Any = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
Damage = Callable[[bytes], bytes | None]
WAYS: dict[str, Damage] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "absent": lambda _: None,
    "binary": lambda _: bytes(range(256)) * 2,
    "list": lambda _: b"[]",
}


class Case(NamedTuple):
    """One mistake."""

    name: str
    tool: str
    """`finetune`, or a script."""
    words: tuple[str, ...]
    names: str
    """What the answer must contain, as a pattern."""
    late: bool = False
    """It can only be met after the processes know each other."""
    variables: dict[str, str] = {}

    @property
    def taken(self) -> str:
        """Why it is right to go on; empty where it is a mistake."""
        reasons = TABLES["taken"].items()
        return next((why for name, why in reasons if re.fullmatch(name, self.name)), "")


def listed(table: str) -> list[str]:
    """The entries of a table."""
    return [" ".join(entry.split()) for entry in TABLES[table].split(";;")]


class Place:
    """The good things that mistakes are made of, and damaged copies of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.model = save_model(folder / "model", "qwen3")
        self.data = write_rows(folder / "good.jsonl", make_rows(12))
        words = ("--hf-model", str(self.model), "--finetune-data-files", str(self.data))
        done = finetune(folder / "run", *words, *Recipe(steps=2).flags(), "--save-interval", "1")
        self.run = done.ok().folder

    def new(self, name: str, content: bytes | str = b"") -> str:
        """A new file."""
        self.number += 1
        file = self.folder / f"{self.number:04d}" / name
        file.parent.mkdir()
        file.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )
        return str(file)

    def damaged(self, folder: Path, file: str, damage: Damage) -> str:
        """A copy of a folder with one file changed, or without it."""
        self.number += 1
        target = self.folder / f"{self.number:04d}"
        shutil.copytree(folder, target)
        content = damage((target / file).read_bytes() if (target / file).exists() else b"")
        (target / file).unlink(missing_ok=True)
        if content is not None:
            (target / file).write_bytes(content)
        return str(target)

    def train(self, *words: str, **flags: str) -> tuple[str, ...]:
        """The command line of one step, with some words more."""
        self.number += 1
        base: dict[str, str | None] = {
            "--hf-model": str(self.model),
            "--finetune-data-files": str(self.data),
            "--fp32": None,
            "--seq-length": "128",
            "--global-batch-size": "2",
            "--train-iters": "1",
            "--data-workers": "1",
            "--data-cache-dir": str(self.folder / "cache"),
            "--output-dir": str(self.folder / f"{self.number:04d}-out"),
        } | {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        given = {word.partition("=")[0] for word in words}
        given |= {"--fp32"} if given & {"--bf16", "--fp16"} else set()
        given |= {"--train-iters"} if given & {"--num-epochs"} and len(words) < 3 else set()
        return (
            *(w for pair in base.items() if pair[0] not in given for w in pair if w is not None),
            *words,
        )


def flag_cases(place: Place) -> Iterator[Case]:
    """Words of finetune.py: types, ranges, contradictions, names of other programs, variables, paths."""
    for kind, table in TABLES["flags"].items():
        for flag, value in product(table["flags"].split(), table["values"]):
            words = [f"--{flag}", value] if kind == "foreign" else [f"--{flag}={value}"]
            name = f"{kind}: --{flag} {value!r}"
            yield Case(name, "finetune", place.train(*words), f"--{flag}")
    for entry in listed("words"):
        text, _, names = entry.partition(" -> ")
        words = text.replace("ROWS", str(place.data)).split(" ")
        given = [re.escape(word.partition("=")[0]) for word in words if word[:2] == "--"]
        names = "|".join([names or str(place.data), *given])
        yield Case(f"words: {text}", "finetune", place.train(*words), names)
    for entry in TABLES["variables"].split():
        name, _, value = entry.partition("=")
        yield Case(f"variable: {entry}", "finetune", place.train(), name, variables={name: value})
    (place.folder / "empty").mkdir()
    binary = place.new("binary.bin", bytes(range(256)))
    paths = ("nothing", "empty", binary, "/" + "n" * 300, "/dev/null", "~nobody/x")
    for flag, path in product(TABLES["paths"].split(), paths):
        path = str(place.folder / path) if path.isalpha() else path
        names = f"{re.escape(path[:40])}|--{flag}"
        name = f"path: --{flag} {path[-9:]}"
        yield Case(name, "finetune", place.train(f"--{flag}", path), names)


def model_cases(place: Place) -> Iterator[Case]:
    """Model folders: values of config.json, weights, tokenizers and templates."""

    def case(name: str, file: str, damage: Damage) -> Case:
        model = place.damaged(place.model, file, damage)
        key = name.split()[-3] if " = " in name else file
        names = f"{re.escape(key)}|{re.escape(model)}|--chat-template|look at the weights"
        words = place.train(hf_model=model)
        return Case(name, "finetune", words, names, late=name == "weights: nan")

    def changed(content: bytes, **values: Any) -> bytes:
        return json.dumps(json.loads(content) | values).encode()

    values: tuple[Any, ...] = (None, "x", -1, 0, 1.5, 10**12, [], {}, True, float("nan"), 10**400)
    for key, value in product(TABLES["config_keys"].split(), values):
        damage = partial(changed, **{key: value})
        yield case(f"config.json: {key} = {str(value)[:14]}", "config.json", damage)
    yarn = TABLES["yarn"]
    for key, value in product(yarn, values):
        damage = partial(changed, rope_parameters={**yarn, key: value})
        yield case(f"config.json: yarn {key} = {str(value)[:14]}", "config.json", damage)
    for file, way in product(TABLES["model_files"].split(), WAYS):
        yield case(f"file: {file} {way}", file, WAYS[way])
    for name, change in WEIGHTS.items():
        damage = partial(_weights, change=change, place=place)
        yield case(f"weights: {name}", "model.safetensors", damage)
    for table in ("tokenizer_config", "tokenizer"):
        for entry in listed(table):
            yield case(f"{table}: {entry}", f"{table}.json", partial(changed, **json.loads(entry)))
    for entry in listed("indices"):
        index = "model.safetensors.index.json"
        folder = Path(place.damaged(place.model, index, partial(_encoded, text=entry)))
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        words = place.train(hf_model=str(folder))
        yield Case(f"weights: index {entry}", "finetune", words, str(folder))
    for entry in listed("templates"):
        text = entry.replace("LOOP", "{% for m in messages %}").replace("END", "{% endfor %}")
        words = place.train("--chat-template", place.new("template.jinja", text))
        yield Case(f"template: {entry}", "finetune", words, "template")
        yield case(f"own template: {entry}", "chat_template.jinja", partial(_encoded, text=text))


WEIGHTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one missing": lambda t: t.pop("model.norm.weight"),
    "one more": lambda t: t.update({"model.nothing.weight": torch.ones(2)}),
    "shape": lambda t: t.update({"model.norm.weight": torch.ones(3)}),
    "turned": lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()}),
    "integers": lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
    "nan": lambda t: t.update({"model.norm.weight": torch.full((64,), float("nan"))}),
    "none": lambda t: t.clear(),
    "a layer more": lambda t: t.update(
        {k.replace("s.1.", "s.2."): v.clone() for k, v in [*t.items()] if "s.1." in k}
    ),
    "complex": lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.complex64)}),
}


def _encoded(content: bytes, text: str) -> bytes:
    return text.encode()


def _weights(content: bytes, change: Callable[[dict[str, Any]], Any], place: Place) -> bytes:
    tensors = load_file(place.new("w.safetensors", content))
    change(tensors)
    save_file(tensors, file := place.new("w.safetensors"), {"format": "pt"})
    return Path(file).read_bytes()


DEEP = json.loads("[" * 200 + "]" * 200)
VALUES: tuple[Any, ...] = (
    *(None, 5, True, [], {}, "", [[]], DEEP, "\ud800"),
    *(10**5000, float("nan"), {"a": {"b": None}}, "000"),
)


def data_cases(place: Place) -> Iterator[Case]:
    """Rows of each format in which one value is of another kind, and files that hold no rows."""
    sys.set_int_max_str_digits(0)
    said = TABLES["messages"]
    for entry in TABLES["rows"]:
        row = {
            k: [said.get(str(m), m) for m in v] if k == "messages" else v
            for k, v in entry["row"].items()
        }
        for where, value in product(entry["places"].split(), VALUES):
            changed = holder = json.loads(json.dumps(row))
            *path, last = (int(key) if key.isdigit() else key for key in where.split("."))
            for key in path:
                holder = holder[key]
            holder[last] = value
            data = place.new("rows.jsonl", json.dumps(row) + "\n" + json.dumps(changed) + "\n")
            words, name = (
                place.train(finetune_data_files=data),
                f"row: {where} = {json.dumps(value)[:14]}",
            )
            yield Case(name, "finetune", words, "rows.jsonl")
    line, sink = (
        json.dumps({"messages": [said["USER"], said["ANSWER"]]}),
        pyarrow.BufferOutputStream(),
    )
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2], "b": ["x", "y"]}), sink)
    parquet, whole = sink.getvalue().to_pybytes(), gzip.compress((line + "\n").encode() * 50)
    files: dict[str, str | bytes] = {
        "utf16.jsonl": f"{line}\n{line}\n".encode("utf-16"),
        "binary.jsonl": bytes(range(256)),
        "latin.jsonl": b'{"text": "\xe4"}',
        "deep.jsonl": "[" * 100_000,
        "deep.json": '{"a":' * 100_000,
        "flip.jsonl.gz": whole[:20] + b"\xff" + whole[21:],
        "cut.jsonl.gz": whole[:-20],
        "cut.parquet": parquet[:-30],
        "columns.parquet": parquet,
        "latin.csv": b"question,answer\n\xe4,b\n",
        "cut.jsonl.zst": b"\x28\xb5\x2f\xfd\x04",
    }
    for name, content in (TABLES["good_files"] | TABLES["bad_files"] | files).items():
        kind = "spelled" if name in TABLES["good_files"] else "data"
        data = place.new(
            name, content.replace("LINE", line) if isinstance(content, str) else content
        )
        cache = ("--data-cache-dir", str(place.folder / "cache"))
        words = ("--tokenizer", str(place.model), "--data", data, *cache)
        names = re.escape(name)
        yield Case(f"{kind}: {name}", "finetune", place.train(finetune_data_files=data), names)
        yield Case(f"{kind} shown: {name}", "preview", words, names)


def recipe_cases(place: Place) -> Iterator[Case]:
    """Files of --config."""
    for table, entry in [(t, e) for t in ("recipes", "broken_recipes") for e in listed(t)]:
        file = place.new("recipe.yaml", entry.replace("\\n", "\n") + "\n")
        words = place.train("--config", file)
        key = re.split(r"[:\\ ]", entry.lstrip("-"))[0].replace("_", "-")
        if key != "config" and f"--{key}" in words:  # the words would win
            at = words.index(f"--{key}")
            words = words[:at] + words[at + 2 :]
        names = f"{Path(file).parent}|--{re.escape(key)}"
        yield Case(f"{table}: {entry}", "finetune", words, names)
        yield Case(f"{table} translated: {entry}", "translate_config", (file,), names)


def run_cases(place: Place) -> Iterator[Case]:
    """Damaged runs, for the next start and for the export."""
    newest = place.run / "checkpoints" / "iter_0000002"
    files = sorted(str(path.relative_to(place.run)) for path in newest.iterdir() if path.is_file())

    def again(run: str, *words: str) -> tuple[str, ...]:
        return place.train(*Recipe(steps=3).flags(), *words, "--output-dir", run)

    for file, way in product([*files, *TABLES["run_files"].split()], WAYS):
        run = place.damaged(place.run, file, WAYS[way])
        yield Case(f"resumed: {file} {way}", "finetune", again(run), f"iter_|{run}", late=True)
        run = place.damaged(place.run, file, WAYS[way])
        given = ("--output-dir", run)
        yield Case(f"exported: {file} {way}", "export_hf", given, f"iter_|{run}", late=True)
    other = str(save_model(place.folder / "llama", "llama"))
    for entry in listed("resumed"):
        run = place.damaged(place.run, "metrics.jsonl", lambda content: content)
        words = again(run, *entry.replace("OTHER", other).split())
        names = f"{entry.split()[0]}|iter_"
        yield Case(f"resumed with {entry}", "finetune", words, names, late=True)


def tool_cases(place: Place) -> Iterator[Case]:
    """The words of the other commands."""
    names = {
        "MODEL": str(place.model),
        "ROWS": str(place.data),
        "RUN": str(place.run),
        "EMPTY": place.new("e.jsonl"),
        "NOTHING": str(place.folder / "nothing"),
        "BINARY": place.new("b.jsonl", bytes(range(256))),
        "TO": str(place.folder / "to"),
        "CACHE": str(place.folder / "cache"),
    }

    def filled(word: str) -> str:
        return re.sub("|".join(names), lambda found: names[found[0]], word).replace(
            "\\udcff", "\udcff"
        )

    for line in re.split(r"\n(?=\w)", TABLES["tools"].strip()):
        (tool, *good), flags = (part.split() for part in line.split(" :"))
        pairs = dict(zip(good[::2], map(filled, good[1::2]), strict=True))
        yield Case(f"{tool}: no words", tool, (), "--|usage")
        for entry in flags:
            flag, has_values, values = entry.partition("=")
            for value in map(filled, values.split(",")):
                added = (f"--{flag}", value) if has_values else (f"--{flag}",)
                base = (
                    w for name, word in pairs.items() if name != f"--{flag}" for w in (name, word)
                )
                answer = f"--{flag}|{re.escape(value[:40]) or '--'}|the prompt|{place.data}:"
                yield Case(f"{tool}: {entry[:30]} {value[-9:]!r}", tool, (*base, *added), answer)
    for entry in listed("launches"):
        words = tuple(
            w
            for word in entry.split()
            for w in (("finetune.py", *place.train()) if word == "GOOD" else (word,))
        )
        yield Case(f"launch: {entry}", "launch", ("--dry-run", *words), "")


KINDS = (flag_cases, data_cases, model_cases, recipe_cases, run_cases, tool_cases)
TOOLS = tuple(line.split()[0] for line in re.split(r"\n(?=\w)", TABLES["tools"].strip()))
