"""The architectures that this framework implements, by ``ModelSpec.kind``."""

from __future__ import annotations

import tensorflow as tf

from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.model import Model
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models.custom_module import CustomModule
from hvdlm_tensorflow.models.gpt import GPT
from hvdlm_tensorflow.models.rnn import RNN

KINDS = {"gpt": GPT, "rnn": RNN, "own": CustomModule}


def make_model(spec: ModelSpec, model_shard: ModelShard, collectives: Collectives, dtype: tf.DType) -> Model:
    """Return the model of ``spec``, of which this rank computes ``model_shard``; its parameters are not bound yet.

    ``dtype``: that in which it computes.
    """
    architecture = KINDS[spec.kind] if spec.kind in KINDS else spec.implementation("tensorflow")
    model = architecture(spec.settings, model_shard, collectives)
    model.dtype = dtype
    if isinstance(model, GPT):
        model.orders_layers = not spec.frozen  # ordered, what isn't trained would have gradients computed
    return model
