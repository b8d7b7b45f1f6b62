"""Parameters of encoder and decoder layers: attention, feed-forward, normalisation.

Every framework computes, with weights ``[inputs, outputs]``, ``h`` heads of ``d`` each::

    attention(x, y, mask) = join(softmax(q k^T / sqrt(d) + mask) v) @ output.weight + output.bias
        q = x @ query.weight + query.bias;  k, v of y;  each split into heads [rows, h, time, d]
    mlp(x) = relu(x @ up.weight + up.bias) @ down.weight + down.bias
    norm(x) = (x - mean) / sqrt(variance + 1e-5) * scale + bias
    positions[t, 2i] = sin(t / 10000^(2i/width)), positions[t, 2i+1] = cos(the same)   (Vaswani et al. 2017, sect. 3.5)

Layers are pre-norm (Xiong et al. 2020, figure 1b). An encoder layer: x += dropout(attention(n, n, padding mask)), n =
norm(x); x += dropout(mlp(norm(x))). A decoder layer has cross-attention to the encoder's output between the two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec

EPSILON = 1e-5


def linear(name: str, inputs: int, outputs: int, axes: tuple[str, str] = ("embed", "embed")) -> Iterator[ParamSpec]:
    """Yield a linear layer's weight ``[inputs, outputs]`` and bias (initial values: Glorot and Bengio 2010, eq. 16)."""
    bound = (6.0 / (inputs + outputs)) ** 0.5
    yield ParamSpec(f"{name}.weight", (inputs, outputs), axes, Init("uniform", bound), decay=True)
    yield ParamSpec(f"{name}.bias", (outputs,), axes[1:], Init("zeros"))


def norm(name: str, width: int) -> Iterator[ParamSpec]:
    """Yield a layer normalisation's scale and bias ``[width]``."""
    yield ParamSpec(f"{name}.scale", (width,), ("embed",), Init("ones"))
    yield ParamSpec(f"{name}.bias", (width,), ("embed",), Init("zeros"))


def attention(name: str, width: int) -> Iterator[ParamSpec]:
    """Yield the four linear layers of attention."""
    for projection in ("query", "key", "value", "output"):
        yield from linear(f"{name}.{projection}", width, width)


def layer(name: str, width: int, mlp_width: int, cross_attention: bool) -> Iterator[ParamSpec]:
    """Yield the parameters of an encoder layer, or with ``cross_attention`` of a decoder layer."""
    yield from norm(f"{name}.attention_norm", width)
    yield from attention(f"{name}.attention", width)
    if cross_attention:
        yield from norm(f"{name}.reading_norm", width)
        yield from attention(f"{name}.reading", width)
    yield from norm(f"{name}.mlp_norm", width)
    yield from linear(f"{name}.mlp.up", width, mlp_width, ("embed", "mlp"))
    yield from linear(f"{name}.mlp.down", mlp_width, width, ("mlp", "embed"))


def frequencies(width: int) -> np.ndarray:
    """Return the angular frequencies of sinusoidal positions, radians a position, float64 ``[ceil(width / 2)]``."""
    return 10000.0 ** (-np.arange(0, width, 2) / width)


def positions(length: int, width: int) -> np.ndarray:
    """Return sinusoidal positions, float32 ``[length, width]``."""
    angle = np.outer(np.arange(length), frequencies(width))
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, -1)[:, :width].astype(np.float32)


def check_heads(width: int, heads: int) -> None:
    """Check that ``width`` is a multiple of ``heads``.

    Raises:
        HvdlmError: it isn't.
    """
    if width % heads:
        raise HvdlmError(
            f"model.width {width} is not a multiple of model.heads {heads}: choose, for example, --model.width "
            f"{-(-width // heads) * heads}."
        )
