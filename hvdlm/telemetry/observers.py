"""Calls the event hooks of plugins so that one which only observes a run can't end it.

- An OSError (a full disk, a server that is gone) is reported once for each plugin; the plugin is called again at the
  next event, for the disk or the server may recover.
- Any other exception ends the run, unless the plugin declares ``observer = True``: then it is reported once, and of
  the later events the plugin receives only the end of the run.
- Where a plugin declares ``observer = False``, every exception ends the run.

HvdlmError, RankError and errors of the transport always end the run.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pluggy

from hvdlm.diagnostics.abort import is_transport_error
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io.terminal import SurvivingStream

EVENTS = ("run_started", "step_ended", "evaluated", "checkpoint_saved", "rolled_back", "run_ended")


class Observers:
    """The event hooks of one run on this rank. ``warnings``: the sentences that were printed."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._reported: set[int] = set()
        self._detached: set[int] = set()
        self.warnings: list[str] = []

    def protect_run(self, manager: pluggy.PluginManager) -> None:
        """Make standard output and the event hooks of all plugins that are registered follow the rules."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, SurvivingStream):
                stream.is_result = False
                stream.on_error = self._report_stream
                if stream.error is not None:
                    self._report_stream(stream.error)
        for event in EVENTS:
            for implementation in getattr(manager.hook, f"hvdlm_{event}").get_hookimpls():
                if getattr(implementation.plugin, "observer", None) is not False:
                    implementation.function = self._protected(implementation, last=event == "run_ended")

    def warn(self, sentence: str) -> None:
        """Print a sentence on standard error, and keep it for ``status.json``."""
        self.warnings.append(sentence)
        prefix = f"rank {self._rank}: " if self._rank else ""
        print(f"hvdlm: {prefix}{sentence}", file=sys.stderr, flush=True)

    def warn_once(self, sentence: str) -> None:
        """Print a sentence that was not printed yet."""
        if sentence not in self.warnings:
            self.warn(sentence)

    def _protected(self, implementation: Any, last: bool) -> Callable[..., Any]:
        call, plugin = implementation.function, implementation.plugin
        absorbed = Exception if getattr(plugin, "observer", None) else OSError

        @functools.wraps(call)
        def protected(*arguments: Any) -> Any:
            if id(plugin) in self._detached and not last:
                return None
            try:
                return call(*arguments)
            except absorbed as error:
                if isinstance(error, (HvdlmError, RankError)) or is_transport_error(error):
                    raise
                self._report(implementation, error)
                return None

        return protected

    def _report_stream(self, error: OSError) -> None:
        self.warn_once(f"what is printed can't be written: {error.strerror}. Training continues without it.")

    def _report(self, implementation: Any, error: Exception) -> None:
        key, name = id(implementation.plugin), implementation.plugin_name
        name = type(implementation.plugin).__name__ if name == str(key) else name
        if not isinstance(error, OSError):
            self._detached.add(key)
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{name} ({where.filename}:{where.lineno})"
        if key not in self._reported:
            self._reported.add(key)
            self.warn(f"{name}: {type(error).__name__}: {error}. Training continues without what it writes.")
