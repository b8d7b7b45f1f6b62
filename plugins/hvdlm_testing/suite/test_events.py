"""Events: a plugin gets all of them, in order, on rank 0 and on another rank."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.types import StepResult
from hvdlm.telemetry.rates import Rates
from hvdlm_testing.plugin_under_test import PluginUnderTest

_SUMMARY: dict[str, Any] = {
    **{"train_loss": 2.0, "step": 6, "val_loss": 2.1, "perplexity": 8.2, "tokens_per_second": 100.0, "seconds": 3.0},
    **{"ended_early": None},
    **{"steps": 6, "stopped": None, "skipped_steps": 1, "framework": "torch", "backend": "mpi", "parameters": 1000},
    **{"world_size": 2, "mesh": {"data": 2, "pipeline": 1, "tensor": 1}, "versions": {"hvdlm": "0.1.0"}},
    **{"bytes_communicated": 8000, "compression": None, "comm_share": 0.1, "overlap": None, "traffic": {}},
    **{"peak_memory_bytes": 10**8, "ranks": []},
}


class _Control:
    """Stands for the ``RunControl`` of a run that is not resumed."""

    def __init__(self, config: Config, manager: pluggy.PluginManager, world: Any) -> None:
        own = {"config": config, "manager": manager, "world": world, "mesh": make_mesh(world.size, config.parallel)}
        self.in_time: set[int] = set()
        self.opened = SimpleNamespace(folder=Path(config.log.run), checkpoint=None, **own)

    def stop(self, reason: str) -> None:
        """Ignore the request."""

    def save(self) -> None:
        """Ignore the request."""

    def evaluate(self) -> None:
        """Ignore the request."""

    def generate(self, prompt: str, tokens: int, shown: bool = False, **sampling: Any) -> str:
        """Return the prompt."""
        return prompt


def _send_events(plugin: PluginUnderTest, folder: Path, rank: int) -> str:
    """Call the event hooks of a plugin as a short run does; return a sentence about the first error, or nothing."""
    try:
        config = plugin.run_config()
        config.train.steps, config.log.run, config.log.every = 6, str(folder), 2
        manager = plugins.load([plugin.name])
    except Exception as error:
        return f"{plugin.name}: a run with it does not start: {type(error).__name__}: {error}"
    world = SimpleNamespace(
        rank=rank, size=2, local_rank=rank, local_size=2, transport="none", recorder=FlightRecorder()
    )
    info: dict[str, Any] = {"parameters": 1000, "flops_per_token": 6e3, "vocab": 64, "start_step": 0, "steps": 6}
    info.update({"framework": "torch", "backend": "mpi", "versions": {"hvdlm": "0.1.0"}})
    event, rates = "hvdlm_run_started", Rates(4000)
    try:
        manager.hook.hvdlm_run_started(config=config, world=world, info=info, run=_Control(config, manager, world))
        for step in range(1, 7):
            event = "hvdlm_step_ended"
            skipped = step == 3
            result = StepResult(2.0 / step, 64.0, float("inf") if skipped else 0.5, 0.01, 4000, skipped=skipped)
            rates = rates.after(result, 0.1)
            manager.hook.hvdlm_step_ended(step=step, result=result, learning_rate=1e-3, seconds=0.1, rates=rates)
            if step == 2:
                event = "hvdlm_evaluated"
                manager.hook.hvdlm_evaluated(step=2, metrics={"val_loss": 2.1, "perplexity": 8.2})
                event = "hvdlm_checkpoint_saved"
                path = str(folder / "checkpoints" / "step-00000002")
                manager.hook.hvdlm_checkpoint_saved(step=2, path=path, seconds=0.1, total_seconds=0.5)
            if step == 4:
                event = "hvdlm_rolled_back"
                manager.hook.hvdlm_rolled_back(step=4, to_step=2, batches=[3, 4])
        event = "hvdlm_run_ended"
        manager.hook.hvdlm_run_ended(summary=copy.deepcopy(_SUMMARY))
    except Exception as error:  # any exception in an event would end the run
        return f"{plugin.name}: {event} fails on rank {rank}, which would end the run: {type(error).__name__}: {error}"
    return ""


@pytest.mark.provides("events")
@pytest.mark.parametrize("rank", [0, 1])
def test_events_are_handled_on_every_rank(
    plugin: PluginUnderTest, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    fault = _send_events(plugin, folder, rank)
    if fault:
        pytest.fail(fault, pytrace=False)
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    if rank and written:
        pytest.fail(f"{plugin.name}: rank 1 writes {', '.join(written)}: files are rank 0's to write.", pytrace=False)
