"""The checks and costs of layouts that a search considers, the same as those of a run."""

from __future__ import annotations

from functools import partial

import pluggy

from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel import layout_checks
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import predict_costs, state_vectors
from hvdlm.planning.gradient_work import unknown
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.layout_costs import LayoutCosts
from hvdlm_planner.habits import habits_of
from hvdlm_planner.planned_run import model_of


def layout_costs(
    manager: pluggy.PluginManager, config: Config, hardware: Hardware, gpu_memory: float | None
) -> LayoutCosts:
    """Return the costs of the layouts of a configuration, whose own options are valid.

    Raises:
        HvdlmError: the costs of the model's architecture are unknown.
    """
    spec, _ = model_of(config, manager)
    if config.parallel.context > 1:
        raise HvdlmError(
            f"--search compares layouts by their seconds, and {unknown(config, spec)}: leave it out, or compare runs."
        )
    if predict_costs(manager, config, spec, Mesh(1, 1, 1), 0) is None or spec.kind not in ("gpt", "rnn"):
        raise HvdlmError(f"model.name {config.model.name}: the seconds of a {spec.kind} can't be predicted.")
    moments = state_vectors(manager, config)
    check = partial(_starts, manager, spec)
    return LayoutCosts(manager, spec, hardware, gpu_memory, check, moments, habits_of(config))


def _starts(manager: pluggy.PluginManager, spec: ModelSpec, config: Config, mesh: Mesh) -> bool:
    """Return whether a run with this configuration would start."""
    try:
        _check(manager, spec, config, mesh)
    except HvdlmError:
        return False
    return True


def _check(manager: pluggy.PluginManager, spec: ModelSpec, config: Config, mesh: Mesh) -> None:
    validation.layout(config, mesh)
    layout_checks.check(config, spec)
    manager.hook.hvdlm_check(config=config, spec=spec)


def problem(costs: LayoutCosts, config: Config, mesh: Mesh) -> str:
    """Return why a run on this mesh would not start."""
    try:
        _check(costs.manager, costs.spec, config, mesh)
    except HvdlmError as error:
        return str(error)
    return "no combination of the options is valid."
