"""The architectures that this framework implements, by ``ModelSpec.kind``."""

from __future__ import annotations

from typing import Any

from hvdlm.models.spec import ModelSpec
from hvdlm_sharding.rules import Share
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.models.convnet import Convnet
from hvdlm_torch.models.ctc import CTC
from hvdlm_torch.models.gpt import GPT
from hvdlm_torch.models.own import Own
from hvdlm_torch.models.rnn import RNN
from hvdlm_torch.models.seq2seq import Seq2Seq

KINDS = {"gpt": GPT, "rnn": RNN, "own": Own, "seq2seq": Seq2Seq, "ctc": CTC, "convnet": Convnet}


def make_model(spec: ModelSpec, share: Share, collectives: Collectives) -> Any:
    """Return the architecture of ``spec``, of which this rank computes ``share``, its parameters not yet bound."""
    kind = KINDS[spec.kind] if spec.kind in KINDS else spec.implementation("torch")
    return kind(spec.settings, share, collectives)
