"""``plan --search --ranks N``: the fastest layouts of a run that fit the memory, with reasons."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdlm.config import Config
    from hvdlm.parallel.mesh import Mesh
    from hvdlm.planning.hardware import Hardware
    from hvdlm.planning.layout_costs import LayoutCosts
    from hvdlm.planning.search import Layout, Space

_SHOWN = 5  # layouts
LOSSY_EXCHANGES = ("diloco",)
LOSSY_COMPRESSORS = ("bf16", "int8", "power_sgd")
_LOSSY_NOTE = (
    "--lossy: exchanges and compressors other than the given ones change the result of training: compare the losses of "
    "short runs before a long one"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the search to those of plan."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        action="store_true",
        help="list the fastest layouts that fit the memory; options of train that are given stay as they are",
    )
    group.add_argument("--ranks", type=int, metavar="N", help="ranks to search layouts for")
    group.add_argument(
        "--lossy",
        action="store_true",
        help=f"consider {', '.join(LOSSY_EXCHANGES)} and compression by {', '.join(LOSSY_COMPRESSORS)}, too, which "
        "change the result of training",
    )
    group.add_argument("--output", metavar="FILE", help="YAML file to write the best layout to, for --config")


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Search, print the result, and write the best layout where ``--output`` names a file.

    Args:
        options: those of plan.
        arguments: the options of train.

    Raises:
        HvdlmError: bad input, no measurements to advise by, or no layout fits.
    """
    from hvdlm.configuration.parsing import parse_config
    from hvdlm.errors import HvdlmError
    from hvdlm.io.atomic_files import replace
    from hvdlm.io.safe_files import check_output
    from hvdlm.planning.memory_fit import parse_bytes
    from hvdlm_planner import search_text
    from hvdlm_planner.advice import hardware_for
    from hvdlm_planner.given_options import given_options

    if not options.ranks or options.ranks < 1:
        raise HvdlmError("plan --search needs the number of ranks, 1 or more: --ranks 64.")
    if options.output:
        check_output(Path(options.output))
    config = parse_config(list(arguments), "plan")
    hardware = hardware_for(options.hardware, config)
    gpu_memory = parse_bytes(options.gpu_memory) if options.gpu_memory else None
    best = _search(config, options.ranks, given_options(arguments), hardware, gpu_memory, options.lossy)
    if options.output:
        headline = search_text.headline(best, hardware.name)
        replace(Path(options.output), search_text.as_yaml(config, best, headline))
        print(f"\nthe best layout is in {options.output}: add --config {options.output} to the options of the run")
    return 0


def _search(
    given: Config, ranks: int, fixed: set[str], hardware: Hardware, gpu_memory: float | None, lossy: bool
) -> Layout:
    """Search, print the result, and return the best layout."""
    from hvdlm.checkpoints.base_weights import resolve
    from hvdlm.configuration import validation
    from hvdlm.planning.search import LOSSY, make_space, search
    from hvdlm.planning.step_time import resolved
    from hvdlm.training.run import load_plugins
    from hvdlm_planner.layouts import layout_costs

    config = resolved(resolve(given), hardware)
    validation.values(config)
    manager = load_plugins(config, *(("compression", *LOSSY_EXCHANGES) if lossy else ()))
    manager.hook.hvdlm_prepare(config=config)
    validation.model(config, manager)
    costs = layout_costs(manager, config, hardware, gpu_memory)
    others = dict(zip(LOSSY, (LOSSY_EXCHANGES, LOSSY_COMPRESSORS), strict=True)) if lossy else {}
    space = make_space(config, costs.spec, ranks, fixed, others)
    layouts = search(config, space, costs, _SHOWN)
    if not layouts:
        raise _nothing(config, space, costs)
    print("\n".join(_text(config, space, costs, layouts, lossy)), flush=True)
    return layouts[0]


def _text(config: Config, space: Space, costs: LayoutCosts, layouts: list[Layout], lossy: bool) -> list[str]:
    from hvdlm.planning.search import smallest_fits
    from hvdlm.planning.search_reasons import gains, too_large
    from hvdlm_planner import search_text

    best, hardware = layouts[0], costs.hardware
    lines = [search_text.headline(best, hardware.name), "", "the fastest layout of each mesh that fits:"]
    lines += search_text.table(layouts)
    if why := list(search_text.reasons(best, gains(config, space, costs, best))):
        lines += ["", "why the first one:", *why]
    large, smallest = too_large(config, space, costs, best), smallest_fits(config, space, costs)
    if out := list(search_text.ruled_out(large, smallest, best)):
        lines += ["", "what doesn't fit:", *out]
    lines += [
        "",
        f"by the figures of {hardware.name}; fitted on: {hardware.fitted_on}; tested on: {hardware.tested_on}",
    ]
    return [*lines, *([_LOSSY_NOTE] if lossy else [])]


def _nothing(config: Config, space: Space, costs: LayoutCosts) -> Exception:
    """Return the error about a search without a result."""
    from hvdlm.errors import HvdlmError
    from hvdlm.io.terminal import size
    from hvdlm.planning.search import meshes, smallest_fits
    from hvdlm_planner.layouts import problem
    from hvdlm_planner.search_text import shape

    smallest = smallest_fits(config, space, costs)
    if not smallest:
        mesh: Mesh | None = next(meshes(space), None)
        why = problem(costs, config, mesh) if mesh else "the given sizes of the mesh don't divide the ranks."
        return HvdlmError(f"plan --search: there is no layout for {space.ranks} ranks: {why}")
    least = min(smallest, key=lambda mesh: smallest[mesh].needed)
    fit = smallest[least]
    return HvdlmError(
        f"plan --search: no layout for {space.ranks} ranks fits into {size(fit.available)}: the smallest, "
        f"{shape(least)}, needs {size(fit.needed)}: give more ranks (--ranks), or fix fewer options."
    )
