"""``python -m hvdlm supervise -- COMMAND``: a run that fails is started again, from its newest whole checkpoint.

What a run came to is read from its exit code and, since launchers may hide that, from ``RUN/status.json``. Every
attempt is a line of ``RUN/supervise.jsonl``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvdlm_launchers import hosts
from hvdlm_launchers.process_tree import Launched
from hvdlm_launchers.run_status import CODES, Standing, verdict
from hvdlm_launchers.settings import Settings, check, given, train_arguments

from hvdlm.config import Config

_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
_THEN = {"done": "that was it", "refused": "not started again", "stopped": "the same command goes on with it"}
_ONE = 1.0  # signals within so many seconds count as one: schedulers and shells often send more than one


def supervise(settings: Settings, command: list[str], read: Callable[[list[str]], Config]) -> int:
    """Run ``command`` until it is done, stopped, refused or given up; return the exit code.

    ``read``: makes a configuration from the arguments of ``python -m hvdlm train``.

    Raises:
        HvdlmError: the settings or the command don't do.
    """
    check(settings, command)
    program, config = [], None
    if settings.host_discovery_script is not None:
        program = hosts.script(settings.host_discovery_script)
        arguments = train_arguments(command)
        config = read(arguments) if arguments is not None else None
    return Supervisor(settings, command, program, config).run()


class _Again(Exception):
    """A second signal came: its number."""


class _GivenUp(Exception):
    """There is no sense in going on, with the reason."""


class Supervisor:
    """Starts attempts and judges them. ``script``: the words of the host-discovery script, or none."""

    def __init__(self, settings: Settings, command: list[str], script: list[str], config: Config | None) -> None:
        self._settings, self._given, self._script, self._config = settings, command, script, config
        self._folder = Path(settings.run or given(command, "log.run") or "runs/default")
        self._resume = given(command, "checkpoint.resume")
        self._first = Standing.of(self._folder)
        self._best, self._failures = self._first.checkpoint or 0, 0
        self._launched: Launched | None = None
        self._caught: list[int] = []
        self._caught_at = 0.0

    def run(self) -> int:
        """Return the exit code."""
        with self._signals():
            try:
                for number in itertools.count(1):
                    code = self._attempt(number)
                    if code is not None:
                        return code
            except _GivenUp as reason:
                _say(f"giving up: {reason}.")
                self._record(next="given up", reason=str(reason))
            except _Again as again:
                name = signal.Signals(again.args[0]).name
                _say(f"{name} again: the run is ended at once.")
                self._record(next="ended at once", reason=f"{name} again")
                return 128 + int(again.args[0])
            finally:
                if self._launched is not None:
                    self._launched.end()
        return CODES["failed"]

    def _attempt(self, number: int) -> int | None:
        """Make one attempt; return the exit code, or None where another one is to follow."""
        found = self._find_hosts()
        if found is None:
            return CODES["stopped"]
        before, began = Standing.of(self._folder), time.monotonic()
        command = self._command(number, before, *found)
        self._launched = Launched(command)
        code, early = self._watch(self._launched, before)
        errors, self._launched = self._launched.errors, None
        after = Standing.of(self._folder)
        status = after.status if after.status != before.status else {}
        state, reason = verdict(code, status, errors)
        ending, then = self._decide(state, after, early)
        seconds = time.monotonic() - began
        why = f": {reason}" if reason else ""
        told = f"{state} after {seconds:.0f} s, code {code}, step {after.step}{why.rstrip('.')}"
        _say(f"attempt {number} {told}; {then}.")
        facts = {"attempt": number, "command": command, "hosts": found[0], "np": found[1] or None, "code": code}
        facts |= {"state": state, "step_before": before.step, "step_after": after.step}
        if self._folder.is_dir() or state != "refused":  # a mistyped option leaves no folder behind
            self._record(**facts, seconds=round(seconds, 3), reason=reason, next=then)
        if ending is None:
            self._pause(self._delay())
        return ending

    def _watch(self, launched: Launched, before: Standing) -> tuple[int, bool]:
        """Wait for the end; return the exit code, and whether a signal ended the run before it had begun."""
        asked = early = False
        while launched.poll() is None:
            if self._caught and not asked:
                asked, name = True, signal.Signals(self._caught[0]).name
                early = Standing.of(self._folder).status == before.status
                if early:
                    _say(f"{name}: the run has not begun to train yet, it is ended.")
                    launched.end()
                else:
                    _say(f"{name}: the run is asked to save and to stop (again: it is ended at once).")
                    launched.stop()
            time.sleep(0.2)
        return launched.finish(), early

    def _decide(self, state: str, after: Standing, early: bool) -> tuple[int | None, str]:
        """Return the exit code, None for another attempt, and what happens next in words."""
        if state != "failed":
            return CODES[state], _THEN[state]
        if early:
            return CODES["stopped"], "nothing is lost, the same command goes on with it"
        if self._caught:
            return CODES["failed"], f"it was to stop and did not save, there is {after}"
        self._failures = 0 if after.step > self._best else self._failures + 1
        self._best = max(self._best, after.step)
        if self._failures >= self._settings.max_failures:
            return CODES["failed"], f"given up, {self._failures} without progress, there is {after}"
        return None, f"again in {self._delay():g} s with {after}"

    def _delay(self) -> float:
        return min(self._settings.max_backoff, self._settings.backoff * 2 ** max(0, self._failures - 1))

    def _command(self, number: int, before: Standing, found: dict[str, int], count: int) -> list[str]:
        """Return the command of an attempt: hosts and ranks filled in, going on from what is there."""
        places = ",".join(f"{host}:{slots}" for host, slots in found.items())
        filled = self._given
        if found:
            filled = [word.replace("{hosts}", places).replace("{np}", str(count)) for word in filled]
        if number == 1 and before.checkpoint is None:
            return filled  # whether the folder may be written is the run's own to say
        if self._resume not in (None, "none", "auto") and before.written == self._first.written:
            return [*filled, "--log.overwrite", "false"]  # nothing was saved meanwhile: from where the user said
        return [*filled, "--checkpoint.resume", "auto", "--log.overwrite", "false"]

    def _find_hosts(self) -> tuple[dict[str, int], int] | None:
        """Return hosts that answer and how many ranks to start; ({}, 0) without a script; None: a signal came.

        Raises:
            _GivenUp: there were too few for too long.
        """
        delay, until = max(self._settings.backoff, 0.1), time.monotonic() + self._settings.max_wait
        found: dict[str, int] = {}
        count = 0
        while self._script and not count and not self._caught:
            try:
                listed = hosts.discover(self._script, self._settings.slots_per_host)
                found = hosts.answering(listed, self._settings.probe)
                count = hosts.ranks(sum(found.values()), self._config, self._settings.min_ranks)
            except hosts.NoHosts as reason:
                if time.monotonic() + delay > until:
                    raise _GivenUp(f"no hosts to start on for {self._settings.max_wait:g} s: {reason}") from None
                _say(f"{str(reason).rstrip('.')}; asking again in {delay:g} s.")
                self._pause(delay)
                delay = min(self._settings.max_backoff, 2 * delay)
        return None if self._stopped() else (found, count)

    def _pause(self, seconds: float) -> None:
        """Wait, at most until a signal comes."""
        until = time.monotonic() + seconds
        while not self._caught and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _stopped(self) -> bool:
        """Return whether a signal came between attempts, and say so."""
        if self._caught:
            _say(f"{signal.Signals(self._caught[0]).name}: nothing runs now, the same command goes on from here.")
        return bool(self._caught)

    def _record(self, **facts: Any) -> None:
        """Append a line to ``supervise.jsonl``; a folder that can't be written is told, and no reason to end."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "supervise.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **facts}) + "\n")
        except OSError as error:
            _say(f"{self._folder}/supervise.jsonl could not be written: {error.strerror}.")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Catch signals meanwhile; SIGHUP too, unless it is ignored (nohup)."""
        numbers = [*_SIGNALS, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
        before = {number: signal.signal(number, self._catch) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self._caught and time.monotonic() - self._caught_at < _ONE:
            return
        self._caught_at = time.monotonic()
        self._caught.append(number)
        if len(self._caught) == 2:
            raise _Again(number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"hvdlm supervise: {text}", file=sys.stderr, flush=True)
