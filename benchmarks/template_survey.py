"""A survey of many chat templates: each one's self-test, tokenised with each fitting tokenizer.

    python benchmarks/template_survey.py TEMPLATES TOKENIZERS

Prints the counts and the table of ``docs/templates.md`` for the templates and the tokenizers in
folders below these two. A probe is *exact* when its self-test is, and when the mask that training
would use is, token by token, the one told from the characters in another way.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.other_masks import differences, mask_by_characters, transformers_mask
from data.errors import DataError, RowError
from data.masking.answers import AnswerFinder, edges_of_answers, trained_spans
from data.masking.template_check import Probe, Verdict, check_template, probes
from data.templates.reasoning import keep_reasoning
from data.templates.template import ChatTemplate
from data.templates.tokenizer_facts import added_tokens, backend_json, special_tokens
from data.tokenise.masked_tokenizer import MaskedTokenizer
from post_training.hf.tokenizer import open_tokenizer

# What looks like a special token in a template's source.
_SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_▁\- ]+\|>|<｜[^｜<>]+｜>|</?s>|<(?:start|end)_of_(?:turn|utterance|role)>"
    r"|<(?:turn|channel)\|>|<\|(?:turn|channel|tool_response)>|<SPECIAL_\d+>|<sep>|\[gMASK\]|<sop>"
    r"|\[/?(?:INST|TOOL_CALLS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|THINK|CALL_ID|ARGS)\]"
)
_STAND_IN = "its own tokens"


def tokens_named_in(source: str) -> list[str]:
    """What looks like a special token in a template's source."""
    return sorted({*_SPECIAL.findall(source), "<s>", "</s>"})


class SurveyTokenizer:
    """One tokenizer to try templates with.

    Args:
        name: Its name.
        tokenizer: The tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.names = {"bos_token": "", **special_tokens(tokenizer)}
        special, added = added_tokens(tokenizer)
        self.special, self.added = list(special), list(added.values())
        self.added_ids = frozenset(added)
        self.masked = MaskedTokenizer(backend_json(tokenizer), added)

    def finder(self, source: str) -> AnswerFinder:
        """An answer finder for a template with this tokenizer's tokens."""
        return AnswerFinder(ChatTemplate(source, self.names), self.special, self.added)

    def fits(self, finder: AnswerFinder) -> bool:
        """Whether what the template writes around turns are tokens of this tokenizer."""
        three_turns = next(probe for probe in probes() if probe.name == "three turns")
        try:
            text = finder.find(three_turns.conversation).text
        except RowError:
            return False
        named = {token for token in _SPECIAL.findall(text) if token.startswith("<")}
        return finder.markup.stop_is_token and named <= {*self.added}


@dataclass(frozen=True)
class Tried:
    """One probe with one template and one tokenizer.

    Attributes:
        tokenizer: Name of the tokenizer.
        probe: Name of the probe.
        verdict: ``exact``, ``refused`` or ``wrong``.
        detail: The reason, when it is not exact.
        transformers: In what transformers' assistant mask differs; None where there is none.
    """

    tokenizer: str
    probe: str
    verdict: Verdict
    detail: str
    transformers: frozenset[str] | None = None


@dataclass
class Surveyed:
    """One template's verdicts.

    Attributes:
        name: File name without suffix, with its folder.
        method: How answers are found in it.
        stops: Texts that end an assistant turn.
        tried: Every probe with every fitting tokenizer.
        problem: Why the template cannot be used at all, or empty.
    """

    name: str
    method: str = "–"
    stops: list[str] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    problem: str = ""


def survey(template: Path, tokenizers: Sequence[SurveyTokenizer], spare: int = -1) -> Surveyed:
    """Try one template with every fitting tokenizer.

    Args:
        template: Jinja file.
        tokenizers: The tokenizers.
        spare: Which of them is a stand-in with every template's tokens, for those that no other fits.
    """
    source = template.read_text(encoding="utf-8")
    result = Surveyed(f"{template.parent.name}/{template.stem}")
    stand_in = tokenizers[spare]
    others = [tokenizer for tokenizer in tokenizers if tokenizer is not stand_in]
    kept = keep_reasoning(source)[0]
    finders = [(tokenizer, tokenizer.finder(kept)) for tokenizer in others]
    fitting = [(tokenizer, finder) for tokenizer, finder in finders if tokenizer.fits(finder)]
    if not fitting:
        own = AnswerFinder(ChatTemplate(kept, stand_in.names), tokens_named_in(kept))
        fitting = [(stand_in, own)]
    result.method = fitting[0][1].method
    result.stops = list(dict.fromkeys(s for _, finder in fitting for s in finder.markup.stops))
    for tokenizer, finder in fitting:
        report = check_template(finder)
        try:
            report.require_usable()
        except DataError:
            result.problem = next(r.detail for r in report.results if r.basic)
        for probe, checked in zip(probes(), report.results, strict=True):
            verdict, detail = checked.verdict, checked.detail
            if verdict == "exact":
                verdict, detail = _tokenised(tokenizer, finder, probe)
            theirs = (
                _agreement(tokenizer, source, finder, probe)
                if finder.template.has_generation
                else None
            )
            result.tried.append(Tried(tokenizer.name, probe.name, verdict, detail, theirs))
    return result


def _tokenised(
    tokenizer: SurveyTokenizer, finder: AnswerFinder, probe: Probe
) -> tuple[Verdict, str]:
    """Whether the mask that training would use is what the characters say."""
    rendering = finder.find(probe.conversation)
    text, spans = rendering.text, trained_spans(rendering, probe.conversation)
    edges = edges_of_answers(rendering, spans)
    (ours,) = tokenizer.masked.tokenize([text], [spans], [edges])
    offsets = tokenizer.masked.offsets(text, edges)
    encoding = tokenizer.masked.backend.encode(text, add_special_tokens=False)
    if (encoding.ids == ours.ids.tolist()) != (encoding.offsets == offsets):
        return "wrong", "the tokens are not those of the tokenizer"
    expected = mask_by_characters(text, spans, ours.ids.tolist(), offsets, tokenizer.added_ids)
    if not np.array_equal(ours.mask, expected):
        at = int(np.flatnonzero(ours.mask != expected)[0])
        return "wrong", f"token {at} ({text[slice(*offsets[at])]!r}) has mask {ours.mask[at]}"
    if not ours.mask.any():
        return "refused", "nothing to train: an empty answer without a stop"
    return "exact", ""


def _agreement(
    tokenizer: SurveyTokenizer, source: str, finder: AnswerFinder, probe: Probe
) -> frozenset[str] | None:
    """In what transformers' mask differs from that of the marks; None where either has none."""
    # Transformers renders the template as it is, so reasoning is not kept in ours either.
    special, added = finder.special_tokens, finder.added_tokens
    plain = AnswerFinder(ChatTemplate(source, tokenizer.names), special, added, reasoning="last")
    conversation = probe.conversation
    try:
        rendering = plain.find(conversation, "marks")
    except RowError:
        return None
    messages = plain.forms.apply(conversation.messages)
    tools = conversation.tools or plain.template.no_tools
    ids, theirs = transformers_mask(tokenizer.tokenizer, source, messages, tools, tokenizer.names)
    spans = trained_spans(rendering, conversation)
    (ours,) = tokenizer.masked.tokenize([rendering.text], [spans])
    if ids != ours.ids.tolist():
        return frozenset({"answer: other tokens"})
    offsets = tokenizer.masked.offsets(rendering.text)
    return frozenset(differences(rendering.text, offsets, ours.mask, theirs, spans))


def load_tokenizers(
    folder: Path, templates: Iterable[Path], names: Sequence[str] = ("*",)
) -> list[SurveyTokenizer]:
    """The tokenizers below a folder, and last a stand-in with all tokens that templates name.

    Args:
        folder: Where they are.
        templates: The templates.
        names: Names or patterns of those to load.
    """
    paths = sorted(p.parent for name in names for p in folder.glob(f"{name}/tokenizer.json"))
    found = [SurveyTokenizer(p.name, open_tokenizer(str(p), "tokenizer")) for p in paths]
    stand_in = open_tokenizer(str(paths[-1]), "tokenizer")
    named = {name for path in templates for name in tokens_named_in(path.read_text("utf-8"))}
    stand_in.add_special_tokens({"additional_special_tokens": sorted(named)})
    stand_in.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return [*found, SurveyTokenizer(_STAND_IN, stand_in)]


def table(rows: list[Surveyed]) -> str:
    """The survey as Markdown."""
    head = (
        "template|method|tokenizers|exact|refused|ends turns with|transformers' mask|refused probes"
    )
    lines = ["| " + head.replace("|", " | ") + " |", "|---" * 8 + "|"]
    for row in rows:
        verdicts = Counter(tried.verdict for tried in row.tried)
        tokenizers = ", ".join(dict.fromkeys(tried.tokenizer for tried in row.tried))
        stops = " ".join(f"`{stop}`" for stop in row.stops).replace("|", "\\|") or "nothing"
        why = f"every probe: {row.problem}" if row.problem else _reasons(row)
        why = why.replace("|", "\\|").replace("\n", "\\n").replace("<", "&lt;")
        lines.append(
            f"| {row.name} | {row.method} | {tokenizers} | {verdicts['exact']} "
            f"| {verdicts['refused']} | {stops} | {_agreements(row)} | {why} |"
        )
    return "\n".join(lines)


def _reasons(row: Surveyed) -> str:
    """Why probes were refused, with the tokenizers where it is not so with all."""
    every = {tried.tokenizer for tried in row.tried}
    refused: dict[str, dict[str, set[str]]] = {}
    for tried in row.tried:
        if tried.verdict != "exact":
            reason = tried.detail.split(";")[0]
            refused.setdefault(reason, {}).setdefault(tried.probe, set()).add(tried.tokenizer)
    return "; ".join(
        ", ".join(
            name if by == every else f"{name} ({', '.join(sorted(by))})"
            for name, by in names.items()
        )
        + f": {reason}"
        for reason, names in refused.items()
    )


def _agreements(row: Surveyed) -> str:
    compared = [tried.transformers for tried in row.tried if tried.transformers is not None]
    if not compared:
        return ""
    same = sum(not found for found in compared)
    kinds = sorted({kind for found in compared for kind in found})
    more = f", the others but for: {', '.join(kinds)}" if kinds else ""
    return f"{same} of {len(compared)} the same{more}"


def summary(rows: list[Surveyed]) -> str:
    """The counts of the survey, in two sentences."""
    tried = [tried for row in rows for tried in row.tried]
    verdicts = Counter(each.verdict for each in tried)
    pairs = len({(row.name, each.tokenizer) for row in rows for each in row.tried})
    usable = sum(not row.problem for row in rows)
    compared = [each.transformers for each in tried if each.transformers is not None]
    same = sum(not found for found in compared)
    other = sum(any(kind.startswith("answer") for kind in found) for found in compared)
    return (
        f"{len(rows)} templates, {usable} usable; {pairs} pairs of template and tokenizer, "
        f"{len(tried)} with probes: {verdicts['exact']} exact token by token, "
        f"{verdicts['refused']} refused with a reason, {verdicts['wrong']} wrong.\n"
        f"{len(compared)} of them have a mask of transformers: {same} the same as ours token by "
        f"token, {len(compared) - same - other} but for what no answer needs, {other} different."
    )


def main() -> None:
    """Print the counts and the table."""
    templates = sorted(Path(sys.argv[1]).glob("*/*.jinja"))
    tokenizers = load_tokenizers(Path(sys.argv[2]), templates)
    rows = [survey(path, tokenizers) for path in templates]
    print(f"{summary(rows)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
