"""How rows become documents: the options as a user gives them, and what a tokenizer makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.masking.answers import AnswerFinder, LossOn, Reasoning
from data.masking.self_test import TemplateReport, check_template, probes
from data.rows.converters import FormatOptions
from data.rows.registry import FORMATS
from data.templates.reasoning import keep_reasoning
from data.templates.separator import choose_separator
from data.templates.template import ChatTemplate
from data.templates.tokenizer_facts import (
    added_tokens,
    backend_json,
    special_tokens,
    template_source,
)
from data.tokenise.options import OnBadRow, Overlong, TokenizeOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become documents; every field has a flag of the same name.

    Attributes:
        seq_length: Longest document in tokens.
        on_bad_row: ``error`` stops at the first bad row; ``skip`` counts and lists them.
        overlong: ``drop`` documents longer than seq_length, stop with an ``error``, or
            ``trim-turns``: leave out the oldest turns.
        chat_template: File, name or text of a template; None for the tokenizer's own.
        conversation_format: Name of the rows' format, or ``package.module:function``; None to
            detect it from the first row.
        format_options: Column names.
        reasoning: ``keep`` trains all reasoning, ``last`` only the last turn's, ``mask`` none.
        loss_on: Train ``all`` assistant turns or the ``last``.
        separator: ``auto``, ``none`` or the text of a token.
        workers: Worker processes; None for one a core, 0 for none.
        template_variables: Further template variables, such as ``enable_thinking``.
        trust_blocks: Take the template's generation blocks as they are.
        template_date: What the clock of a template says, as YYYY-MM-DD; None for today.
    """

    seq_length: int
    on_bad_row: OnBadRow = "error"
    overlong: Overlong = "drop"
    chat_template: str | None = None
    conversation_format: str | None = None
    format_options: FormatOptions = FormatOptions()
    reasoning: Reasoning = "keep"
    loss_on: LossOn = "all"
    separator: str = "auto"
    workers: int | None = None
    template_variables: tuple[tuple[str, Any], ...] = ()
    template_date: str | None = None
    trust_blocks: bool = False

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise DataError(f"--seq-length {self.seq_length}: a document needs at least 2 tokens.")
        if self.workers is not None and self.workers < 0:
            raise DataError(
                f"--data-workers {self.workers}: expected 0 or more; leave it out for one a core."
            )
        if self.template_date is not None and self.day is None:
            raise DataError(
                f"--template-date {self.template_date}: expected a day as YYYY-MM-DD, such as 2026-01-31."
            )
        name = self.conversation_format
        if name is not None and name not in FORMATS and ":" not in name:
            raise DataError(
                f"--conversation-format {name}: unknown; known are {', '.join(FORMATS)}, or "
                "package.module:function."
            )

    @property
    def day(self) -> date | None:
        """``template_date`` as a date; None without one, or with one that is none."""
        try:
            return date.fromisoformat(self.template_date or "")
        except ValueError:
            return None


def tokenize_options(
    tokenizer: PreTrainedTokenizerBase, settings: PrepareOptions
) -> tuple[TokenizeOptions, dict[str, Any]]:
    """Resolve settings against a tokenizer, and run the template's self-test.

    Returns:
        The options for tokenising (``format`` is empty when it has to be detected), and facts for
        the report: mask method, stops, separator, warnings.

    Raises:
        DataError: the tokenizer, the template or an option cannot be used.
    """
    source, removed = keep_reasoning(template_source(tokenizer, settings.chat_template))
    special, added = added_tokens(tokenizer)
    names = special_tokens(tokenizer)
    backend = backend_json(tokenizer)
    template = ChatTemplate(source, names, dict(settings.template_variables), settings.day)
    if settings.trust_blocks and not template.has_generation:
        raise DataError(
            "--trust-generation-blocks: the chat template has no {% generation %} blocks. Leave it out."
        )
    day = template.day.isoformat() if template.day else ""
    report, rendered = _self_test(template, special, added, settings)
    report.require_usable()
    if report.stops and not report.stop_is_token:
        raise DataError(
            f"the chat template ends answers with {report.stops[0]!r}, which holds no token of the "
            f"tokenizer {tokenizer.name_or_path!r}: as ordinary text it joins with what follows and "
            "is half trained. Use the template's own tokenizer, or pass --chat-template FILE."
        )
    separator = choose_separator(tokenizer, settings.separator, source, rendered)
    warnings = []
    if not report.stops_last:
        warnings.append("the template writes no stop token after the last assistant turn")
    if settings.template_date and not day:
        warnings.append(f"--template-date {settings.template_date}: the chat template has no clock")
    options = TokenizeOptions(
        tokenizer=backend,
        special_tokens=names,
        special=special,
        added=added,
        template=source,
        variables=dict(settings.template_variables),
        format=settings.conversation_format or "",
        mapping=settings.format_options,
        seq_length=settings.seq_length,
        overlong=settings.overlong,
        on_bad_row=settings.on_bad_row,
        reasoning=settings.reasoning,
        loss_on=settings.loss_on,
        trust_blocks=settings.trust_blocks,
        separator=separator,
        day=day,
    )
    facts = {
        "format": settings.conversation_format,
        "mask_method": report.method,
        "stops": report.stops,
        "separator": separator,
        "template_date": day,
        "reasoning_parts_removed_from_template": removed,
        "warnings": warnings,
    }
    return options, facts


def _self_test(
    template: ChatTemplate,
    special: tuple[str, ...],
    added: dict[int, str],
    settings: PrepareOptions,
) -> tuple[TemplateReport, str]:
    finder = AnswerFinder(
        template,
        special,
        list(added.values()),
        reasoning=settings.reasoning,
        trust_blocks=settings.trust_blocks,
    )
    report = check_template(finder)
    first = next(probes()).conversation
    rendered = finder.find(first).text if report.usable else ""
    return report, rendered
