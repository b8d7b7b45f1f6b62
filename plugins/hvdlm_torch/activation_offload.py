"""Activations that wait in the host's memory for the backward pass (``train.activation_offload``).

Without a twin: TensorFlow's graphs have no hooks for what they keep.

What autograd keeps of a layer is copied to pinned memory of the host while the next layer computes, and freed when that
one is done. In the backward pass, a layer's activations are copied back while the layer that follows it in the model
computes (vDNN, Rhu et al. 2016, section 3.2). The GPU so holds those of two layers, whatever the model's depth. Copies
run on a stream of their own; the stream that computes waits for them where it needs their results or their memory, and
the host never waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_torch.gathered_layers import WholeLayers
from hvdlm_torch.saved_tensors import StorageCount

_WORTHWHILE = 2**16  # bytes: a copy of fewer costs more time than their memory is worth


class ActivationOffload:
    """Keeps what is saved for backward passes of layers, on ``device`` or in the host's memory.

    Args:
        device: on which the layers compute. On a CPU, where this saves nothing, streams do nothing.
        count: counts the bytes that are kept on the device.

    Attributes:
        smallest: bytes of the smallest storage that leaves the device.
    """

    def __init__(self, device: torch.device, count: StorageCount) -> None:
        self.smallest = _WORTHWHILE
        self._device = device
        self._count = count
        self._streams: Any = getattr(torch, device.type)
        self._stream = self._streams.Stream(device)
        self._computing: _Layer | None = None  # whose forward pass is under way
        self._before: _Layer | None = None  # the layer whose forward pass was the last one
        self._staying: _Layer | None = None  # the same layer until it leaves
        self._leaving: _Layer | None = None  # whose copies are under way; it has its memory until they have arrived
        self._returned: _Layer | None = None  # whose backward pass is under way
        self._constants: frozenset[int] = frozenset()

    def begin(self, first: bool) -> None:
        """Begin a layer's forward pass; ``first``: it is the first one of a pass through the model or its stage."""
        self.leave()
        self._computing = _Layer(None if first else self._before)

    def end(self) -> None:
        """End a layer's forward pass. It stays on the device until the next one begins or ``leave`` is called."""
        self._before = self._staying = self._computing
        self._computing = None

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let ``tensors``, which all layers use, stay on the device."""
        self._constants = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def pack(self, tensor: torch.Tensor) -> Kept | None:
        """Return what stands for a large tensor of the layer that computes; those of one storage are copied once."""
        layer, storage = self._computing, tensor.untyped_storage()
        if layer is None or storage.nbytes() < self.smallest or tensor.device != self._device:
            return None
        if storage.data_ptr() in self._constants:
            return None
        block = layer.block(storage.data_ptr()) or layer.add(_Block(storage, layer, self._count))
        return Kept(self, block, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def whole(self, block: _Block) -> torch.UntypedStorage:
        """Return the storage of ``block`` on the device, for a backward pass; copies of the next layer start."""
        if block.layer is not self._returned:
            self._return(block.layer)
        assert block.on_device is not None
        return block.on_device.untyped_storage()

    def leave(self) -> None:
        """Start to copy the last layer to the host, and free the one before it, which has arrived by then."""
        layer, self._staying = self._staying, None
        if layer is None:
            return
        self._free()
        blocks = [block for block in layer.blocks() if block.on_device is not None]
        if not blocks:  # its backward pass is over
            return
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            for block in blocks:
                block.copy_to_host(pinned=self._device.type != "cpu")
        layer.copied = self._stream.record_event()
        self._leaving = layer

    def _free(self) -> None:
        """Wait until the layer that leaves has arrived on the host, and free its memory on the device."""
        layer, self._leaving = self._leaving, None
        if layer is not None:
            self._streams.current_stream(self._device).wait_event(layer.copied)
            for block in layer.blocks():
                block.free_on_device()
            layer.away = True

    def _return(self, layer: _Layer) -> None:
        """Have ``layer`` on the device, for its backward pass, and the layer before it on its way."""
        self._returned = layer
        if layer is self._leaving:
            self._leaving = None
        if layer.away:  # nothing has asked for it before: the first backward pass of a stage
            self.leave()
            self._free()
            self._copy_back(layer)
        if layer.returning:
            self._streams.current_stream(self._device).wait_event(layer.copied)
            layer.returning = False
        if layer.before is not None and layer.before.away:
            self._copy_back(layer.before)
        layer.before = None  # which would keep the whole pass alive

    def _copy_back(self, layer: _Layer) -> None:
        blocks = layer.blocks()
        for block in blocks:
            block.make_on_device(self._device)
        # What computes now may still use the memory that the blocks get.
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            for block in blocks:
                block.copy_to_device()
        layer.copied, layer.away, layer.returning = self._stream.record_event(), False, True


class Kept(NamedTuple):
    """What stands for a saved tensor: the block of its storage, and its shape in it."""

    offload: ActivationOffload
    block: _Block
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> torch.Tensor:
        """Return the tensor, on the device."""
        storage = self.offload.whole(self.block)
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.size, self.stride
        )


class _Layer:
    """What autograd keeps of one forward pass of a layer.

    Attributes:
        before: the layer of the same pass whose turn in the backward pass is next; None: there is none.
        copied: the event at the end of its newest copies.
        away: whether its memory on the device is freed.
        returning: whether nothing has waited yet for the copies back.
    """

    def __init__(self, before: _Layer | None) -> None:
        self.before = before
        self.copied: Any = None
        self.away = self.returning = False
        self._blocks: dict[int, weakref.ref[_Block]] = {}

    def block(self, address: int) -> _Block | None:
        """Return the block of the storage at ``address``, if autograd still keeps a tensor of it."""
        reference = self._blocks.get(address)
        return reference() if reference else None

    def blocks(self) -> list[_Block]:
        """Return the blocks of which autograd still keeps tensors."""
        return [block for reference in self._blocks.values() if (block := reference()) is not None]

    def add(self, block: _Block) -> _Block:
        """Add ``block`` and return it."""
        self._blocks[block.address] = weakref.ref(block)
        return block


class _Block:
    """The bytes of a storage, on the device or the host; they count while they are on the device.

    Attributes:
        layer: that has saved it.
        address: where it was on the device at first.
        on_device: uint8 ``[bytes]``; None: it isn't there.
    """

    def __init__(self, storage: torch.UntypedStorage, layer: _Layer, count: StorageCount) -> None:
        self.layer = layer
        self.address = storage.data_ptr()
        self.on_device: torch.Tensor | None = None
        self._on_host: torch.Tensor | None = None
        self._bytes = storage.nbytes()
        self._count = count
        self._hold(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))

    def _hold(self, on_device: torch.Tensor) -> None:
        self.on_device = on_device
        storage = on_device.untyped_storage()
        self._counted = storage.data_ptr()
        self._count.add(storage)

    def copy_to_host(self, pinned: bool) -> None:
        """Start to copy; the caller's stream does it."""
        assert self.on_device is not None
        self._on_host = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=pinned)
        self._on_host.copy_(self.on_device, non_blocking=True)

    def free_on_device(self) -> None:
        """Keep the copy on the host alone."""
        if self.on_device is not None:
            self.on_device = None
            self._count.remove(self._counted, self._bytes)

    def make_on_device(self, device: torch.device) -> None:
        """Have memory on the device again."""
        self._hold(torch.empty(self._bytes, dtype=torch.uint8, device=device))

    def copy_to_device(self) -> None:
        """Start to copy; the caller's stream does it. PyTorch reuses the host's memory when that is done."""
        assert self.on_device is not None and self._on_host is not None
        self.on_device.copy_(self._on_host, non_blocking=True)
        self._on_host = None

    def __del__(self) -> None:
        self.free_on_device()


class OffloadedLayers(WholeLayers):
    """Tells an offload where layers begin and end, around what ``layers`` does there."""

    def __init__(self, layers: WholeLayers, shard: ModelShard, offload: ActivationOffload) -> None:
        self._layers = layers
        self._offload = offload
        self._names = {f"layers.{number}" for number in shard.layers}
        self._first = f"layers.{shard.layers[0]}"
        # The backward pass of the model's last layer begins right after its forward pass; of other stages it doesn't.
        self._last = "" if shard.stage.last else f"layers.{shard.layers[-1]}"

    def enter(self, x: Any, name: str) -> Any:
        """Begin layer ``name``."""
        x = self._layers.enter(x, name)
        if name in self._names and torch.is_grad_enabled():
            self._offload.begin(name == self._first)
        return x

    def leave(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """End layer ``name``."""
        if name in self._names and torch.is_grad_enabled():
            self._offload.end()
            if name == self._last:
                self._offload.leave()
        return self._layers.leave(x, name)

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let ``tensors``, which all layers use, stay on the device."""
        self._offload.share(tensors)
