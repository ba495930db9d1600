"""What the documentation names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
