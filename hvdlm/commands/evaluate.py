"""Compute a run's metrics on the whole validation split: ``python -m hvdlm evaluate --run RUN``."""

from __future__ import annotations

import json

from hvdlm.commands.trained_run import connect_trained, run_parser
from hvdlm.configuration.parsing import split_overrides
from hvdlm.diagnostics.rank_errors import ending_all_ranks
from hvdlm.diagnostics.watchdog import watching
from hvdlm.training.loop import evaluate
from hvdlm.training.run import build


def main(arguments: list[str]) -> int:
    """Evaluate, and print the metrics as JSON on rank 0."""
    own, overrides = split_overrides(arguments)
    values = run_parser("evaluate", "Compute a run's metrics on the whole validation split.").parse_args(own)
    with watching() as watchdog, ending_all_ranks((connected := connect_trained(values, overrides)).world):
        run = build(connected)
        metrics = evaluate(run)
        if run.world.rank == 0:
            assert run.checkpoint is not None
            print(json.dumps({"step": run.checkpoint.step, **metrics}), flush=True)
        watchdog.code = 0
    return 0
