"""How rows become documents: the options as a user gives them, and what a tokenizer makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.images.layout import ImageLayout
from data.masking.answers import AnswerFinder, LossOn, Reasoning
from data.masking.template_check import TemplateReport, check_template, probes
from data.rows.converters import FormatOptions
from data.rows.plain import PLAIN_FORMATS
from data.rows.registry import FORMAT_NAMES, require_keys_of_use
from data.templates.reasoning import keep_reasoning
from data.templates.separator import choose_separator
from data.templates.template import ChatTemplate, unread_variables
from data.templates.tokenizer_facts import (
    added_tokens,
    backend_json,
    special_tokens,
    template_source,
    text_frame,
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
        max_rows: Read only so many rows of each source, the first; None for all.
        dataset_template: A template of the dataset's own, for tokenizers that have none.
        trust_blocks: Take the template's generation blocks as they are.
        images: The image processor's layout, or why there is none.
        image_cache: Folder of pictures that rows embed; None where none are kept.
        max_prompt_length: Most tokens before the first trained one; None for any number.
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
    max_rows: int | None = None
    dataset_template: str | None = None
    template_date: str | None = None
    trust_blocks: bool = False
    images: ImageLayout | str = "a model of text cannot be trained on them"
    image_cache: str | None = None
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise DataError(f"--seq-length {self.seq_length}: a document needs at least 2 tokens.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise DataError(f"--max-prompt-length {self.max_prompt_length}: expected 1 or more.")
        if self.workers is not None and self.workers < 0:
            raise DataError(
                f"--data-workers {self.workers}: expected 0 or more; leave it out for one a core."
            )
        if self.template_date is not None and self.day is None:
            raise DataError(
                f"--template-date {self.template_date}: expected a day as YYYY-MM-DD, such as 2026-01-31."
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise DataError(
                f"--max-rows {self.max_rows}: expected 1 or more; leave it out for all."
            )
        name = self.conversation_format
        if name is not None and name not in FORMAT_NAMES and ":" not in name:
            raise DataError(
                f"--conversation-format {name}: unknown; known are {', '.join(FORMAT_NAMES)}, or "
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
    if settings.conversation_format in PLAIN_FORMATS:
        separator = choose_separator(tokenizer, settings.separator, "", "")
        options = _options(tokenizer, settings, "", separator)
        return options, {**plain_facts(options), "separator": separator, "warnings": []}
    own = settings.chat_template
    if own is None and not tokenizer.chat_template:
        own = settings.dataset_template
    source, removed = keep_reasoning(template_source(tokenizer, own))
    special, added = added_tokens(tokenizer)
    names = special_tokens(tokenizer)
    template = ChatTemplate(source, names, dict(settings.template_variables), settings.day)
    if settings.trust_blocks and not template.has_generation:
        raise DataError(
            "--trust-generation-blocks: the chat template has no {% generation %} blocks. Leave it out."
        )
    day = template.day.isoformat() if template.day else ""
    report, rendered = _checked_template(template, special, added, settings)
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
    unread = unread_variables(source, [name for name, _ in settings.template_variables])
    if unread:
        warnings.append(
            f"--chat-template-variables: the chat template has no variable {', '.join(unread)}"
        )
    options = _options(tokenizer, settings, source, separator, day)
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


def plain_facts(options: TokenizeOptions) -> dict[str, Any]:
    """Facts for the report of a source of a format of PLAIN_FORMATS.

    Raises:
        DataError: an option or the tokenizer is of no use for it.
    """
    name = options.format
    for flag, value, default in (
        ("--loss-on", options.loss_on, "all"),
        ("--reasoning", options.reasoning, "keep"),
    ):
        if value != default:
            raise DataError(
                f"{flag} {value}: rows of the format {name} have no turns; leave the flag out."
            )
    require_keys_of_use(name, options.mapping)
    if name == "text" and options.text_end is None:
        raise DataError(
            "rows of the format text end with the tokenizer's end-of-text token, and it has none: set "
            "eos_token in its tokenizer_config.json."
        )
    return {
        "format": name,
        "mask_method": "all tokens" if name == "text" else "the rows' own labels",
        "stops": [options.added.get(options.text_end, "")] if options.text_end is not None else [],
        "reasoning_parts_removed_from_template": 0,
    }


def _options(
    tokenizer: PreTrainedTokenizerBase,
    settings: PrepareOptions,
    source: str,
    separator: int | None,
    day: str = "",
) -> TokenizeOptions:
    special, added = added_tokens(tokenizer)
    prefix, end = text_frame(tokenizer)
    return TokenizeOptions(
        tokenizer=backend_json(tokenizer),
        special_tokens=special_tokens(tokenizer),
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
        max_prompt_length=settings.max_prompt_length,
        **_image_options(settings),
        separator=separator,
        text_prefix=prefix,
        text_end=end,
        day=day,
    )


def _image_options(settings: PrepareOptions) -> dict[str, Any]:
    if isinstance(settings.images, str):
        return {"no_images": settings.images}
    return {"images": settings.images, "image_cache": settings.image_cache or ""}


def _checked_template(
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
