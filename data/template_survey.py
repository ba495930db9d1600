"""A survey of many chat templates: each one's self-test with each fitting tokenizer.

``python -m data.template_survey TEMPLATES_DIR TOKENIZERS_DIR`` prints the table of
``docs/templates.md``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.answer_spans import AnswerFinder
from data.chat_template import ChatTemplate
from data.errors import DataError
from data.reasoning import keep_reasoning
from data.template_check import TemplateReport, check_template

# What looks like a special token in a template's source.
_SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_▁\- ]+\|>|<｜[^｜<>]+｜>|</?s>|<(?:start|end)_of_(?:turn|utterance|role)>"
    r"|<(?:turn|channel)\|>|<\|(?:turn|channel|tool_response)>|<SPECIAL_\d+>|<sep>|\[gMASK\]|<sop>"
    r"|\[/?(?:INST|TOOL_CALLS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|THINK|CALL_ID|ARGS)\]"
)
_OWN = "its own tokens"


@dataclass(frozen=True)
class Surveyed:
    """One template's verdict.

    Attributes:
        name: File name without suffix, with its folder.
        report: The self-test with every token that the template names; None if it is not Jinja.
        problem: Why the template cannot be used at all, or empty.
        fitting: Tokenizers that have the token at which it ends turns.
        usable_with: Those with which every basic probe is exact and none is wrong.
    """

    name: str
    report: TemplateReport | None
    problem: str
    fitting: list[str]
    usable_with: list[str]


def survey(template: Path, tokenizers: dict[str, tuple[list[str], list[str]]]) -> Surveyed:
    """Self-test one template.

    Args:
        template: Jinja file.
        tokenizers: For each name its special tokens and all its added tokens.
    """
    source = keep_reasoning(template.read_text(encoding="utf-8"))[0]
    name = f"{template.parent.name}/{template.stem}"
    own = sorted({*_SPECIAL.findall(source), "<s>", "</s>"})
    try:
        report = _check(source, own, [])
    except DataError as error:
        return Surveyed(name, None, str(error), [], [])
    problem = ""
    try:
        report.require_usable()
    except DataError:
        basic = next(result for result in report.results if result.basic)
        problem = basic.detail
    fitting, usable = [], []
    for tokenizer, (special, added) in tokenizers.items():
        if not report.stops or not all(
            any(token in stop for token in added) for stop in report.stops
        ):
            continue
        fitting.append(tokenizer)
        if _check(source, special, added).usable:
            usable.append(tokenizer)
    return Surveyed(name, report, problem, fitting, usable)


def _check(source: str, special: list[str], added: list[str]) -> TemplateReport:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return check_template(AnswerFinder(ChatTemplate(source, names), special, added))


def load_tokenizers(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Special and added tokens of each tokenizer.json below a folder."""
    import json

    tokenizers = {}
    for path in sorted(folder.glob("*/tokenizer.json")):
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        special = [token["content"] for token in added if token["special"]]
        tokenizers[path.parent.name] = (special, [token["content"] for token in added])
    return tokenizers


def table(rows: list[Surveyed]) -> str:
    """The survey as Markdown."""
    lines = [
        "| template | method | exact | refused | ends turns with | fits | refused probes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.report is None:
            lines.append(f"| {row.name} | – | 0 | all | – | – | {row.problem} |")
            continue
        verdicts = Counter(result.verdict for result in row.report.results)
        refused: dict[str, list[str]] = {}
        for result in row.report.results:
            if result.verdict != "exact":
                refused.setdefault(result.detail.split(";")[0], []).append(result.name)
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refused.items())
        stops = " ".join(f"`{stop}`" for stop in row.report.stops).replace("|", "\\|") or "nothing"
        why = f"every probe: {row.problem}" if row.problem else why
        why = why.replace("|", "\\|").replace("\n", "\\n").replace("<", "&lt;")
        lines.append(
            f"| {row.name} | {row.report.method} | {verdicts['exact']} | {verdicts['refused']} "
            f"| {stops} | {', '.join(row.usable_with) or _OWN} | {why} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    templates, tokenizers = Path(sys.argv[1]), load_tokenizers(Path(sys.argv[2]))
    rows = [survey(path, tokenizers) for path in sorted(templates.glob("*/*.jinja"))]
    usable = sum(not row.problem for row in rows)
    exact = sum(r.verdict == "exact" for row in rows if row.report for r in row.report.results)
    total = sum(len(row.report.results) for row in rows if row.report)
    print(f"{len(rows)} templates, {usable} usable; {exact} of {total} probes exact, ", end="")
    print(f"{total - exact} refused with a reason.\n\n{table(rows)}")


if __name__ == "__main__":
    main()
