"""The bytes of activations that a rank keeps for backward passes, in closed form.

As counted by Korthikanti et al. 2022, section 4, for the tensors that torch keeps for these layers (fewer for frozen
ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hvdlm.parallel.pipeline_schedules import make_pipeline_schedule
from hvdlm.parallel.sharding_rules import ModelShard

if TYPE_CHECKING:
    from hvdlm.planning.closed_forms import Step


class Activations:
    """Those of the layers of a rank in ``step``."""

    def __init__(self, step: Step) -> None:
        self.config = step.config
        self.s = step.s
        self.kind = step.kind
        self.half = step.half
        self.mesh = step.mesh
        self.shard = step.shard
        self.tokens, self.time, self.count = step.tokens, step.time, step.count
        self.sequence = step.sequence

    def bytes(self) -> int:
        """Return the bytes kept for backward passes: of as many micro-batches as the schedule has under way.

        With an offload, two layers are on the device at once, whatever their number.
        """
        stage, recomputes = self.shard.stage, self.config.train.activation_checkpointing
        layer = self.gpt_layer() if self.kind == "gpt" else self.rnn_layer()
        divided = self.config.data.document_masks
        masks = self.document_masks() if divided else 0
        kept = layer
        if recomputes:  # only a layer's input is kept, the rest is recomputed
            kept = 4 * self.s.width * (self.tokens // self.mesh.tensor if self.sequence else self.tokens)
        offloads = self.config.train.activation_offload
        on_device = kept * (2 if stage.count > 1 else min(2, len(self.shard.layers))) if offloads else 0

        def of(chunk: ModelShard) -> int:
            layers = 0 if offloads else kept * len(chunk.layers)
            each = layers + (self.head() if chunk.stage.last else 0) + self.dropout_masks(chunk)
            if divided:  # positions, and masks, or, to make them anew, where documents begin
                positions = 8 if self.s.positions == "learned" and chunk.stage.first else 0
                each += self.tokens * positions + (4 * self.tokens if recomputes else masks)
            return each

        each = [of(chunk) for chunk in self.shard.chunks]
        if stage.count == 1:
            return each[0] + on_device
        most = on_device + most_kept(self.config.parallel.schedule, stage.number, stage.count, self.count, each)
        return most + (layer + masks if recomputes else 0)

    def gpt_layer(self) -> int:
        """Return the bytes of a Transformer layer and micro-batch."""
        s: Any = self.s
        t = self.mesh.tensor
        between = s.width / t if self.sequence else s.width  # per position, where positions may be sharded
        heads = s.heads_width // t
        kv = s.head_width * max(1, s.kv_heads // t)
        inner = s.mlp_width // t * (4 if s.gated else 2)
        # Their inputs, which are one with a parallel residual; rmsnorm's products.
        norms = (1 if s.parallel_residual else 2) * between + (2 * between if s.norm == "rmsnorm" else 0)
        statistics = s.heads / t + (2 if s.norm == "rmsnorm" else 4)
        wide, narrow = norms + statistics, 2 * s.width + 2 * heads + 2 * kv + inner
        joined = self.tokens >= 256  # products of the same input are one from so many positions on
        if joined and (s.qk_norm or s.positions == "rotary"):  # its values keep the queries and keys from before these
            narrow += heads + kv
        if s.dropout:  # masks, which a bias that is added after the sum over tensor ranks makes float32
            wide, narrow = (wide + 2 * between, narrow) if s.bias and t > 1 else (wide, narrow + 2 * between)
        if s.qk_norm:  # products and statistics of these norms, and their inputs, unless the values keep them
            wide += heads + kv + (heads + kv) / s.head_width
            wide += heads + kv if self.half or not joined else 0
        if 0 < s.local_window < self.time:
            narrow += self.blocks(heads, kv)
        if not self.half:
            return round(4 * self.tokens * (wide + narrow))
        # torch casts every weight, and the input of every product: 3 in the attention, 1 or 2 in the MLP; once for all
        # of them where they are joined, and where tensor ranks send its gradient.
        inward = 2 if s.gated else 1
        again = 0 if joined or t > 1 else 1 + inward
        weights = 2 * s.width * heads + 2 * s.width * kv + (inward + 1) * s.width * (s.mlp_width // t)
        return round(self.tokens * (4 * wide + 2 * (narrow + again * s.width)) + 2 * weights)

    def dropout_masks(self, chunk: ModelShard) -> int:
        """Return the bytes of a micro-batch's masks of dropout outside of layers, in float32, as on CPUs.

        Of the embedding and of recurrent layers; torch's own LSTM keeps its output beside the masked one.
        """
        s: Any = self.s
        if not s.dropout:
            return 0
        of_layer = s.width if self.kind == "rnn" else 0
        fused = self.mesh.tensor == 1 and not self.config.train.activation_checkpointing
        of_layer *= 2 if of_layer and s.cell == "lstm" and fused else 1
        width = s.width / self.mesh.tensor if self.sequence else s.width
        return round(4 * self.tokens * (of_layer * len(chunk.layers) + (width if chunk.stage.first else 0)))

    def document_masks(self) -> int:
        """Return the bytes of a micro-batch's masks of documents, which all layers share."""
        keys = float(self.time)
        if 0 < self.s.local_window < self.time:  # of the first block its own keys, of others those of two blocks
            blocks = -(-self.time // self.s.local_window)
            keys = (2 * blocks - 1) * self.s.local_window**2 / self.time
        return round(self.tokens * keys * (2 if self.half else 4))

    def blocks(self, heads: int, kv: int) -> float:
        """Return the elements per position of attention in blocks of a window: of queries and outputs, keys and values.

        The first block is computed by itself, and every other one with its own keys and those of the block before.
        """
        window, time = self.s.local_window, self.time
        count = -(-time // window)
        padded, first = count * window / time, window / time
        queries = padded - first if count > 2 else padded if padded > 1 else 0.0  # of one block, a view
        return heads * (queries + padded) + 4 * kv * (padded - first)

    def rnn_layer(self) -> int:
        """Return the bytes of a recurrent layer and micro-batch."""
        s: Any = self.s
        if self.mesh.tensor == 1:  # torch's own layers
            each = {"rnn": 2.0, "gru": 8.0, "lstm": 16.25 + 22 / self.time}[s.cell] * s.width
        else:
            units = s.width // self.mesh.tensor
            each = 2 * s.width + {"rnn": 2, "gru": 10, "lstm": 12}[s.cell] * units
        return round(4 * self.tokens * each)

    def head(self) -> int:
        """Return the bytes of the last norm and the scores; the loss keeps them as float32, the z-loss once more."""
        s: Any = self.s
        first, last = self.shard.range_of(s.vocab)
        each = float(last - first + 5 + s.width)
        train = self.config.train
        if self.mesh.tensor == 1:  # tensor ranks keep the gradient of the sum of all terms
            each += last - first + 1 if train.z_loss else 0
            each += 0.25 if train.label_smoothing else 0  # a byte for each target
        if self.kind != "gpt":
            return round(4 * self.tokens * each)
        each += s.width / self.mesh.tensor if self.sequence else s.width
        each += s.width if s.norm == "rmsnorm" else 0
        if not self.half:
            return round(4 * self.tokens * each)
        return round(self.tokens * (4 * each - 2 * s.width) + 2 * (last - first) * s.width)


def kept_micro_batches(name: str, stage: int, stages: int, micro_batches: int) -> int:
    """Return the largest number of micro-batches whose activations ``stage`` keeps at once, without virtual stages."""
    return micro_batches if name == "gpipe" else min(stages - stage, micro_batches)


def most_kept(name: str, stage: int, stages: int, micro_batches: int, each: Sequence[int]) -> int:
    """Return the most bytes of activations that ``stage`` keeps at once, of ``each`` a chunk and micro-batch."""
    if len(each) == 1:
        return kept_micro_batches(name, stage, stages, micro_batches) * each[0]
    kept = most = 0
    for action in make_pipeline_schedule(name, stage, stages, micro_batches, len(each)):
        kept += each[action.chunk] if action.kind == "forward" else -each[action.chunk]
        most = max(most, kept)
    return most
