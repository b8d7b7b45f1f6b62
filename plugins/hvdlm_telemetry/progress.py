"""Prints progress on rank 0: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.io.terminal import clock, columns, on_terminal, printable, size
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Rates

_RESULTS = ("perplexity", "accuracy", "word_error_rate")


class Progress:
    """Event plugin that prints loss, learning rate, tokens per second, communication, data, GPU, and time left."""

    observer = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._bar: Any = None
        self._active = False
        self._printed = float("-inf")
        self._memory_peak: int | None = None  # of the GPU, in the last step that was logged
        self._reported: Rates | None = None  # at the last line, or at the last log.every of a bar

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Print what is trained, and open the bar."""
        self._active = world.rank == 0
        if not self._active:
            return
        frozen = f" beside {info['frozen_parameters']:,} frozen ones" if info.get("frozen_parameters") else ""
        print(
            f"hvdlm: {config.model.name}, {info['parameters']:,} parameters{frozen}, {info['framework']}, "
            f"{world.size} rank(s) over {info['backend']}, {config.train.threads} thread(s) each, "
            f"steps {info['start_step']} to {info['steps']}",
            flush=True,
        )
        if on_terminal():
            from tqdm import tqdm

            # The terminals that launchers give to ranks have no size.
            size_of_terminal = {"ncols": columns(), "nrows": 20} if columns() else {}
            options = {"unit": "step", "file": sys.stdout, **size_of_terminal}
            self._bar = tqdm(total=info["steps"], initial=info["start_step"], **options)

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, rates: Rates) -> None:
        """Print the step, or show it beside the bar."""
        if not self._active:
            return
        recent = rates.since(self._reported)
        text = (
            f"loss {result.loss:.4f}, lr {learning_rate:.2e}, {recent.tokens_per_second:,.0f} tokens/s"
            f"{_communication(recent)}, data {recent.data_share:.1%}{self._device(recent, result)}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            if step % self._config.log.every == 0:
                self._reported = rates
        if result.skipped:
            reason = "the batch has no targets" if result.empty else f"gradient norm {result.grad_norm:.3g}"
            self._print(f"step {step}: update skipped, {reason}")
        if self._bar is None and self._is_due(step):
            left = (self._config.train.steps - step) * recent.seconds
            print(f"step {step}: {text}, {clock(left)} left", flush=True)
            self._reported = rates

    def _device(self, rates: Rates, result: StepResult) -> str:
        """Return the figures of the GPU, for example MFU 41.3%, 23.4 GB; empty where they aren't known."""
        self._memory_peak = result.device_memory_peak or self._memory_peak
        utilization = "" if rates.mfu is None else f", MFU {rates.mfu:.1%}"
        return utilization + (f", {size(self._memory_peak)}" if self._memory_peak else "")

    def _is_due(self, step: int) -> bool:
        """Return whether a line is due: at the first and the last step, and at logged steps at least 2 s apart."""
        now = time.monotonic()
        if step in (1, self._config.train.steps) or (step % self._config.log.every == 0 and now - self._printed >= 2):
            self._printed = now
            return True
        return False

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the evaluation."""
        self._print(f"step {step}: " + ", ".join(_figure(*item) for item in metrics.items()))

    @hookimpl
    def hvdlm_checkpoint_saved(self, step: int, path: str, seconds: float, total_seconds: float) -> None:
        """Print the checkpoint's path and cost."""
        self._print(f"step {step}: saved {path} in {total_seconds:.2f} s, training was blocked for {seconds:.2f} s")

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int, batches: Sequence[int]) -> None:
        """Print that the run rolled back."""
        left_out = f"; left out: batch {', '.join(map(str, batches))}" if batches else ""
        self._print(f"step {step}: rolled back to the checkpoint of step {to_step}{left_out}")
        if self._bar is not None:
            self._bar.n = to_step

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Close the bar and print the result."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if summary.get("ended_early"):
            self._print(f"the run ends after step {summary['steps']}: {summary['ended_early']}")
        if summary.get("stopped"):
            self._print(
                f"stopped after step {summary['steps']} ({summary['stopped']}); --checkpoint.resume auto continues"
            )
        elif name := next((name for name in _RESULTS if name in summary), None):
            value = summary[name]
            figure = f"perplexity {value:.3f}" if name == "perplexity" else _figure(name, value)
            rate = f"{summary['tokens_per_second']:,.0f} tokens/s"
            # A plugin's task, or the manifest of a foreign checkpoint, may lack the loss.
            loss = f" (loss {summary['val_loss']:.4f})" if "val_loss" in summary else ""
            self._print(f"done: validation {figure}{loss}, {rate}")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stdout)
        elif self._active:
            print(printable(text), flush=True)


def _communication(rates: Rates) -> str:
    """Return the figures of communication, for example comm 3.1%, 67 KB/step (1/46.7); empty where there is none."""
    if not rates.comm_bytes:
        return ""
    text = f", comm {rates.comm_share:.1%}, {size(rates.comm_bytes)}/step"
    if rates.compression and rates.compression > 1.05:
        text += f" (1/{rates.compression:.1f})"
    return text if rates.overlap is None else f"{text}, {rates.overlap:.0%} hidden"


def _figure(name: str, value: float) -> str:
    """Return a figure as text: losses and rates with four decimals, in which they differ, others with two."""
    kind = name.partition("/")[0]  # a corpus may follow
    return f"{name} {value:.4f}" if kind.endswith(("loss", "accuracy", "rate")) else f"{name} {value:.2f}"
