"""The architectures that this framework implements, by ``ModelSpec.kind``."""

from __future__ import annotations

from typing import Any

from hvdlm.models.spec import ModelSpec
from hvdlm_sharding.rules import Share
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models.convnet import Convnet
from hvdlm_tensorflow.models.ctc import CTC
from hvdlm_tensorflow.models.gpt import GPT
from hvdlm_tensorflow.models.own import Own
from hvdlm_tensorflow.models.rnn import RNN
from hvdlm_tensorflow.models.seq2seq import Seq2Seq

KINDS = {"gpt": GPT, "rnn": RNN, "own": Own, "seq2seq": Seq2Seq, "ctc": CTC, "convnet": Convnet}


def make_model(spec: ModelSpec, share: Share, collectives: Collectives) -> Any:
    """Return the architecture of ``spec``, of which this rank computes ``share``, its parameters not yet bound."""
    kind = KINDS[spec.kind] if spec.kind in KINDS else spec.implementation("tensorflow")
    return kind(spec.settings, share, collectives)
