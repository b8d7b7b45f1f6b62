"""Predict the memory and communication of every rank, without starting a run."""

from __future__ import annotations


def main(arguments: list[str]) -> int:
    """Print the plan of the run that ``arguments``, options of train, describe."""
    from hvdlm.configuration.parsing import parse_config
    from hvdlm_planner.plan import describe

    print(describe(parse_config(arguments, "plan")))
    return 0
