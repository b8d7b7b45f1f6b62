"""The entry point of the framework ``torch``, which is imported only when it is used."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import rank_context
from hvdlm.protocols import framework as protocols
from hvdlm.protocols.framework import Probe

if TYPE_CHECKING:
    from hvdlm.models.spec import ModelSpec
    from hvdlm.parallel.mesh import Mesh
    from hvdlm.protocols.types import Prediction

COMPUTES_IN_CALLER = True
"""On a CPU and with one thread a rank: the processor time of a rank's thread is that of its computing."""

_CODE = "import torch; report(version=torch.__version__, gpus=torch.cuda.device_count())"


@hookimpl
def hvdlm_probes() -> dict[str, Probe]:
    """Return how PyTorch is examined."""
    install = "pip install 'hvdlm[torch]', or in a checkout make setup FRAMEWORKS=\"torch\""
    return {"torch": Probe(_CODE, install, horovod=True)}


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Choose this framework as the backend of keras (compressors, custom modules), which reads the choice at import."""
    if config.framework == "torch":
        os.environ["KERAS_BACKEND"] = "torch"


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Check that PyTorch is installed, and what it can compile.

    Raises:
        HvdlmError: it isn't, or can't.
    """
    if config.framework != "torch":
        return
    if importlib.util.find_spec("torch") is None:
        raise HvdlmError(
            'framework torch is not installed here: make setup FRAMEWORKS="torch", or --framework tensorflow.'
        )
    if config.train.activation_offload and spec.kind != "gpt":
        raise HvdlmError(
            f"train.activation_offload moves the activations of GPTs' layers, and model.name {config.model.name} is "
            "none: leave it out."
        )
    if config.train.compile is True and rank_context.current() is not None:
        raise HvdlmError(
            "train.compile: torch.compile keeps its state for the whole process, and can't compile ranks that are "
            "threads of one (backend threads): leave it out."
        )
    if config.train.compile is True and (reason := uncompilable(config, spec)):
        raise HvdlmError(f"train.compile: {reason}: leave it out.")


def uncompilable(config: Config, spec: ModelSpec) -> str:
    """Return why steps of this run can't be compiled; ``""`` where they can."""
    if config.parallel.zero == 3:
        return "compiled steps keep whole parameters, which parallel.zero 3 gathers layer by layer"
    if config.train.activation_offload:
        return "compiled steps keep activations as one, which train.activation_offload moves layer by layer"
    if config.parallel.tensor == 1:
        return ""
    if spec.kind == "rnn":
        return "tensor ranks of recurrent models communicate after every position, and compiling all takes too long"
    if config.train.activation_checkpointing:
        return "torch.compile can't recompute the collectives of tensor ranks (train.activation_checkpointing)"
    return ""


@hookimpl
def hvdlm_predict(config: Config, spec: ModelSpec, mesh: Mesh, rank: int, moments: int) -> Prediction | None:
    """Return the costs of a step with PyTorch."""
    if config.framework != "torch":
        return None
    from hvdlm.planning.closed_forms import Habits, closed_form

    habits = Habits(recomputes_all=False)
    return closed_form(config, spec, mesh, rank, habits, moments)


@hookimpl
def hvdlm_make_framework(name: str) -> protocols.Framework | None:
    """Return the framework named ``torch``."""
    if name != "torch":
        return None
    from hvdlm_torch.framework import Framework

    return Framework()
