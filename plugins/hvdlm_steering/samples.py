"""Samples of text at the end of a run (``log.sample_tokens``); with ``--plugins [samples]``, at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config, LogConfig
from hvdlm.diagnostics.failure_files import short_message
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io.atomic_files import replace
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.task import Task
from hvdlm.protocols.world import World
from hvdlm.training.run_control import RunControl
from hvdlm_inference.generation import encode


class Samples:
    """Generates ``log.sample_tokens`` tokens on all ranks, prints them and writes ``RUN/sample.txt`` on rank 0.

    A sample that fails is reported, and training continues.
    """

    observer = True

    def __init__(self) -> None:
        self._config = Config()
        self._run: RunControl | None = None
        self._first_rank = False
        self._every = False
        self._step: int | None = None  # of the latest sample

    @hookimpl
    def hvdlm_check(self, config: Config, spec: ModelSpec) -> None:
        """Check that samples have a length."""
        if not config.log.sample_tokens:
            raise HvdlmError("the plugin samples generates --log.sample_tokens tokens, which is 0: set it.")

    @hookimpl
    def hvdlm_check_data(self, config: Config, task: Task) -> None:
        """Check that the vocabulary has the prompt's characters."""
        if not task.reads:
            encode(task.tokenizer, config.log.sample_prompt, config)

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, run: RunControl) -> None:
        """Keep the run."""
        self._config, self._run, self._first_rank, self._step = config, run, world.rank == 0, None
        self._every = "samples" in config.plugins

    @hookimpl(trylast=True)
    def hvdlm_evaluated(self, step: int) -> None:
        """Sample, where that is asked for."""
        if self._every:
            self._sample(step)

    @hookimpl(trylast=True)
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Sample, unless the run was stopped or its last evaluation has done so."""
        if not summary["stopped"] and self._step != summary["steps"]:
            process.begin("generating the sample text")
            self._sample(summary["steps"])

    def _sample(self, step: int) -> None:
        self._step = step
        text = self._generate(self._config.log)
        if self._first_rank:
            replace(Path(self._config.log.run) / "sample.txt", text)

    def _generate(self, log: LogConfig) -> str:
        """Generate and print a sample.

        Raises:
            RankError: it failed on this rank, for which others wait, since they share the model with it.
            RuntimeError: it failed where no other rank waits.
        """
        assert self._run is not None
        try:
            return self._run.generate(log.sample_prompt, log.sample_tokens, shown=True, seed=self._config.train.seed)
        except Exception as error:
            mesh = self._run.opened.mesh
            shares = mesh.tensor * mesh.pipeline > 1 or self._config.parallel.zero == 3
            kind = RankError if shares else RuntimeError
            raise kind(f"no sample could be generated: {short_message(error).rstrip('.')}") from error
