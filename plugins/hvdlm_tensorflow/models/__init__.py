"""The architectures that this framework implements, by ``ModelSpec.kind``."""

from __future__ import annotations

from typing import Any

from hvdlm_tasks.tensorflow_models.convnet import Convnet
from hvdlm_tasks.tensorflow_models.ctc import CTC
from hvdlm_tasks.tensorflow_models.seq2seq import Seq2Seq

from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models.custom_module import CustomModule
from hvdlm_tensorflow.models.gpt import GPT
from hvdlm_tensorflow.models.rnn import RNN

KINDS = {"gpt": GPT, "rnn": RNN, "own": CustomModule, "seq2seq": Seq2Seq, "ctc": CTC, "convnet": Convnet}


def make_model(spec: ModelSpec, model_shard: ModelShard, collectives: Collectives) -> Any:
    """Return the architecture of ``spec``, of which this rank computes ``share``, its parameters not yet bound."""
    kind = KINDS[spec.kind] if spec.kind in KINDS else spec.implementation("tensorflow")
    return kind(spec.settings, model_shard, collectives)
