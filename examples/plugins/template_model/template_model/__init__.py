"""A template of an architecture in both frameworks: the neural n-gram model of Bengio et al. 2003, eq. 1.

Copy this folder and rename what is called template_model. The model is described once, here: names, shapes and initial
values of its parameters, from which both frameworks start. ``torch_model.py`` and ``tensorflow_model.py`` compute it,
and are imported by their framework only. What both compute, for tokens ``[rows, time]``::

    x_t = [embed.tokens[t - 3], ..., embed.tokens[t]]                # [rows, time, 4 * width]; zeros before the start
    logits = tanh(x @ hidden.weight + hidden.bias) @ head.weight + head.bias          # [rows, time, vocab]
"""

from dataclasses import dataclass

from hvdlm import hookimpl
from hvdlm.models.spec import Init, ModelSpec, ParamSpec

ORDER = 4  # tokens that the next one is guessed from


@dataclass(frozen=True)
class Settings:
    """What the implementations read. hvdlm reads vocab, layers and width too."""

    vocab: int
    width: int
    layers: int = 1


def make(model, vocab, context):
    """Return the description; ``model`` are the options ``--model.*``, ``context`` the tokens in a sequence."""
    s = Settings(vocab, model.width)
    inner = ORDER * s.width
    # Logical axes name what a dimension stands for. Init("normal", standard deviation); biases start at zero.
    params = (
        ParamSpec("embed.tokens", (vocab, s.width), ("vocab", "embed"), Init("normal", 1.0), decay=True),
        ParamSpec("hidden.weight", (inner, s.width), ("window", "mlp"), Init("normal", inner**-0.5), decay=True),
        ParamSpec("hidden.bias", (s.width,), ("mlp",), Init("zeros")),
        ParamSpec("head.weight", (s.width, vocab), ("mlp", "vocab"), Init("normal", 0.02), decay=True),
        ParamSpec("head.bias", (vocab,), ("vocab",), Init("zeros")),
    )
    flops = 6.0 * (inner * s.width + s.width * vocab)  # a multiplication and an addition, forward once, backward twice
    implementations = {
        "torch": "template_model.torch_model:NGram",
        "tensorflow": "template_model.tensorflow_model:NGram",
    }
    return ModelSpec("template_ngram", s, params, flops, implementations=implementations)


@hookimpl
def hvdlm_models():
    """The names that --model.name takes."""
    return {"template_ngram": make}
