"""Runs a command, and restarts it from the newest whole checkpoint when it fails (``python -m hvdlm supervise``).

How an attempt ended is read from its exit code and, since launchers may hide that, from ``RUN/status.json``. Every
attempt is a line of ``RUN/supervise.jsonl``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlm.config import Config
from hvdlm.io.safe_files import append
from hvdlm.io.terminal import printable
from hvdlm_launchers import hosts
from hvdlm_launchers.process_tree import ProcessTree, handling_signals
from hvdlm_launchers.run_status import CODES, RunStatus, outcome
from hvdlm_launchers.settings import Settings, check
from hvdlm_launchers.train_command import option_value, train_arguments

_CONSEQUENCE = {
    "done": "finished",
    "refused": "not started again",
    "stopped": "{again} resumes it",
}
_REPEAT_SECONDS = 1.0  # signals closer together count as one: schedulers and shells often send more than one


def supervise(settings: Settings, command: list[str], read: Callable[[list[str]], Config]) -> int:
    """Run ``command`` until it is done, stopped, refused or given up; return the exit code.

    ``read``: parses the arguments of ``python -m hvdlm train``.

    Raises:
        HvdlmError: the settings or the command are wrong.
    """
    check(settings, command)
    script: list[str] = []
    config = None
    if settings.host_discovery_script is not None:
        script = hosts.script(settings.host_discovery_script)
        arguments = train_arguments(command)
        config = read(arguments) if arguments is not None else None
    return Supervisor(settings, command, script, config).run()


class _SecondSignal(Exception):
    """A second signal arrived; carries its number."""


class _GiveUp(Exception):
    """There is no point in another attempt; carries the reason."""


class Supervisor:
    """Starts attempts, and decides after each of them. ``script``: words of the host-discovery script, or empty."""

    def __init__(self, settings: Settings, command: list[str], script: list[str], config: Config | None) -> None:
        self._settings = settings
        self._user_command = command
        self._script = script
        self._config = config
        self._folder = Path(settings.run or option_value(command, "log.run") or "runs/default")
        self._resume = option_value(command, "checkpoint.resume")
        self._initial = RunStatus.of(self._folder)
        self._named = self._resume not in (None, "none", "auto")
        self._best_step = 0 if self._named else self._initial.checkpoint or 0
        self._failures = 0
        self._processes: ProcessTree | None = None
        self._signals_received: list[int] = []
        self._signal_time = 0.0

    def run(self) -> int:
        """Make attempts until one is the last; return the exit code."""
        with handling_signals(self._on_signal):
            try:
                for number in itertools.count(1):
                    code = self._attempt(number)
                    if code is not None:
                        return code
            except _GiveUp as reason:
                _log(f"giving up: {reason}.")
                self._record(next="given up", reason=str(reason))
            except _SecondSignal as second:
                name = signal.Signals(second.args[0]).name
                _log(f"{name} again: the run is ended at once.")
                self._record(next="ended at once", reason=f"{name} again")
                return 128 + int(second.args[0])
            finally:
                if self._processes is not None:
                    self._processes.terminate()
        return CODES["failed"]

    def _attempt(self, number: int) -> int | None:
        """Make one attempt; return the exit code, or None if another attempt follows."""
        allocation = self._find_hosts()
        if allocation is None:
            return CODES["stopped"]
        slots, ranks = allocation
        before = RunStatus.of(self._folder)
        started = time.monotonic()
        command = self._command(number, before, slots, ranks)
        self._processes = ProcessTree(command)
        code, ended_early = self._wait(self._processes, before)
        errors, self._processes = self._processes.errors, None
        after = RunStatus.of(self._folder)
        status = after.status if after.status != before.status else {}
        state, reason = outcome(code, status, errors)
        exit_code, consequence = self._decide(state, after, ended_early)
        seconds = time.monotonic() - started
        cause = f": {reason}" if reason else ""
        result = f"{state} after {seconds:.0f} s, code {code}, step {after.step}{cause.rstrip('.')}"
        _log(f"attempt {number} {result}; {consequence}.")
        facts = {"attempt": number, "command": command, "hosts": slots, "np": ranks or None, "code": code}
        facts |= {"state": state, "step_before": before.step, "step_after": after.step}
        if self._folder.is_dir() or state != "refused":  # a mistyped option must not create the run's folder
            self._record(**facts, seconds=round(seconds, 3), reason=reason, next=consequence)
        if exit_code is None:
            self._sleep(self._delay())
        return exit_code

    def _wait(self, processes: ProcessTree, before: RunStatus) -> tuple[int, bool]:
        """Wait for the end; return the exit code, and whether a signal ended the run before it began to train."""
        stop_requested = ended_early = False
        while processes.poll() is None:
            if self._signals_received and not stop_requested:
                stop_requested = True
                name = signal.Signals(self._signals_received[0]).name
                ended_early = RunStatus.of(self._folder).status == before.status
                if ended_early:
                    _log(f"{name}: the run has not begun to train yet, it is ended.")
                    processes.terminate()
                else:
                    _log(f"{name}: the run is asked to save and stop (a second signal ends it at once).")
                    processes.request_stop()
            time.sleep(0.2)
        return processes.finish(), ended_early

    def _decide(self, state: str, after: RunStatus, ended_early: bool) -> tuple[int | None, str]:
        """Return the exit code (None: make another attempt), and a phrase that says what happens next."""
        if state != "failed":
            return CODES[state], _CONSEQUENCE[state].format(again=self._again(after))
        if ended_early:
            return CODES["stopped"], f"nothing is lost, {self._again(after)} resumes it"
        if self._signals_received:
            return CODES["failed"], f"it was asked to stop and did not save, there is {after}"
        step = self._reached(after)
        self._failures = 0 if step > self._best_step else self._failures + 1
        self._best_step = max(self._best_step, step)
        if self._failures >= self._settings.max_failures:
            return CODES["failed"], f"given up, {self._failures} without progress, there is {after}"
        return None, f"restart in {self._delay():g} s with {after}"

    def _again(self, after: RunStatus) -> str:
        """Return the command that resumes from what the attempts have saved."""
        goes_back = self._named and self._has_saved(after)
        return "the command with --checkpoint.resume auto" if goes_back else "the same command"

    def _delay(self) -> float:
        return min(self._settings.max_backoff, self._settings.backoff * 2 ** max(0, self._failures - 1))

    def _command(self, number: int, before: RunStatus, slots: dict[str, int], ranks: int) -> list[str]:
        """Return the command of an attempt: hosts and ranks filled in, with the options that make it resume."""
        command = self._user_command
        if slots:
            listing = ",".join(f"{host}:{count}" for host, count in slots.items())
            command = [word.replace("{hosts}", listing).replace("{np}", str(ranks)) for word in command]
        if number == 1 and before.checkpoint is None:
            return command  # the run itself decides whether its folder may be overwritten
        if self._named and not self._has_saved(before):
            return [*command, "--log.overwrite", "false"]  # nothing new was saved: resume where the user said
        return [*command, "--checkpoint.resume", "auto", "--log.overwrite", "false"]

    def _reached(self, after: RunStatus) -> int:
        """Return the last step that the attempts reached; later steps from before they were resumed don't count."""
        changes: dict[str, Any] = {"status": {}} if after.status == self._initial.status else {}
        if self._named and after.sequence == self._initial.sequence:
            changes["checkpoint"] = None
        return replace(after, **changes).step

    def _has_saved(self, status: RunStatus) -> bool:
        """Return whether an attempt has saved: the newest checkpoint is newer than all before the first attempt."""
        return status.checkpoint is not None and (
            self._initial.checkpoint is None or status.sequence > self._initial.sequence
        )

    def _find_hosts(self) -> tuple[dict[str, int], int] | None:
        """Return slots by reachable host and the number of ranks; ({}, 0) without a script; None: a signal arrived.

        Raises:
            _GiveUp: there were too few hosts for too long.
        """
        delay = max(self._settings.backoff, 0.1)
        deadline = time.monotonic() + self._settings.max_wait
        slots: dict[str, int] = {}
        ranks = 0
        while self._script and not ranks and not self._signals_received:
            try:
                discovered = hosts.discover(self._script, self._settings.slots_per_host)
                slots = hosts.reachable(discovered, self._settings.probe)
                ranks = hosts.usable_ranks(sum(slots.values()), self._config, self._settings.min_ranks)
            except hosts.NoHosts as reason:
                if time.monotonic() + delay > deadline:
                    raise _GiveUp(f"no hosts to start on for {self._settings.max_wait:g} s: {reason}") from None
                _log(f"{str(reason).rstrip('.')}; asking again in {delay:g} s.")
                self._sleep(delay)
                delay = min(self._settings.max_backoff, 2 * delay)
        if self._signals_received:
            name = signal.Signals(self._signals_received[0]).name
            again = self._again(RunStatus.of(self._folder))
            _log(f"{name}: no attempt is running, {again} resumes the run.")
            return None
        return slots, ranks

    def _sleep(self, seconds: float) -> None:
        """Sleep, at most until a signal arrives."""
        deadline = time.monotonic() + seconds
        while not self._signals_received and (remaining := deadline - time.monotonic()) > 0:
            time.sleep(min(remaining, 0.2))

    def _record(self, **facts: Any) -> None:
        """Append a line to ``supervise.jsonl``; if the folder can't be written, warn and continue."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with append(self._folder / "supervise.jsonl") as file:
                file.write(json.dumps({"time": time.time(), **facts}) + "\n")
        except OSError as error:
            _log(f"{self._folder}/supervise.jsonl could not be written: {error.strerror}.")

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signals_received and time.monotonic() - self._signal_time < _REPEAT_SECONDS:
            return
        self._signal_time = time.monotonic()
        self._signals_received.append(number)
        if len(self._signals_received) == 2:
            raise _SecondSignal(number)


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(f"hvdlm supervise: {text}"), file=sys.stderr, flush=True)
