"""Compute a run's metrics on the whole validation split."""

from __future__ import annotations

import json


def main(arguments: list[str]) -> int:
    """Evaluate, and print the metrics as JSON on rank 0."""
    from hvdlm.configuration.parsing import split_overrides
    from hvdlm.diagnostics.rank_errors import ending_all_ranks
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.training.loop import evaluate
    from hvdlm.training.run import build, connect
    from hvdlm_inference.trained_run import plan_trained, run_parser

    own, overrides = split_overrides(arguments)
    values = run_parser("evaluate", "Compute a run's metrics on the whole validation split.").parse_args(own)
    with watching() as watchdog:
        connected = connect(plan_trained(values.run, values.checkpoint, overrides, values.weights))
        with ending_all_ranks(connected.world):
            run = build(connected)
            metrics = evaluate(run)
            if run.world.rank == 0:
                print(json.dumps({"step": run.start_step, **metrics}), flush=True)
        watchdog.code = 0
    return 0
