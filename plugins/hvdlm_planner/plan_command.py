"""Predict the memory, traffic and seconds of a step, without starting a run."""

from __future__ import annotations

import argparse

from hvdlm_planner import search_command, simulate_options


def main(arguments: list[str]) -> int:
    """Print the plan of the run that ``arguments``, options of plan and of train, describe."""
    from hvdlm.configuration.parsing import parse_config
    from hvdlm.errors import HvdlmError
    from hvdlm.planning.memory_fit import parse_bytes
    from hvdlm_planner.advice import known_hardware, refusal
    from hvdlm_planner.plan import describe
    from hvdlm_planner.planned_run import with_ranks

    options, rest = make_parser().parse_known_args(arguments)
    if options.measure or options.fit:
        from hvdlm_planner import measure_command

        return measure_command.main(options, rest)
    if options.search:
        return search_command.main(options, rest)
    gpu_memory = parse_bytes(options.gpu_memory) if options.gpu_memory else None
    config = with_ranks(parse_config(rest, "plan"), options.ranks)
    known = known_hardware(options.hardware, config)
    reason = refusal(*known, config) if known else None
    if options.simulate:
        from hvdlm_planner.simulate_text import simulation

        if reason:
            raise HvdlmError(reason)
        print(simulation(config, known[1] if known else None, options))
        return 0
    hardware = known[1] if known and not reason else None
    if known and reason:
        gpu_memory = gpu_memory or known[1].memory_bytes
    print(describe(config, hardware, gpu_memory))
    if reason:
        print(f"\nthe seconds of a step are not predicted: {reason}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of plan, which leaves those of train to another one."""
    parser = argparse.ArgumentParser(
        "python -m hvdlm plan",
        description="Predict the memory, traffic and seconds of a step of the run that options of train describe.",
        epilog="All options of train: python -m hvdlm --help all. hvdlm --dry_run is short for hvdlm plan.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu_memory",
        metavar="SIZE",
        help="memory of a GPU, such as 80GB or 40GiB; default: that of the hardware file, or of this machine's GPUs",
    )
    parser.add_argument(
        "--hardware",
        metavar="FILE|NAME",
        help="hardware file, or the name of one that comes with hvdlm: h100, a100, p100, cpu_ethernet; default: that "
        "of this machine, once it was measured",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure how fast this machine trains, with one rank, or under a launcher with several and what they send "
        "(python -m hvdlm run -np 4 -- plan --measure), and add it to the hardware file",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="that a measurement takes at most; default: 60")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1000,
        help="turns that each model of a measurement has at most; default: until its seconds are known to 1%%, or the "
        "time is over",
    )
    parser.add_argument(
        "--models",
        type=int,
        default=1000,
        help="small models that a measurement times at most, those first that all figures need; default: all, or those "
        "that there is time for",
    )
    parser.add_argument("--steps", metavar="FILE", help="with --measure: also write the timed steps, as JSON")
    parser.add_argument(
        "--fit",
        metavar="FILE",
        help="fit the machine's figures to timed steps of --steps again, without measuring, in place of --measure",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks of the run, in place of parallel.data; default: by the parallel options",
    )
    search_command.add_options(parser)
    simulate_options.add_options(parser)
    return parser
