"""Parameters that are gathered layer by layer (ZeRO-3), as in FSDP (Zhao et al. 2023, section 3.3).

A graph gathers a layer's parameters for its forward pass and again for its backward pass, so that nothing holds them in
between: products keep their inputs and take the weights that were gathered anew. Edges of the graph, which TensorFlow
would else run in any order, give the order: a layer is gathered while the one before it computes, no earlier, and a
layer's gradients are computed when those of the layer above have been scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.parallel.flat_layout import Slot
from hvdlm.parallel.layer_units import EMBEDDING, HEAD, Unit, units_of
from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.planning.gathered_layers import held_at_peak
from hvdlm.protocols.group import Handle
from hvdlm_tensorflow.collectives import GatheredMatrix
from hvdlm_tensorflow.ordering import parameters_first
from hvdlm_tensorflow.slices import with_elements

Parameters = Mapping[str, Any]
Layer = Callable[[tf.Tensor, Parameters], tf.Tensor]
SCOPE = "gathered_parameters"
"""The name scope of gathered parameters, which are no activations."""

_TABLE = "embed.tokens"
_OF_HEAD = "embed.head"  # the embedding's table where the head uses it


class WholeLayers:
    """All layers' parameters are there: a model without ZeRO-3 has nothing to gather."""

    def gather(self, name: str, x: Any, parameters: Parameters) -> Parameters:
        """Return ``parameters``."""
        return parameters

    def run(self, name: str, layer: Layer, x: tf.Tensor, parameters: Parameters, ordered: bool, again: bool) -> Any:
        """Return ``layer(x, parameters)``; see ``parameters_first``. ``again``: the backward pass recomputes it."""
        names = list(parameters)

        def compute(x: tf.Tensor, *tensors: tf.Tensor) -> tf.Tensor:
            return layer(x, dict(zip(names, tensors, strict=True)))

        # Parameters are arguments, because gradients flow to arguments only where a layer is recomputed.
        compute = tf.recompute_grad(compute) if again else compute
        compute = parameters_first(compute) if ordered else compute
        return compute(x, *parameters.values())


class GatheredLayers(WholeLayers):
    """The units of a model (``hvdlm.parallel.layer_units``), of which this rank holds ``shard``.

    The head computes its backward pass right after its forward pass, and the last layer after that: both stay in
    between. The embedding's backward pass reads no parameter.

    Attributes:
        leaves: the name of what the gradients of all parameters are derived from.
        sums: returns the vector to which a graph adds this rank's shards of gradients, ``[size / ranks]``.
    """

    leaves = ("",)
    sums: Callable[[], tf.Tensor]

    def __init__(self, state: ShardedState, shard: tf.Variable, dtype: tf.DType) -> None:
        self._exchange: Any = state.exchange
        self._state = state
        self._layout = state.layout
        self._ranks = state.exchange.traits.zero_size
        self._shard = shard
        self._dtype = dtype
        self._units = {unit.name: unit for unit in units_of(self._layout)}
        self._order = list(self._units)
        self._tied = bool(state.spec.settings.tie_embeddings)

    def bound(self) -> dict[str, Any]:
        """Begin a graph; return the names of the parameters, without values, and the leaf."""
        self._values = self._shard.read_value()
        self._gathering: dict[str, list[Handle]] = {}  # gathers under way, by label
        self._scattering: list[_Scattering] = []  # of the layer before in the backward pass
        self._scattered: list[_Scattering] = []  # of all
        self._leaf = tf.zeros([])
        return {"": self._leaf, **{slot.name: None for slot in self._layout.slots}}

    def gradients(self, of_leaves: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return what ``sums`` becomes by the gradients that the backward pass has scattered, ``[size / ranks]``.

        Each shard is added where it belongs as soon as it is there, in memory that no other operation reads: kept until
        the end of the backward pass, shards would take a rank's share of all gradients once more, and again while they
        are concatenated.
        """
        total = self.sums()
        for one in self._scattered:
            start, stop = self._state.shard_ranges[one.index]
            total = with_elements(total, start, total[start:stop] + one.wait())
        return [total]

    def bytes(self) -> int:
        """Return the most bytes of gathered parameters at once, as the edges of a graph bound them."""
        return held_at_peak(self._layout, self._ranks, self._tied, in_graph=True)["parameters"]

    def add(self) -> None:
        """Do nothing: no parameter is derived from others."""

    def frozen_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield nothing: no weight is frozen."""
        return iter(())

    def gather(self, name: str, x: Any, parameters: Parameters) -> Parameters:
        """Return a unit's parameters when ``x`` is there, and start to gather the next unit.

        The gradients of the embedding and the head are scattered; those of a layer are not, which ``run`` is for.
        """
        unit = self._units[name]
        if name not in (EMBEDDING, HEAD):
            layer = self._layer_parameters(unit, name, [x])
            self._start_following(name, layer.values())
            return layer
        gathered = self._differentiable(unit, name, x)
        if name == HEAD and self._tied:
            gathered |= self._differentiable(self._units[EMBEDDING], _OF_HEAD, x)
        self._start_following(name, gathered.values())
        return {n: self._cast(n, tensor) for n, tensor in gathered.items()}

    def run(self, name: str, layer: Layer, x: tf.Tensor, parameters: Parameters, ordered: bool, again: bool) -> Any:
        """Return ``layer(x, parameters)``, in whose backward pass the parameters are gathered again.

        ``ordered``: in training. ``again``: the backward pass recomputes the layer.
        """
        if not ordered:
            return layer(x, self.gather(name, x, parameters))
        unit, number = self._units[name], self._order.index(name)
        stays = number == len(self._order) - 2

        def gathered_again(of_y: tf.Tensor, p: Parameters) -> Parameters:
            """Return the parameters for the backward pass, and start to gather those of the layer below."""
            if not stays:
                # What was received lies beside its copy by parameters: first, a matrix of the layer above makes room.
                freed = [one.wait() for one in self._scattering[:1]]
                p = self._layer_parameters(unit, f"{name}.backward", [of_y, *freed])
            if number > 1:
                below = self._order[number - 1]
                self._start(self._units[below], f"{below}.backward", [of_y, *p.values()])
            return p

        @tf.custom_gradient
        def function(x: tf.Tensor) -> Any:
            p = self._layer_parameters(unit, name, [x])
            self._start_following(name, p.values())
            matrices = {n: GatheredMatrix(t) for n, t in p.items() if t.shape.rank > 1}
            others = {n: t for n, t in p.items() if n not in matrices}
            if again:
                return layer(x, p), lambda of_y: self._recompute(unit, layer, x, gathered_again(of_y, p), of_y)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([x, *others.values()])
                y = layer(x, {**others, **matrices})

            def gradient(of_y: tf.Tensor) -> tf.Tensor:
                present, scattered = gathered_again(of_y, p), self._last_scattered()
                for n, matrix in matrices.items():
                    matrix.values, matrix.after = present[n], scattered
                of_x, *of_others = tape.gradient(y, [x, *others.values()], of_y)
                gradients = dict(zip(others, of_others, strict=True)) | {n: m.gradient for n, m in matrices.items()}
                self._scatter(unit, {f"{name}.{n}": g for n, g in gradients.items()})
                return _after(of_x, gradients.values())

            return y, gradient

        return function(x)

    def _recompute(self, unit: Unit, layer: Layer, x: tf.Tensor, p: Parameters, of_y: tf.Tensor) -> tf.Tensor:
        """Compute a layer again, and scatter its gradients; return that of ``x``."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            x = _after(x, [of_y])
            tape.watch([x, *p.values()])
            y = layer(x, p)
        of_x, *of_p = tape.gradient(y, [x, *p.values()], _after(of_y, [y, *self._last_scattered()]))
        self._scatter(unit, {f"{unit.name}.{n}": g for n, g in zip(p, of_p, strict=True)})
        return _after(of_x, of_p)

    def _differentiable(self, unit: Unit, label: str, x: Any) -> dict[str, tf.Tensor]:
        """Return the parameters of a unit, whose gradients are scattered when all of them are there."""
        slots = self._slots(unit)

        @tf.custom_gradient
        def function(leaf: tf.Tensor) -> Any:
            whole = self._whole(unit, label, [x])

            def gradient(*of_slots: Any) -> tf.Tensor:
                with tf.control_dependencies(self._last_scattered() if label == EMBEDDING else []):
                    dense = [tf.convert_to_tensor(g) for g in of_slots]
                gradients = {slot.name: g for slot, g in zip(slots, dense, strict=True)}
                self._scatter(unit, {_TABLE: gradients[_TABLE]} if label == _OF_HEAD else gradients)
                return tf.zeros([])

            return tuple(whole[slot.name] for slot in slots), gradient

        return {slot.name: tensor for slot, tensor in zip(slots, function(self._leaf), strict=True)}

    def _layer_parameters(self, unit: Unit, label: str, after: Sequence[Any]) -> dict[str, tf.Tensor]:
        """Return a layer's parameters by their names in the layer, in the precision in which it computes."""
        prefix = f"{unit.name}."
        return {n.removeprefix(prefix): self._cast(n, t) for n, t in self._whole(unit, label, after).items()}

    def _cast(self, name: str, tensor: tf.Tensor) -> tf.Tensor:
        with tf.name_scope(SCOPE):
            return tensor if "norm" in name else tf.cast(tensor, self._dtype)

    def _start_following(self, name: str, after: Any) -> None:
        """Start to gather what is used after unit ``name`` in the forward pass."""
        number = self._order.index(name) + 1
        if number < len(self._order):
            following = self._order[number]
            self._start(self._units[following], following, after)
            if following == HEAD and self._tied:
                self._start(self._units[EMBEDDING], _OF_HEAD, after)

    def _start(self, unit: Unit, label: str, after: Any) -> None:
        """Start to gather a unit, when the tensors ``after`` are there: a layer by one collective.

        The table of the embedding or the head, by itself, is what the collective returns, not a copy of it.
        """
        first, last = unit.buckets
        ranges = self._state.shard_ranges[first:last]
        if unit.name not in (EMBEDDING, HEAD):
            ranges = [(ranges[0][0], ranges[-1][1])]
        with tf.name_scope(SCOPE), tf.control_dependencies(list(after)):
            shards = [self._values[start:stop] for start, stop in ranges]
        self._gathering[label] = [
            self._exchange.gather_vector(shard, first + number, f"parameters.{label}")
            for number, shard in enumerate(shards)
        ]

    def _whole(self, unit: Unit, label: str, after: Sequence[Any]) -> dict[str, tf.Tensor]:
        """Return the parameters of a unit by name, when the tensors ``after`` are there."""
        if label not in self._gathering:
            self._start(unit, label, after)
        buckets = [handle.wait() for handle in self._gathering.pop(label)]
        tensors: dict[str, tf.Tensor] = {}
        with tf.name_scope(SCOPE), tf.control_dependencies(list(after)):
            if len(buckets) == 1:
                by_rank = tf.reshape(buckets[0], [self._ranks, -1])
                lengths = [stop - start for start, stop in self._state.shard_ranges[slice(*unit.buckets)]]
                buckets = [tf.reshape(bucket, [-1]) for bucket in tf.split(by_rank, lengths, 1)]
            for index, bucket in zip(range(*unit.buckets), buckets, strict=True):
                slots = self._layout.slots[slice(*self._layout.buckets[index])]
                ends = [slots[0].start, *(slot.stop for slot in slots), self._layout.bucket_range(index)[1]]
                arrays = tf.split(bucket, np.diff(ends).tolist()) if len(slots) > 1 or ends[-1] > ends[-2] else [bucket]
                for slot, values in zip(slots, arrays, strict=False):
                    tensors[slot.name] = tf.reshape(values, slot.shape)
        return tensors

    def _scatter(self, unit: Unit, gradients: Mapping[str, tf.Tensor]) -> None:
        """Start to scatter a unit's gradients, or those of some of its buckets."""
        for index in range(*unit.buckets):
            slots = self._layout.slots[slice(*self._layout.buckets[index])]
            if slots[0].name not in gradients:
                continue
            flat = [tf.reshape(tf.cast(gradients[slot.name], tf.float32), [-1]) for slot in slots]
            padding = self._layout.bucket_range(index)[1] - slots[-1].stop
            flat += [tf.zeros(padding)] if padding else []
            bucket = flat[0] if len(flat) == 1 else tf.concat(flat, 0)
            started = _Scattering(self._exchange.start(bucket, index), index)
            self._scattering.append(started)
            self._scattered.append(started)

    def _last_scattered(self) -> list[tf.Tensor]:
        """Return this rank's shards of the gradients that were scattered last."""
        under_way, self._scattering = self._scattering, []
        return [one.wait() for one in under_way]

    def _slots(self, unit: Unit) -> Sequence[Slot]:
        first, last = self._layout.buckets[unit.buckets[0]][0], self._layout.buckets[unit.buckets[1] - 1][1]
        return self._layout.slots[first:last]


class _Scattering:
    """A bucket's gradients under way, whose shard several wait for."""

    def __init__(self, handle: Handle, index: int) -> None:
        self.index = index
        self._handle = handle
        self._result: tf.Tensor | None = None

    def wait(self) -> tf.Tensor:
        """Return this rank's shard of the sum."""
        if self._result is None:
            self._result = self._handle.wait()
        return self._result


def _after(tensor: tf.Tensor, others: Any) -> tf.Tensor:
    """Return ``tensor``, when ``others`` are there."""
    with tf.control_dependencies(list(others)):
        return tf.identity(tensor)
