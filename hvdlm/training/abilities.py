"""What frameworks and exchanges of plugins may lack, and a run asks for."""

from __future__ import annotations

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.parallel.moving_average import KIND as AVERAGE
from hvdlm.parallel.moving_average import not_averaged
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.framework import Framework, HasAbilities
from hvdlm.protocols.optimizer import Optimizer


def check_abilities(framework: Framework, config: Config) -> None:
    """Refuse what the options ask for and the framework's plugin doesn't have."""
    has, (data, train, parallel) = framework.name, (config.data, config.train, config.parallel)
    asked = {
        "groups": (train.groups, f"train.groups: framework {has} has one learning rate for all: leave it out."),
        "muon": (train.optimizer == "muon", f"train.optimizer muon: framework {has} doesn't have it: choose adamw."),
        "ema": (train.ema, f"train.ema: framework {has} keeps no average of its weights: leave it out."),
        "zero3": (
            parallel.zero == 3,
            f"parallel.zero 3: framework {has} can't gather parameters layer by layer: --parallel.zero 2.",
        ),
        "context_ranks": (
            parallel.context > 1,
            f"parallel.context {parallel.context}: framework {has} has no context ranks: leave it out.",
        ),
        "document_masks": (
            data.document_masks,
            f"data.document_masks: framework {has} doesn't have them: leave it false.",
        ),
        "activation_offload": (
            train.activation_offload,
            f"train.activation_offload: framework {has} can't keep activations on the host: "
            "--train.activation_checkpointing true saves more memory.",
        ),
    }
    abilities = framework.abilities if isinstance(framework, HasAbilities) else ()
    for ability, (wanted, sentence) in asked.items():
        if wanted and ability not in abilities:
            raise HvdlmError(sentence)


def check_average(config: Config, exchange: Exchange, optimizer: Optimizer | None) -> None:
    """Refuse the moving average of parameters that ranks don't agree on, and one whose name is taken."""
    if config.train.ema is None:
        return
    if exchange.traits.replicas_diverge:
        raise not_averaged(config.communication.exchange)
    if optimizer and AVERAGE in optimizer.state:
        raise HvdlmError(
            f"train.ema is saved as {AVERAGE}, a name that the state of train.optimizer {config.train.optimizer} has: "
            "leave it out, or choose another optimizer."
        )
