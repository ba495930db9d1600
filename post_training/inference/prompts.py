"""Prompts, rendered and tokenised as training renders its rows: same template, forms and variables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from data.errors import RowError
from data.masking.refusals import reason_once
from data.prepare.splits import parse_variables
from data.rows.conversation import Conversation
from data.templates.forms import MessageForms
from data.templates.marks import BLOCK_CLOSE, BLOCK_OPEN, split_marks
from data.templates.reasoning import keep_reasoning
from data.templates.template import ChatTemplate
from data.templates.tokenizer_facts import special_tokens, template_source
from post_training.errors import SetupError


class Prompts:
    """Writes conversations up to where the assistant begins to answer.

    Args:
        tokenizer: the HuggingFace tokenizer, whose template it is.
        variables: template variables of all conversations.
        day: what the template's clock says; None for today.
    """

    def __init__(
        self, tokenizer: Any, variables: Mapping[str, Any] | None = None, day: date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.variables, self.day = dict(variables or {}), day
        self._source = ""
        # Variables of a conversation may change the forms that the template wants.
        self._forms: dict[str, MessageForms] = {}

    def _forms_for(self, variables: Mapping[str, Any]) -> MessageForms:
        """The template with these variables, and what it wants.

        Raises:
            DataError: there is no template, or it is not valid.
        """
        key = json.dumps(variables, sort_keys=True)
        if key not in self._forms:
            if not self._source:
                self._source = keep_reasoning(template_source(self.tokenizer, None))[0]
            named = special_tokens(self.tokenizer)
            template = ChatTemplate(self._source, named, {**self.variables, **variables}, self.day)
            self._forms[key] = MessageForms(template)
        return self._forms[key]

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation, without its answer, and of what begins the answer.

        Raises:
            RowError: the template refuses it.
            DataError: the tokenizer has no template.
        """
        forms = self._forms_for(conversation.variables)
        said = forms.apply(forms.open_thinking(reason_once(conversation.messages)))
        marked = forms.template.render(said, conversation.tools, add_generation_prompt=True)
        text = split_marks(marked, BLOCK_OPEN, BLOCK_CLOSE)[0]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_turns(self, *messages: dict[str, Any]) -> list[int]:
        """The same of some messages.

        Raises:
            SetupError: the template refuses them.
        """
        try:
            return self.encode(Conversation(list(messages)))
        except RowError as error:
            raise SetupError(f"the chat template does not take this prompt ({error})") from error


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `open_prompts` reads."""
    parser.add_argument(
        "--chat-template-variables",
        metavar="JSON",
        help="template variables, as finetune.py takes them (default: those of the run, if there is one)",
    )
    parser.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="what a template's clock says (default: what the run's said, else today)",
    )


def open_prompts(
    options: argparse.Namespace, tokenizer: Any, run: argparse.Namespace | None
) -> Prompts:
    """Prompts as the flags say, and where they say nothing as the run did.

    Args:
        options: of a parser with `add_template_flags`.
        tokenizer: the model's.
        run: arguments of the run that trained the model, where they are known.

    Raises:
        DataError: a flag has a value that it does not take.
        SetupError: likewise.
    """
    given, day = options.chat_template_variables, options.template_date
    if run is not None:
        given = run.chat_template_variables if given is None else given
        day = run.template_date if day is None else day
    try:
        parsed = None if day is None else date.fromisoformat(day)
    except ValueError as error:
        raise SetupError(
            f"--template-date {day}: expected a day as YYYY-MM-DD, such as 2026-01-31"
        ) from error
    return Prompts(tokenizer, dict(parse_variables(given)), parsed)
