"""Plugins that each break one contract, which ``pytest --hvdlm-plugin`` has to report (test_conformance.py)."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from hvdlm import hookimpl
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.errors import HvdlmError
from hvdlm.protocols.group import Done
from hvdlm.protocols.types import Batch
from hvdlm_backends.mpi4py import MPI4PyBackend
from hvdlm_corpora.tokenizers import CharTokenizer
from hvdlm_language.rnn import make_rnn

LETTERS = "abcdefghijklmnopqrstuvwxyz012345"


class Letters:
    """A sound task: the alphabet, from a letter on that follows from the row."""

    vocab, fingerprint, reads, tokenizer = 32, "letters", (), CharTokenizer(LETTERS)

    def rows(self, first, last):
        rows = np.arange(first, last)[:, None] * 7 + np.arange(8)[None]
        return Batch((rows % 32).astype(np.int32), ((rows + 1) % 32).astype(np.int32))

    def validation(self, rank, size):
        for row in range(rank, 8, size):
            yield Letters.rows(self, row, row + 1)

    def count(self, trainable, batch):
        return {}

    def metrics(self, sums):
        return {"val_loss": sums["loss"] / sums["tokens"]}

    def respond(self, trainable, prompt):
        return None


class Untrainable(Letters):
    """Its tokenizer can't be written into the run's folder."""

    tokenizer = SimpleNamespace(hash="none", vocab=32)


class Short(Letters):
    """Its rows end with its data."""

    def rows(self, first, last):
        return super().rows(min(first, 512), min(last, 512))


class Reusing(Letters):
    """All its batches share one array."""

    array = np.zeros((4, 8), np.int32)

    def rows(self, first, last):
        batch = super().rows(first, last)
        self.array[: last - first] = batch.inputs
        return replace(batch, inputs=self.array[: last - first])


class Entangled(Letters):
    """Its rows follow from where its validation has come to."""

    offset = 0

    def rows(self, first, last):
        time.sleep(0.01)
        return super().rows(first + self.offset, last + self.offset)

    def validation(self, rank, size):
        for batch in super().validation(rank, size):
            self.offset += 1
            yield batch
        self.offset = 0


class LossyTokenizer(CharTokenizer):
    def decode(self, ids):
        return super().decode(ids)[::-1] if len(ids) % 2 == 0 else super().decode(ids)


class Lossy(Letters):
    """Its tokenizer's decode is not the inverse of its encode."""

    tokenizer = LossyTokenizer(LETTERS)


class Forgetting(Letters):
    """It fails on one rank alone, when the run has begun."""

    def validation(self, rank, size):
        yield from super().validation(rank, size)
        if rank and size == 2:
            raise KeyError("the last row")


class Uncounted(Letters):
    """None of its targets counts."""

    def rows(self, first, last):
        batch = super().rows(first, last)
        return replace(batch, weights=np.zeros(batch.targets.shape, np.float32))


class Ragged(Letters):
    """Its rows are as long as their texts."""

    def rows(self, first, last):
        batch = super().rows(first, last)
        width = 8 - first % 2
        return Batch(batch.inputs[:, :width], batch.targets[:, :width])


class Misaligned(Letters):
    """Its inputs have one token more than its targets, and more than the context."""

    def rows(self, first, last):
        rows = np.arange(first, last)[:, None] * 7 + np.arange(65)[None]
        return Batch((rows % 32).astype(np.int32), ((rows[:, 1:] + 1) % 32).astype(np.int32))


class Partial(Letters):
    """It has no metrics, and doesn't say what its batches read."""

    def __getattribute__(self, name):
        if name in ("metrics", "reads"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def task_plugin(plugin_name, task, every_name=False):
    """Return a class of plugin that makes ``task``."""

    class Plugin:
        @hookimpl
        def hvdlm_make_task(self, name):
            return task() if every_name or name == plugin_name else None

    return Plugin


untrainable = task_plugin("untrainable", Untrainable)
short = task_plugin("short", Short)
reusing = task_plugin("reusing", Reusing)
entangled = task_plugin("entangled", Entangled)
lossy = task_plugin("lossy", Lossy)
forgetting = task_plugin("forgetting", Forgetting)
uncounted = task_plugin("uncounted", Uncounted)
ragged = task_plugin("ragged", Ragged)
misaligned = task_plugin("misaligned", Misaligned)
partial = task_plugin("partial", Partial)
greedy = task_plugin("greedy", Letters, every_name=True)


class Forgetful(MPI4PyBackend):
    """Its sums leave out the last rank, and it gathers this rank's array first."""

    name = "forgetful"

    def start(self, framework, groups, config):
        world = super().start(framework, groups, config)
        counts = world.rank < world.size - 1
        for group in getattr(world, "groups", {}).values():
            whole = group._all_reduce
            group._all_reduce = lambda tensor, *rest, whole=whole: whole(tensor * counts, *rest)
            gather = group._all_gather
            group._all_gather = lambda tensor, *rest, gather=gather: Done(
                gather(tensor, *rest).wait().roll(-world.rank * len(tensor), 0)
            )
        return world


class Averaging(MPI4PyBackend):
    """Its sums are means."""

    name = "averaging"

    def start(self, framework, groups, config):
        world = super().start(framework, groups, config)
        for group in getattr(world, "groups", {}).values():
            whole = group._all_reduce
            group._all_reduce = lambda tensor, *rest, whole=whole: whole(tensor / world.size, *rest)
        return world


class Crashing(MPI4PyBackend):
    """It can't start."""

    name = "crashing"

    def start(self, framework, groups, config):
        return self.address + 1


def backend_plugin(backend):
    """Return a class of plugin that makes ``backend``."""

    class Plugin:
        @hookimpl
        def hvdlm_make_backend(self, name):
            return backend() if name == backend.name else None

    return Plugin


forgetful = backend_plugin(Forgetful)
averaging = backend_plugin(Averaging)
crashing = backend_plugin(Crashing)


class Reordered(AllReduceExchange):
    """Its sums are in the opposite order."""

    def start(self, bucket, index):
        bucket[...] = bucket.flip(0)
        return super().start(bucket, index)


class reordered:
    @hookimpl
    def hvdlm_make_exchange(self, name, group):
        return Reordered(group) if name == "reordered" else None


def hiding(settings, seed, group_rank, ranks):
    """Return a compressor that keeps state in itself, where no checkpoint finds it."""
    from hvdlm_compression.compressor import Compressor

    class Hiding(Compressor):
        biased, calls = False, 0

        def compress(self, tensor, step):
            self.calls += 1
            return [tensor[::2] * (1.0 + 0.01 * self.calls)]

        def decompress(self, payload, shape, step):
            from keras import ops

            return ops.repeat(payload[0], 2)

    return Hiding(settings, seed, group_rank, ranks)


class hidden_state:
    @hookimpl
    def hvdlm_compressors(self):
        return {"hiding": hiding}


def make_peeking(model, vocab, context):
    spec = make_rnn(model, vocab, context, cell="rnn")
    return replace(spec, kind="peeking", implementations={"torch": "faulty_framework:Peeking"})


class peeking:
    @hookimpl
    def hvdlm_models(self):
        return {"peeking": make_peeking}


def framework_plugin(framework_name, class_name):
    """Return a class of plugin that makes a framework of faulty_framework.py."""

    class Plugin:
        @hookimpl
        def hvdlm_prepare(self, config):
            if config.framework == framework_name:
                os.environ["KERAS_BACKEND"] = "torch"

        @hookimpl
        def hvdlm_make_framework(self, name):
            if name != framework_name:
                return None
            import faulty_framework

            return faulty_framework.Framework(name, getattr(faulty_framework, class_name))

    return Plugin


misnamed = framework_plugin("misnamed", "Misnamed")
unsound = framework_plugin("unsound", "Unsound")


class idle(framework_plugin("idle", "Misnamed")):
    """A framework that refuses every model, and brings none."""

    @hookimpl
    def hvdlm_check(self, config, spec):
        if config.framework == "idle":
            raise HvdlmError(f"framework idle computes no {spec.kind}.")


class careless:
    """It reads an option that doesn't exist."""

    @hookimpl
    def hvdlm_check(self, config, spec):
        return config.plugin_options["careless"].limit
