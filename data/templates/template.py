"""Rendering chat templates: compiled once, in Jinja's sandbox, ``{% generation %}`` blocks marked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache, partial
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace, missing

from data.errors import DataError, RowError
from data.rows.conversation import Message
from data.templates.marks import BLOCK_CLOSE, BLOCK_OPEN


class _GenerationBlocks(jinja2.ext.Extension):
    """The ``{% generation %}`` ... ``{% endgeneration %}`` tag: puts marks around its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Parse the tag into [mark, body, mark]; no scope is opened, so assignments carry on."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(text: str) -> jinja2.nodes.Node:
            data = jinja2.nodes.TemplateData(text).set_lineno(line)
            return jinja2.nodes.Output([data]).set_lineno(line)

        return [mark(BLOCK_OPEN), *body, mark(BLOCK_CLOSE)]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime(day: date, pattern: str) -> str:
    return datetime.combine(day, time()).strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which is not what models were trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _plain(value: Any) -> str:
    # Jinja's `safe` makes text of a kind that escapes what is joined to it, quotes as &#34;. No chat is
    # HTML: there is nothing to be safe from.
    return str(value)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with short cuts for the lookups that make up most of a rendering.

    The sandbox asks of every attribute whether it is safe. For the plain data and the few string
    methods below the answer is known; everything else takes the sandbox's own way.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute`` in a template."""
        kind = type(obj)
        if kind is dict:
            # Attributes come before items, but a message's keys are no attributes of dict.
            if attribute not in _DICT_ATTRIBUTES:
                value = obj.get(attribute, missing)
                return self.undefined(obj=obj, name=attribute) if value is missing else value
        elif kind is str:
            if attribute in _STRING_METHODS:
                return getattr(obj, attribute)
        elif kind is LoopContext:
            if attribute in _LOOP_ATTRIBUTES:
                return getattr(obj, attribute)
        elif kind is Namespace and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(
        self,
        context: Context,
        callee: Any,
        /,
        *arguments: Any,
        _loop_vars: Any = None,
        _block_vars: Any = None,
        **keywords: Any,
    ) -> Any:
        """Call something in a template; Jinja passes its scopes, for functions that ask for them."""
        if callee is Namespace or (
            type(callee) is BuiltinMethodType and type(callee.__self__) is str
        ):
            return callee(*arguments, **keywords)
        scopes = {"_loop_vars": _loop_vars, "_block_vars": _block_vars}
        return super().call(context, callee, *arguments, **scopes, **keywords)


_CLOCK = "strftime_now"
_DICT_ATTRIBUTES = frozenset(dir(dict))
_STRING_METHODS = frozenset(
    ("split", "strip", "lstrip", "rstrip", "startswith", "endswith", "replace", "lower", "upper")
)
_LOOP_ATTRIBUTES = frozenset(("index", "index0", "first", "last", "length"))


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.filters["safe"] = _plain
    environment.globals["raise_exception"] = _raise_exception
    # A rendering follows from its inputs: the clock is one of them, chance is none.
    environment.globals[_CLOCK] = partial(_strftime, date.min)
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


@lru_cache(maxsize=256)
def _compile(source: str) -> tuple[jinja2.Template, bool]:
    """The compiled template, and whether it has generation blocks."""
    environment = _environment()
    data = environment.parse(source).find_all(jinja2.nodes.TemplateData)
    has_generation = any(BLOCK_OPEN in text.data for text in data)
    return environment.from_string(source), has_generation


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        special_tokens: What templates may name, such as ``bos_token`` and ``eos_token``.
        variables: Further template variables, such as ``enable_thinking``.
        day: What the template's clock says, at midnight; None for today.

    Attributes:
        day: That day where the template asks for it, else None.

    Raises:
        DataError: the source is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        self.source = source
        self.day = (day or date.today()) if _CLOCK in source else None
        self.variables = {**(special_tokens or {}), **(variables or {})}
        # What ``tools`` is in a conversation without tools; a few templates need an empty list.
        self.no_tools: list[Any] | None = None
        try:
            self._template, self.has_generation = _compile(source)
        except jinja2.TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise DataError(
                f"--chat-template{line}: not a valid Jinja template ({error}). Fix the template."
            ) from error
        self._globals = {**self._template.globals, **self.variables}
        if self.day is not None:
            self._globals[_CLOCK] = partial(_strftime, self.day)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render a conversation, marks included.

        Raises:
            RowError: the template refuses or cannot render these messages.
        """
        variables = {
            **self._globals,
            "messages": messages,
            "tools": tools or self.no_tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # What Template.render does, without merging the same globals again for every row.
            template = self._template
            context = Context(template.environment, variables, template.name, template.blocks)
            return "".join(template.root_render_func(context))
        except jinja2.TemplateError as error:
            raise RowError("template refused", str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise RowError("template failed", detail) from error
        except RecursionError as error:
            raise RowError("template failed", "nested too deeply") from error
        except MemoryError as error:
            raise RowError("template failed", "it writes more than there is memory for") from error


def unread_variables(source: str, names: Iterable[str]) -> list[str]:
    """Those of some variables that a template's source does not name."""
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", source)]
