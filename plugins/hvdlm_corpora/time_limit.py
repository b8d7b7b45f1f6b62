"""Limits the processor time in which a tokenizer encodes a text: some patterns take hours for a megabyte."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown

Result = TypeVar("Result")
_SECONDS, _SECONDS_PER_MB = 10.0, 10.0  # of processor time for a text: 20 times what slow tokenizers take
_CHECK_SECONDS = 0.5


class TooSlow(HvdlmError):
    """A text took longer to encode than any useful tokenizer does; ``label``: the text's."""

    label: Any = None


def limited(size: int, action: Callable[[], Result], description: Any) -> Result:
    """Return the result of ``action``, in which the tokenizer of ``description`` reads or writes ``size`` characters.

    Processor time is limited, so that a machine that is busy with other work has no effect. The library can't be
    interrupted: a thread that takes too long is left behind, and ends with the process.

    Raises:
        TooSlow: it takes too long. A pattern such as ``a(?=a*b)`` takes hours for a megabyte of ``a``.
    """
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(action())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    limit = _SECONDS + _SECONDS_PER_MB * size / 1e6
    began = time.process_time()
    thread.start()
    while thread.is_alive():
        thread.join(_CHECK_SECONDS)
        if thread.is_alive() and time.process_time() - began > limit:
            patterns = shown(", ".join(_patterns(description)) or "none", 200)
            raise TooSlow(
                f"the tokenizer takes more than {limit:.0f} s for {size:,} characters: use another tokenizer, or leave "
                f"the text out. Its patterns: {patterns}."
            )
    return result.result()


def _patterns(value: Any) -> list[str]:
    """Return the regular expressions in a tokenizer's description."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value["Regex"]] if isinstance(value, dict) and isinstance(value.get("Regex"), str) else []
    return own + [pattern for item in items for pattern in _patterns(item)]
