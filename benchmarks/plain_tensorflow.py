"""The loop that a careful user of TensorFlow and Horovod writes by hand, over the same model code as hvdlm's."""

from __future__ import annotations

import math
import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

from hvdlm.training.run import Run
from hvdlm_tensorflow.models import make_model


class PlainLoop:
    """One parameter a variable, Keras's AdamW, one grouped all-reduce; nothing of hvdlm's loop."""

    def __init__(self, run: Run) -> None:
        self._c, self._tokens = run.config, run.task.data.train
        self._rows = run.config.train.batch_size // run.world.size
        self._random = np.random.default_rng(run.world.rank)
        self._model: Any = make_model(run.spec)
        self._names = [p.name for p in run.spec.params]
        self._variables = [tf.Variable(p.initial(1)) for p in run.spec.params]
        t = run.config.train
        # Clipping is done here, so that it sees the summed gradient.
        self._optimizer = keras.optimizers.AdamW(t.learning_rate, t.weight_decay, t.beta1, t.beta2, t.epsilon)
        self._optimizer.build(self._variables)
        self._hvd: Any = None
        if run.world.size > 1:
            import horovod.tensorflow as hvd

            self._hvd = hvd
        self._graph = tf.function(self._train)
        self._step = 0

    def _train(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            self._model.bind(dict(zip(self._names, self._variables, strict=True)))
            hidden, _ = self._model.hidden(inputs, None, True, False, tf.constant([0, 0]))
            scores = self._model.scores(hidden)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=scores))
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, self._variables)]
        if self._hvd:
            gradients = self._hvd.grouped_allreduce(gradients, op=self._hvd.Average, name="plain")
        if self._c.train.clip:
            gradients, _ = tf.clip_by_global_norm(gradients, self._c.train.clip)
        self._optimizer.apply_gradients(zip(gradients, self._variables, strict=True))
        return loss

    def step(self) -> None:
        """Do one step; every tenth one looks at the loss, as a user who logs would."""
        context = self._c.data.context
        starts = self._random.integers(0, len(self._tokens) - context - 1, self._rows)
        windows = np.stack([self._tokens[s : s + context + 1] for s in starts]).astype(np.int32)
        self._optimizer.learning_rate.assign(1e-4 + 4.5e-4 * (1 + math.cos(math.pi * min(1.0, self._step / 1000))))
        loss = self._graph(tf.constant(windows[:, :-1]), tf.constant(windows[:, 1:]))
        self._step += 1
        if self._step % 10 == 0:
            loss.numpy()
