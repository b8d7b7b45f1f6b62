"""Convolutional image classifier: a small variant of LeNet (LeCun et al. 1998).

Weights start uniform with variance 1 / inputs (LeCun et al. 1998, Efficient BackProp, equation 16): after 10 epochs on
6,400 of MNIST's images, 96.8% of 1,600 others are classified correctly, 96.3% with a bound of inputs**-0.5 (mean of 5
seeds).

Every framework computes, from the feature ``images`` ``[rows, 28, 28]``::

    x = relu(max_pool(conv.0(images)))     # 10 kernels of 5 x 5, no padding; maxima of 2 x 2: [rows, 12, 12, 10]
    x = relu(max_pool(conv.1(x)))          # 20 kernels of 5 x 5: [rows, 4, 4, 20]
    x = dropout(relu(x @ dense.weight + dense.bias))     # x flattened [rows, 4 * 4 * 20]: 50 units
    logits = x @ head.weight + head.bias   # [rows, 1, vocab]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvdlm import hookimpl
from hvdlm.config import ModelConfig
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec

SIDE = 28  # pixels
KERNEL = 5
READS = ("images",)
IMPLEMENTATIONS = {
    "torch": "hvdlm_tasks.torch_models.convnet:Convnet",
    "tensorflow": "hvdlm_tasks.tensorflow_models.convnet:Convnet",
}


@dataclass(frozen=True)
class ConvnetSettings:
    """The network's resolved settings; all but ``vocab`` and ``dropout`` are fixed."""

    vocab: int
    dropout: float
    layers: int = 1
    width: int = 50


def make_convnet(config: ModelConfig, vocab: int, context: int) -> ModelSpec:
    """Return the description of the network; of the model's options it uses only dropout."""
    s = ConvnetSettings(vocab, config.dropout)
    shapes = {
        "conv.0": (KERNEL, KERNEL, 1, 10),
        "conv.1": (KERNEL, KERNEL, 10, 20),
        "dense": (4 * 4 * 20, s.width),
        "head": (s.width, vocab),
    }
    params, flops = [], 0.0
    for name, shape in shapes.items():
        inputs = 1
        for n in shape[:-1]:
            inputs *= n
        init = Init("uniform", (3 / inputs) ** 0.5)  # variance 1 / inputs
        params.append(ParamSpec(f"{name}.weight", shape, ("own",) * len(shape), init, decay=True))
        params.append(ParamSpec(f"{name}.bias", shape[-1:], ("own",), Init("zeros")))
        positions = {"conv.0": 24 * 24, "conv.1": 8 * 8}.get(name, 1)
        flops += 6.0 * positions * inputs * shape[-1]
    return ModelSpec("convnet", s, tuple(params), flops, reads=READS, implementations=IMPLEMENTATIONS)


@hookimpl
def hvdlm_models() -> Mapping[str, ModelMaker]:
    """Return the model ``convnet``."""
    return {"convnet": make_convnet}
