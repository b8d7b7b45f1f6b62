"""Template of a framework: training around a library that computes losses and gradients, here PyTorch's autograd.

Copy this folder, rename template_framework everywhere, and replace ``library.py``. ``trainable.py`` calls nothing of
the library: parameters, gradients and the optimizer are numpy arrays, which backend ``mpi4py`` sends as they are.
``examples/plugins/jax`` shows a framework whose tensors are its own, and which compiles the whole step.
"""

import importlib.util
import os

from hvdlm import hookimpl
from hvdlm.errors import HvdlmError
from hvdlm.protocols.framework import Probe
from hvdlm_language.gpt import extensions

LIBRARY = "torch"


@hookimpl
def hvdlm_prepare(config):
    """Set what the library, and Keras for compressors, read from the environment when they are imported."""
    if config.framework == "template_framework":
        os.environ["KERAS_BACKEND"] = LIBRARY


@hookimpl
def hvdlm_check(config, spec):
    """Refuse what this framework does not implement, before ranks connect."""
    if config.framework != "template_framework":
        return
    if importlib.util.find_spec(LIBRARY) is None:
        raise HvdlmError(f"framework template_framework needs {LIBRARY}: pip install {LIBRARY}.")
    if spec.kind not in ("gpt", "rnn") or config.lora.rank:
        raise HvdlmError("framework template_framework computes GPTs and recurrent models without adapters.")
    if spec.kind == "gpt" and (more := extensions(spec.settings)):
        raise HvdlmError(f"framework template_framework has no {more[0]}: choose --model.name gpt, gpt2 or llama.")
    for section, option, *supported in (
        ("model", "dropout", 0.0),
        ("parallel", "tensor", 1),
        ("parallel", "pipeline", 1),
        ("train", "optimizer", "adamw"),
        ("train", "groups", None),
        ("train", "precision", "auto", "fp32"),
        ("train", "compile", "auto", None, False),
    ):
        value = getattr(getattr(config, section), option)
        if value not in supported:
            raise HvdlmError(
                f"framework template_framework has no {section}.{option} {value}: leave it {supported[0]}."
            )


@hookimpl
def hvdlm_probes():
    """Return how ``python -m hvdlm doctor`` examines the library."""
    return {"template_framework": Probe("import torch; report(version=torch.__version__, gpus=0)", "pip install torch")}


@hookimpl
def hvdlm_make_framework(name):
    """Return the framework; None for another name."""
    if name != "template_framework":
        return None
    from template_framework.trainable import Framework

    return Framework()
