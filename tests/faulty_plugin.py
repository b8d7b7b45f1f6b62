"""Faulty plugins, whose faults ``pytest --hvdlm-plugin`` has to report (test_conformance.py)."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import mpi4py  # noqa: F401
import numpy as np

from hvdlm import hookimpl
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.protocols.types import Batch
from hvdlm_language.rnn import make_rnn


def unseeded(model, vocab, context):
    """Draw initial values without a seed, and describe a parameter twice."""
    spec = make_rnn(model, vocab, context, cell="rnn")

    def source(seed, box):
        return np.random.normal(size=[s.stop - s.start for s in box]).astype(np.float32)

    return replace(spec, params=(*(replace(param, source=source) for param in spec.params), spec.params[0]))


def wrong_sign(settings, seed, group_rank, ranks):
    """Return a compressor with a payload larger than the tensor, a wrong sign, and unseeded noise."""
    from keras import ops

    from hvdlm_compression.compressor import Compressor

    class WrongSign(Compressor):
        biased = False

        def compress(self, tensor, step):
            noise = np.random.normal(scale=1e-3, size=tuple(tensor.shape)).astype(np.float32)
            return [tensor + ops.convert_to_tensor(noise), tensor]

        def decompress(self, payload, shape, step):
            return -payload[0]

    return WrongSign(settings, seed, group_rank, ranks)


class Faulty:
    @hookimpl
    def hvdlm_models(self):
        return {"gpt": unseeded, "unseeded": unseeded}

    @hookimpl
    def hvdlm_compressors(self):
        return {"wrong_sign": wrong_sign}

    @hookimpl
    def hvdlm_run_started(self, world):
        self.rank = world.rank

    @hookimpl
    def hvdlm_step_ended(self, step):
        return step / (1 - self.rank)


class Letters(ByteTokenizer):
    """Its description lacks what it was trained on, so that any other loads as the same."""

    @staticmethod
    def train(texts, size=None):
        return Letters()

    @staticmethod
    def load(description):
        return Letters()

    def to_json(self):
        return {"kind": "letters"}

    def encode(self, text, special=False):
        return super().encode(text).astype(np.int64)


class Dotted(Letters):
    """Its name is taken for the path of a file."""

    @staticmethod
    def train(texts, size=None):
        return Dotted()

    def to_json(self):
        return {"kind": "two.letters"}


class Data:
    @hookimpl
    def hvdlm_tokenizers(self):
        return {"letters": Letters, "char": Letters, "two.letters": Dotted}

    @hookimpl
    def hvdlm_data_preparer(self, data):
        return SimpleNamespace(check=None, open=print)


class Normalised:
    """An optimizer whose updates depend on the norm of the whole vector."""

    state, decoupled = (), True

    def __init__(self, train):
        pass

    def update(self, parameters, gradient, state, learning_rate, step):
        from keras import ops

        return parameters - learning_rate * gradient / ops.sqrt(ops.sum(gradient * gradient)), {}


class Rules:
    @hookimpl
    def hvdlm_optimizers(self):
        return {"adagrad": Normalised, "normalised": Normalised}

    @hookimpl
    def hvdlm_lr_schedules(self):
        return {"endless": lambda train: lambda step: 1.0 if step < 5 else float("nan")}


class Hooks:
    @hookimpl
    def hvdlm_step_finished(self, step):
        pass

    def hvdlm_evaluated(self, step):
        pass

    @hookimpl
    def hvdlm_checkpoint_saved(self, where):
        pass


@dataclass
class Sizes:
    """Sizes."""

    size: int


class Options:
    @hookimpl
    def hvdlm_options(self):
        return {"train": Sizes}


class Writer:
    @hookimpl
    def hvdlm_run_started(self, config):
        (Path(config.log.run) / "notes.txt").write_text("begun")


class RankDependentTask:
    """A task whose rows depend on the rank, and of which every rank evaluates the whole split."""

    vocab, fingerprint, reads, tokenizer = 32, "letters", (), SimpleNamespace(hash="none")

    def rows(self, first, last):
        rows = np.arange(last - first)[:, None] + np.arange(8)[None] + first // 4
        return Batch((rows % 32).astype(np.int32), (rows + 1) % 32)

    def validation(self, rank, size):
        yield replace(self.rows(0, 4), targets=self.rows(0, 4).targets.astype(np.int32))

    def count(self, trainable, batch):
        return {}

    def metrics(self, sums):
        return {"val_loss": sums["loss"] / sums["tokens"]}

    def respond(self, trainable, prompt):
        return None


class Task:
    @hookimpl
    def hvdlm_make_task(self, name, config):
        return RankDependentTask() if name == "faulty_task" else None


class Backend:
    @hookimpl
    def hvdlm_make_backend(self, name):
        return SimpleNamespace(name="faulty_backend")
