"""What the documentation names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("post_training", "data", "scripts")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_each_known_fault_names_tests_that_exist():
    text = (ROOT / "docs" / "numerical_truth.md").read_text()
    faults = text.partition("## Known faults")[2]
    table = [line for line in faults.splitlines() if line.startswith("|")][2:]
    assert len(table) >= 11
    for line in table:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named, f"no test is named: {line}"
        for file, name in named:
            functions = [
                node.name
                for node in ast.walk(ast.parse((ROOT / file).read_text()))
                if isinstance(node, ast.FunctionDef)
            ]
            assert name in functions, f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_scripts_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for script in re.findall(
        r"(?:python|bash) ((?:scripts|tests|benchmarks)/[\w/]+\.(?:py|sh))", text
    ):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """By their path from the root; in the pictures of docs/architecture.md from a package too."""
    folders = [ROOT, ROOT / "post_training", ROOT / "data"]
    for name in re.findall(r"(?<![\w/.-])(\w+/[\w/]+\.py)\b", page.read_text()):
        assert any((folder / name).is_file() for folder in folders), f"{page.name} names {name}"


# Said by the system, torch and OmegaConf, or put together where no test of words can see it.
UNSEEN = (
    *(
        "No such file or directory",
        "No space left on device",
        "File too large",
        "Missing mandatory value",
    ),
    *(
        "CUDA out of memory",
        "expects a number",
        "tool result dropped",
        "matches the router",
        "is nan",
        "x is on cpu",
    ),
    *("config.json has quantization_config (...)", "died at step S", "while all losses are finite"),
    "--tensor-model-parallel-size N: the latent vector of queries has M elements",
)


def spoken(text):
    """Its words alone, in lower case."""
    return " ".join(re.findall("[a-z]+", text.lower()))


def test_messages_to_search_for_are_said():
    """Each three words in a row of a message of the tables stand so in the code, docstrings aside."""
    said = [file.read_text() for file in (ROOT / "scripts").rglob("*.sh")]
    for file in [ROOT / "finetune.py", *(f for d in PACKAGES for f in (ROOT / d).rglob("*.py"))]:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [piece.value for piece in pieces if isinstance(piece, ast.Constant)]
            if id(node) not in docstrings:
                said.append(" ".join(text for text in texts if isinstance(text, str)))
    code = f" {' zzz '.join(spoken(text) for text in said)} "
    page, _, theirs = (ROOT / "docs/troubleshooting.md").read_text().partition("## Known from")
    rows = [row for row in page.splitlines() if row.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in rows]
    cells += [row.split("|")[2] for row in theirs.splitlines() if row.startswith("| ")]
    assert len(cells) > 200
    wrong = []
    for message in (message for cell in cells for message in re.findall(r"`([^`]+)`", cell)):
        # What differs from one message to the next is in capitals, dots, quotes or brackets.
        variable = r"\.\.\.|\b[A-Z][A-Z0-9_]*\b|\d+|'[^']*'|--[\w-]+|\([^)]*\)|[:;,]|\w+\.[\w.]+"
        parts = [spoken(part).split() for part in re.split(variable, message)]
        windows = [" ".join(each[n : n + 3]) for each in parts for n in range(len(each) - 2)]
        if any(f" {window} " not in code for window in windows) and not message.endswith(UNSEEN):
            wrong.append(message)
    assert wrong == []
