"""Conversations as texts: finds a tokenizer's chat template, and renders it in a process of bounded resources."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hvdlm.config import DataConfig
from hvdlm.data.token_files import is_prepared
from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import workers
from hvdlm_corpora.documents import MarkedText, Texts

_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_LIMIT = 1 << 22  # bytes of a template, and of the settings of a tokenizer
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_MEMORY = 1 << 30  # bytes that rendering may take
_SECONDS = 10  # of processor time for one conversation: 1,000 times what long ones take
_BATCH = 64  # conversations that are rendered at a time
_ADVICE = "check --data.chat_template"


class Template(NamedTuple):
    """The text of a chat template, where it is from, and the special tokens that it knows, by their names in it."""

    text: str
    path: str
    variables: tuple[tuple[str, str], ...]

    @property
    def hash(self) -> str:
        """SHA-256 of what decides on the texts."""
        return hashlib.sha256(json.dumps([self.text, self.variables]).encode()).hexdigest()


def find(*corpora: DataConfig) -> Template:
    """Return the chat template of one or more corpora.

    It is that of ``data.chat_template``, or lies in the prepared folder, or else beside the tokenizer.

    Raises:
        HvdlmError: there is none, it can't be read, or the corpora have different ones.
    """
    templates = {template.hash: template for template in map(_of, corpora) if template}
    if not templates:
        raise HvdlmError(
            f"data.chat: the tokenizer {corpora[0].tokenizer} has no chat template beside it ({_TEMPLATE}, or in "
            f"{_SETTINGS}): name a file (--data.chat_template FILE)."
        )
    first, *others = templates.values()
    if others:
        raise HvdlmError(
            f"data.chat_template: the mixture has several, {first.path} and {others[0].path}: name one of them "
            "(--data.chat_template FILE)."
        )
    return first


def _of(config: DataConfig) -> Template | None:
    """Return the chat template of one corpus; None: there is none."""
    folders = [Path(config.paths[0])] if is_prepared(config.paths) else []
    if os.path.isfile(config.tokenizer):
        folders.append(Path(config.tokenizer).parent)
    if config.chat_template is None:
        return next(filter(None, map(_beside, folders)), None)
    path = Path(config.chat_template)
    text = _decoded(path)
    settings = next(filter(None, (_settings(folder) for folder in (*folders, path.parent))), {})
    return _template(text, path, settings)


def _beside(folder: Path) -> Template | None:
    """Return the chat template of a tokenizer's or a prepared folder; None: it has none."""
    settings, path = _settings(folder), folder / _TEMPLATE
    if path.exists():
        return _template(_decoded(path), path, settings)
    text = _named(settings.get("chat_template"))
    return _template(text, folder / _SETTINGS, settings) if isinstance(text, str) else None


def _template(text: str, path: Path, settings: Mapping[str, Any]) -> Template:
    return Template(text, str(path), tuple(sorted(_special(settings).items())))


def files_of(template: Template) -> dict[str, str]:
    """Return the content of the files, by their names, from which ``find`` makes the same template again."""
    return {_TEMPLATE: template.text, _SETTINGS: json.dumps(dict(template.variables))}


def _decoded(path: Path) -> str:
    with _readable(path):
        return text_decoding.decode(untrusted_input.read(path, _LIMIT))


def _settings(folder: Path) -> Mapping[str, Any]:
    path = folder / _SETTINGS
    with _readable(path):
        settings = untrusted_input.read_json(path, _LIMIT) if path.exists() else {}
    return settings if isinstance(settings, dict) else {}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise HvdlmError, which names the file, where reading it fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HvdlmError(f"data.chat_template: {path}: {shown(reason, 200)}: name another file.") from error


def _named(value: Any) -> Any:
    """Return a template of tokenizer_config.json; of a list of named ones, the default."""
    if isinstance(value, list):
        named = [one.get("template") for one in value if isinstance(one, dict) and one.get("name") == "default"]
        return named[0] if named else None
    return value


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the spelling of special tokens by their names."""
    values = {name: settings.get(name) for name in _TOKENS}
    tokens = {name: one.get("content") if isinstance(one, dict) else one for name, one in values.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


class ChatWriter:
    """Writes conversations as texts by a template (``documents.Conversations``)."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def written(self, source: str, values: Texts) -> Texts:
        """Yield the text of each conversation, of which the assistant's turns are targets; None stays None.

        Raises:
            HvdlmError: a value is no conversation, or the template fails.
        """
        while batch := list(islice(values, _BATCH)):
            chats = [_messages(source, value, end.number) for value, end in batch if value is not None]
            numbers = [end.number for value, end in batch if value is not None]
            where = f"data.path {source}, record {{}}"
            texts = iter(self._rendered(where, numbers, chats, False) if chats else [])
            yield from ((None if value is None else next(texts), end) for value, end in batch)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation that the assistant continues.

        Raises:
            HvdlmError: the template fails.
        """
        try:
            return self._rendered("the prompt{}", [""], [list(messages)], True)[0].text
        finally:
            close()

    def _rendered(self, where: str, numbers: Sequence[object], chats: list[Any], prompt: bool) -> list[MarkedText]:
        try:
            results = _pool(self._template).submit(_render, chats, prompt).result()
        except BrokenProcessPool as error:
            close()
            between = " or one of the next 63" if len(chats) > 1 else ""
            raise HvdlmError(
                f"{where.format(numbers[0])}{between}: the chat template {self._template.path} takes more than "
                f"{_SECONDS} s or {_MEMORY >> 20} MiB: {_ADVICE}."
            ) from error
        texts = []
        for number, result in zip(numbers, results, strict=False):
            if isinstance(result, str):
                raise HvdlmError(
                    f"{where.format(number)}: the chat template {self._template.path} fails ({result}): {_ADVICE}."
                )
            texts.append(MarkedText(result[0], tuple(result[1])))
        return texts


def _messages(source: str, value: Any, number: int) -> list[dict[str, Any]]:
    """Return a conversation, after checking what every template reads of its messages."""
    messages = value if isinstance(value, list) else []
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or not (isinstance(content, str) or (content is None and len(message) > 2)):
            messages = []
            break
    if not messages:
        raise HvdlmError(
            f"data.path {source}: record {number} holds no conversation: {shown(repr(value))}, expected a list like "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        )
    # In a table, a message has all fields that any has: those that are null don't count.
    messages = [{key: item for key, item in message.items() if item is not None} for message in messages]
    return [_clean(message) for message in messages]


def _clean(value: Any) -> Any:
    """Return a JSON value without lone surrogates, which no text in UTF-8 has."""
    if isinstance(value, str):
        return text_decoding.without_surrogates(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


# The process


_open: dict[Template, ProcessPoolExecutor] = {}  # at most one


def _pool(template: Template) -> ProcessPoolExecutor:
    """Return the process that renders a template; it is started where there is none."""
    if template not in _open:
        close()
        _open[template] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (template,))
    return _open[template]


def close() -> None:
    """End the process that renders a template, if there is one."""
    while _open:
        _open.popitem()[1].shutdown()


_own: Any = None  # of the process that renders: its template, later compiled


def _begin(template: Template) -> None:
    """Initialise the process."""
    global _own
    workers.end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    _own = template


def _render(chats: Iterable[Any], prompt: bool) -> list[Any]:
    """Return (text, ranges of targets) of each conversation; what is wrong in place of the first one that fails."""
    global _own
    from hvdlm_corpora.chat_template import ChatTemplate

    results: list[Any] = []
    try:
        _limit_seconds()
        if isinstance(_own, Template):
            _own = ChatTemplate(_own.text, dict(_own.variables))
        for chat in chats:
            _limit_seconds()
            results.append(_own.render(chat, True) if prompt else _own.targets(chat))
    except MemoryError:
        results.append("it takes too much memory")
    except ValueError as error:
        results.append(str(error))
    return results


def _limit_seconds() -> None:
    """End this process after some more seconds of processor time: a template may loop for ever."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + _SECONDS + 1, resource.RLIM_INFINITY))
