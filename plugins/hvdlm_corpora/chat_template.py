"""Chat templates: Jinja templates that write a conversation as a text, as Hugging Face transformers does.

A template may mark what the assistant generates, ``{% generation %}...{% endgeneration %}``. Without that, each turn of
the assistant is what the text of the conversation up to it has more than that of the turns before, with a generation
prompt. Templates are untrusted: ``conversations.py`` renders them in a process with bounded memory and time.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hvdlm.io.untrusted_input import shown

# Around what a template generates; no text can have them by chance, or know them.
_BEGIN, _END = (f"\ue000{uuid.uuid4().hex}" for _ in range(2))
Message = Mapping[str, Any]
Ranges = list[tuple[int, int]]


class _Generation(Extension):
    """The statement ``generation``, which marks what the assistant generates."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class ChatTemplate:
    """A chat template.

    Args:
        text: in Jinja.
        variables: what the template knows beside the messages: ``bos_token``, ``eos_token``, ...

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        # As transformers compiles them, but for strftime_now: what a text becomes doesn't depend on the day.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise ValueError(shown(str(error), 150)) from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str, Ranges]:
        """Return the text of ``messages``, and the ranges of characters that the template marks as generated.

        ``prompt``: whether the text ends with the beginning of a turn of the assistant.

        Raises:
            ValueError: the template fails.
        """
        try:
            text = self._template.render(messages=messages, add_generation_prompt=prompt, tools=None, **self._variables)
        except MemoryError:
            raise ValueError("it takes too much memory") from None
        except Exception as error:  # whatever an expression of the template raises
            raise ValueError(shown(str(error) or type(error).__name__, 150)) from error
        return _without_marks(text)

    def targets(self, messages: Sequence[Message]) -> tuple[str, Ranges]:
        """Return the text of ``messages``, and the ranges of characters that are turns of the assistant.

        Raises:
            ValueError: the template fails, or it is not known where the turns are.
        """
        text, ranges = self.render(messages)
        if ranges:
            return text, ranges
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.render(messages[:number], prompt=True)
            until, _ = self.render(messages[: number + 1])
            if not (text.startswith(until) and until.startswith(before)):
                raise ValueError(
                    f"the text up to turn {number + 1} is not how the whole text begins: mark the assistant's turns in "
                    "it with {% generation %}"
                )
            if len(until) <= len(before):
                raise ValueError(f"turn {number + 1}, of the assistant, adds no text to the generation prompt")
            ranges.append((len(before), len(until)))
        return text, ranges


def _without_marks(text: str) -> tuple[str, Ranges]:
    """Return a rendered text without marks, and the ranges between them."""
    before, *marked = text.split(_BEGIN)
    whole, ranges = before.replace(_END, ""), []
    for segment in marked:
        inside, _, after = segment.partition(_END)
        ranges += [(len(whole), len(whole) + len(inside))] if inside else []
        whole += inside + after.replace(_END, "")
    return whole, ranges


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML


def _raise(message: str) -> None:
    raise TemplateError(message)
