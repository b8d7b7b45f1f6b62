"""Predicted speeds beside published ones, of systems and machines that are not here; docs/planning.md has the table.

python benchmarks/published_figures.py [--short]
"""

from __future__ import annotations

import published_systems as published
from harness import Bar, make_parser, report

from hvdlm.planning.hardware import read_hardware


def main() -> None:
    """Print predicted speeds, divided by published ones or beside them."""
    make_parser(__doc__, frameworks=False).parse_args()
    h100, p100 = read_hardware("h100"), read_hardware("p100")
    eight, many = (published.tokens_per_second(h100, ranks) for ranks in (8, 128))
    lost = 1 - many / eight
    details = f"predicted {100 * lost:.2f}% lost, {eight:.0f} and {many:.0f} tokens/s a GPU"
    bar = Bar(1 / 1.5, 1.5)
    report(
        "loss of efficiency from 8 to 128 H100, torchtitan, predicted / measured",
        lost / (1 - 5605 / 5762),
        bar,
        details,
    )
    constant = published.torchtitan_mfu(5762)
    for case in published.MEGATRON:
        measured, predicted = case.teraflops * 1e12 / published.PEAK, published.megatron_mfu(h100, case)
        details = (
            f"predicted {100 * predicted:.1f}%, measured {100 * measured:.1f}%; constant {constant / measured:.2f}"
        )
        report(
            f"utilization of Megatron-LM {case.name}, predicted / measured",
            predicted / measured,
            Bar(0.85, 1.15),
            details,
        )
    for name, (_, _, measured) in published.IMAGES.items():
        predicted = published.horovod_efficiency(p100, name)
        details = f"published {measured:.2f}"
        report(f"efficiency of {name} on 512 P100", predicted, Bar(measured - 0.1, measured + 0.1), details)


if __name__ == "__main__":
    main()
