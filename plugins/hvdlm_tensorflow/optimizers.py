"""Update rules on flat vectors: TensorFlow's fused operations, with a weight decay and learning rate for every element.

AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD with momentum (Sutskever et al. 2013) and Nesterov's variant,
Adagrad (Duchi et al. 2011), by the equations in PyTorch's documentation; the torch plugin computes the same.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import tensorflow as tf

from hvdlm.config import TrainConfig
from hvdlm.parallel.parameter_groups import UpdateRates
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm_tensorflow.slices import Shrinking

_MOST_RUNS = 256
"""Ranges that are decayed one by one, without a vector of the weight decay. More of them take long to trace."""


class FlatOptimizer:
    """One update rule over a flat float32 parameter vector ``[size]``.

    ``rates``: weight decay and factor of the learning rate, of every element. ``own``: a plugin's rule. ``in_place``:
    weights are decayed range by range, without a vector of the weight decay, which takes longer.
    """

    def __init__(
        self,
        config: TrainConfig,
        parameter: tf.Variable,
        rates: UpdateRates,
        own: Optimizer | None = None,
        in_place: bool = False,
    ) -> None:
        self._config = config
        self._parameter = parameter
        self._decoupled = own.decoupled if own else config.optimizer == "adamw"
        runs = _runs(rates.decays)
        in_place = in_place and self._decoupled and len(runs) <= _MOST_RUNS
        self._shrinking = Shrinking(parameter, runs) if runs and in_place else None
        self._decays = tf.constant(rates.decays) if runs and not in_place else None  # of every element
        self._scales = None if rates.scales is None else tf.constant(rates.scales)
        self._own = own
        self._state = {
            kind: tf.Variable(tf.zeros_like(parameter), trainable=False) for kind in optimizer_state(config, own)
        }

    @property
    def state(self) -> dict[str, tf.Variable]:
        """The rule's state by kind: flat float32 ``[size]``."""
        return self._state

    def update(self, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """Apply ``gradient`` ``[size]`` as update number ``step`` (from 0), in a graph."""
        before = None if self._scales is None else tf.identity(self._parameter.read_value())
        self._apply(gradient, learning_rate, step)
        if before is not None:  # no rule's state depends on the rate
            self._parameter.assign(interpolated(before, self._parameter.read_value(), self._scales))

    def _apply(self, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """Apply the rule with one learning rate."""
        if self._decays is not None and self._decoupled:
            tf.raw_ops.ResourceApplyGradientDescent(
                var=self._parameter.handle, alpha=learning_rate, delta=self._decays * self._parameter
            )
        elif self._decays is not None:  # L2 regularisation: part of the gradient
            gradient += self._decays * self._parameter
        decayed = [self._shrinking.apply(learning_rate, gradient)] if self._shrinking else []
        with tf.control_dependencies(decayed):
            if self._own:
                self._apply_own(self._own, gradient, learning_rate, tf.cast(step, tf.float32))
                return
            rules = {"adamw": self._adamw, "sgd": self._sgd, "adagrad": self._adagrad}
            rules[self._config.optimizer](gradient, learning_rate, tf.cast(step + 1, tf.float64))

    def _apply_own(self, rule: Optimizer, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """Apply a plugin's rule."""
        values = {name: variable.read_value() for name, variable in self._state.items()}
        parameter, state = rule.update(self._parameter.read_value(), gradient, values, learning_rate, step)
        self._parameter.assign(parameter)
        for name, variable in self._state.items():
            variable.assign(state[name])

    def _adamw(self, gradient: tf.Tensor, learning_rate: tf.Tensor, count: tf.Tensor) -> None:
        c = self._config
        power1, power2 = c.beta1**count, c.beta2**count
        # The operation adds epsilon before the bias correction of the second moment; torch adds it after.
        epsilon = tf.cast(c.epsilon * tf.sqrt(1.0 - power2), tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=self._parameter.handle,
            m=self._state["first_moment"].handle,
            v=self._state["second_moment"].handle,
            beta1_power=tf.cast(power1, tf.float32),
            beta2_power=tf.cast(power2, tf.float32),
            lr=learning_rate,
            beta1=c.beta1,
            beta2=c.beta2,
            epsilon=epsilon,
            grad=gradient,
        )

    def _sgd(self, gradient: tf.Tensor, learning_rate: tf.Tensor, count: tf.Tensor) -> None:
        if not self._config.momentum_value:
            self._parameter.assign_sub(learning_rate * gradient)
            return
        tf.raw_ops.ResourceApplyMomentum(
            var=self._parameter.handle,
            accum=self._state["momentum"].handle,
            lr=learning_rate,
            grad=gradient,
            momentum=self._config.momentum_value,
            use_nesterov=self._config.nesterov,
        )

    def _adagrad(self, gradient: tf.Tensor, learning_rate: tf.Tensor, count: tf.Tensor) -> None:
        tf.raw_ops.ResourceApplyAdagradV2(
            var=self._parameter.handle,
            accum=self._state["sum_of_squares"].handle,
            lr=learning_rate,
            epsilon=self._config.epsilon,
            grad=gradient,
        )


def interpolated(start: tf.Tensor, stop: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Return the vector between ``start`` (where the weight is 0) and ``stop`` (1), as torch.lerp rounds it."""
    change = stop - start
    return tf.where(weights < 0.5, start + weights * change, stop - change * (1.0 - weights))


def _runs(decays: np.ndarray) -> list[tuple[int, int, float]]:
    """Return the maximal (start, stop, weight decay) of neighbours with the same weight decay, which is not 0."""
    ends = [0, *(np.flatnonzero(np.diff(decays)) + 1).tolist(), len(decays)]
    return [(start, stop, float(decays[start])) for start, stop in pairwise(ends) if stop > start and decays[start]]
