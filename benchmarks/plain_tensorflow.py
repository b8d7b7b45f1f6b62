"""The training loop that a careful user of TensorFlow and Horovod writes by hand, on hvdlm's model."""

from __future__ import annotations

import math
import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

from hvdlm.config import ParallelConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.training.run import Run
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models import make_model


def unsharded_model(run: Run) -> Any:
    """Return the model of ``run`` without sharding, its parameters not yet bound.

    Everything used of hvdlm's TensorFlow plugin is called in this function and in ``PlainLoop.loss``.
    """
    layout = make_model_shard(run.spec, Mesh(1, 1, 1), 0, ParallelConfig())
    collectives = Collectives(run.world.group((run.world.rank,)), layout)
    return make_model(run.spec, layout, collectives, tf.float32)


class PlainLoop:
    """A variable per parameter, Keras's AdamW, one grouped all-reduce after the backward pass."""

    def __init__(self, run: Run) -> None:
        train = run.config.train
        self._tokens = run.task.data.train
        self._context = run.config.data.context
        self._rows = train.batch_size // run.world.size
        self._clip = train.clip
        self._random = np.random.default_rng(run.world.rank)
        self._model = unsharded_model(run)
        self._names = [p.name for p in run.spec.params]
        self._variables = [tf.Variable(p.initial(train.seed)) for p in run.spec.params]
        # The optimizer doesn't clip: what is clipped is the summed gradient.
        self._optimizer = keras.optimizers.AdamW(
            train.learning_rate, train.weight_decay, train.beta1, train.beta2, train.epsilon
        )
        self._optimizer.build(self._variables)
        self._horovod: Any = None
        if run.world.size > 1:
            import horovod.tensorflow

            self._horovod = horovod.tensorflow
        # No branch or loop depends on a tensor: autograph would take 3 s to rewrite the code, for the same graph.
        self._graph = tf.function(self._train, autograph=False)
        self._step = 0

    def loss(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Return the mean loss of a batch in nats per token."""
        self._model.bind(dict(zip(self._names, self._variables, strict=True)))
        hidden, _ = self._model.hidden(inputs, None, None, True, False, tf.constant([0, 0]))
        scores = self._model.scores(hidden)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=scores))

    def loss_of(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean loss of a batch of arrays, without training."""
        return float(self.loss(tf.constant(inputs), tf.constant(targets)))

    def _train(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = self.loss(inputs, targets)
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, self._variables)]
        if self._horovod:
            gradients = self._horovod.grouped_allreduce(gradients, op=self._horovod.Average, name="plain")
        if self._clip:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip)
        self._optimizer.apply_gradients(zip(gradients, self._variables, strict=True))
        return loss

    def step(self) -> None:
        """Do one step; every tenth one reads the loss, as a user who logs it would."""
        starts = self._random.integers(0, len(self._tokens) - self._context - 1, self._rows)
        windows = np.stack([self._tokens[s : s + self._context + 1] for s in starts]).astype(np.int32)
        self._optimizer.learning_rate.assign(1e-4 + 4.5e-4 * (1 + math.cos(math.pi * min(1.0, self._step / 1000))))
        loss = self._graph(tf.constant(windows[:, :-1]), tf.constant(windows[:, 1:]))
        self._step += 1
        if self._step % 10 == 0:
            loss.numpy()
