"""Measure the cost of collectives between the ranks of this launch."""

from __future__ import annotations

import math
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Measure, print, and write a JSON file and a plot on rank 0: ``horovodrun -np N python -m hvdlm bench``."""
    from hvdlm.configuration.parsing import command_parser, parse_config, split_overrides
    from hvdlm.diagnostics.rank_errors import ending_all_ranks
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.errors import HvdlmError, nearest
    from hvdlm.io.safe_files import check_output
    from hvdlm_backends import collective_benchmark
    from hvdlm_backends.connecting import connect_only

    description = "Measure latency and bandwidth of every collective, compared with raw MPI. Start it with a launcher."
    parser = command_parser("bench", description, "--framework, --backend and options with a dot are those of train.")
    parser.add_argument("--smallest", type=int, default=1024, help="smallest message size (bytes per rank)")
    parser.add_argument("--largest", type=int, default=2**28, help="largest message size (bytes per rank)")
    parser.add_argument(
        "--collectives",
        type=list[str],
        default=None,
        help="collectives to measure, for example [all_reduce]; default: all",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="about what a size takes, in 5 to 200 calls")
    parser.add_argument(
        "--output", type=str, default="bench.json", help="file to write; the plot is written next to it"
    )
    own, overrides = split_overrides(arguments)
    values = parser.parse_args(own)
    config = parse_config(overrides, "bench")
    known = collective_benchmark.COLLECTIVES
    collectives = values.collectives or known
    for name in collectives:
        if name not in known:
            raise HvdlmError(f"--collectives: no collective {name!r}; {nearest(name, known)}")
    sizes = collective_benchmark.sizes(values.smallest, values.largest)
    if not 0 < values.seconds < math.inf:
        raise HvdlmError(f"--seconds {values.seconds:g}: expected a number above 0.")
    output = Path(values.output)
    for path in (output, output.with_suffix(".svg")):
        check_output(path)
    with watching() as watchdog:
        world, framework = connect_only(config)
        with ending_all_ranks(world):
            collective_benchmark.main(world, framework, collectives, sizes, values.seconds, output)
        watchdog.code = 0
    return 0
