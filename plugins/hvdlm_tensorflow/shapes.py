"""Sizes of tensors in graphs, integers where they are known: each operation has to be traced and optimized.

Without a twin: in PyTorch they are integers.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def sizes(x: tf.Tensor) -> list[Any]:
    """Return the sizes of ``x``: integers, and scalar int32 tensors where they are open in the graph."""
    if x.shape.is_fully_defined():
        return x.shape.as_list()
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]
