"""Template of an architecture in both frameworks: the neural n-gram model of Bengio et al. 2003, eq. 1.

Copy this folder and rename template_model everywhere. The model is described once, here: names, shapes and initial
values of its parameters, the same for both frameworks. ``torch_model.py`` and ``tensorflow_model.py`` compute it, and
are imported by their framework only. Both compute, for tokens ``[rows, time]``::

    x_t = [embed.tokens[t - 3], ..., embed.tokens[t]]                # [rows, time, 4 * width]; zeros before the start
    logits = tanh(x @ hidden.weight + hidden.bias) @ head.weight + head.bias          # [rows, time, vocab]
"""

from dataclasses import dataclass

from hvdlm import hookimpl
from hvdlm.models.spec import Init, ModelSpec, ParamSpec

ORDER = 4  # tokens from which the next one is predicted


@dataclass(frozen=True)
class Settings:
    """Settings of the implementations; hvdlm also reads vocab, layers and width."""

    vocab: int
    width: int
    layers: int = 1


def make(model, vocab, context):
    """Return the description; ``model``: the options ``--model.*``; ``context``: the tokens of a sequence."""
    s = Settings(vocab, model.width)
    inner = ORDER * s.width
    # Each dimension has a logical axis, by which it can be sharded.
    # Init("normal", standard deviation); biases start at zero.
    params = (
        ParamSpec("embed.tokens", (vocab, s.width), ("vocab", "embed"), Init("normal", 1.0), decay=True),
        ParamSpec("hidden.weight", (inner, s.width), ("window", "mlp"), Init("normal", inner**-0.5), decay=True),
        ParamSpec("hidden.bias", (s.width,), ("mlp",), Init("zeros")),
        ParamSpec("head.weight", (s.width, vocab), ("mlp", "vocab"), Init("normal", 0.02), decay=True),
        ParamSpec("head.bias", (vocab,), ("vocab",), Init("zeros")),
    )
    flops = 6.0 * (inner * s.width + s.width * vocab)  # multiplication and addition, once forward, twice backward
    implementations = {
        "torch": "template_model.torch_model:NGram",
        "tensorflow": "template_model.tensorflow_model:NGram",
    }
    return ModelSpec("template_ngram", s, params, flops, implementations=implementations)


@hookimpl
def hvdlm_models():
    """Return the architectures by the names for --model.name."""
    return {"template_ngram": make}
