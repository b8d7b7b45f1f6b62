"""Recurrent language models: plain tanh (Elman 1990), GRU (Cho et al. 2014), LSTM (Zaremba et al. 2014's use of it).

Every framework computes, for tokens ``[batch, time]``, with weights ``[inputs, gates, hidden]``::

    x = dropout(embed.tokens[tokens])                             # [batch, time, embed]
    for each layer i:
        for each t: h_t (, c_t) = cell(x_t @ input.weight + input.bias, h_{t-1} @ recurrent.weight + recurrent.bias)
        x = dropout(h)                                            # also after the last layer
    logits = x @ (embed.tokens or head.weight)^T + head.bias      # [batch, time, vocab]

Gates in this order (each ``hidden`` wide; a: the input's product, b: the recurrent product)::

    rnn:  h = tanh(a + b)
    gru:  reset, update, new:  r = s(a_r + b_r); z = s(a_z + b_z); n = tanh(a_n + r * b_n); h = (1 - z) n + z h
    lstm: in, forget, cell, out:  c = s(f) c + s(i) tanh(g); h = s(o) tanh(c)

(the order and equations of PyTorch and cuDNN). The state at the end of a batch is the initial state of the next unless
``Batch.reset`` is set; no gradient flows through it (truncated back-propagation through time).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hvdlm.config import ModelConfig
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class RNNSettings:
    """A recurrent model's resolved settings; sizes as in ``ModelConfig``."""

    vocab: int
    layers: int
    width: int
    cell: str
    tie_embeddings: bool
    dropout: float

    @property
    def gates(self) -> int:
        """The number of gates of the cell."""
        return GATES[self.cell]

    @property
    def carries(self) -> int:
        """The number of state arrays ``[rows, width]`` of a layer."""
        return 2 if self.cell == "lstm" else 1


def make_rnn(config: ModelConfig, vocab: int, context: int, *, cell: str) -> ModelSpec:
    """Return the description of a recurrent model with ``cell``: a key of ``GATES``."""
    s = RNNSettings(vocab, config.layers, config.width, cell, bool(config.tie_embeddings), config.dropout)
    uniform = Init("uniform", config.initial_scale or s.width**-0.5)
    params = [ParamSpec("embed.tokens", (vocab, s.width), ("vocab", "embed"), uniform, decay=True)]
    for i in range(s.layers):
        for source, axis in (("input", "embed"), ("recurrent", "hidden_in")):
            shape = (s.width, s.gates, s.width)
            params.append(
                ParamSpec(f"layers.{i}.{source}.weight", shape, (axis, "gates", "hidden"), uniform, decay=True)
            )
            params.append(ParamSpec(f"layers.{i}.{source}.bias", shape[1:], ("gates", "hidden"), uniform))
    if not s.tie_embeddings:
        params.append(ParamSpec("head.weight", (vocab, s.width), ("vocab", "embed"), uniform, decay=True))
    params.append(ParamSpec("head.bias", (vocab,), ("vocab",), Init("zeros")))
    weights = s.layers * 2 * s.width * s.gates * s.width + vocab * s.width
    return ModelSpec("rnn", s, tuple(params), 6.0 * weights)


PRESETS: dict[str, ModelMaker] = {cell: partial(make_rnn, cell=cell) for cell in GATES}
