"""The architectures that this framework implements, by ``ModelSpec.kind``."""

from __future__ import annotations

from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.model import Model
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.models.custom_module import CustomModule
from hvdlm_torch.models.gpt import GPT
from hvdlm_torch.models.rnn import RNN

KINDS = {"gpt": GPT, "rnn": RNN, "own": CustomModule}


def make_model(spec: ModelSpec, model_shard: ModelShard, collectives: Collectives) -> Model:
    """Return the model of ``spec``, of which this rank computes ``model_shard``; its parameters are not bound yet."""
    architecture = KINDS[spec.kind] if spec.kind in KINDS else spec.implementation("torch")
    return architecture(spec.settings, model_shard, collectives)
