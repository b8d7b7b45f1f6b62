"""Checks the options of automatic communication against the rest of the configuration."""

from __future__ import annotations

from hvdlm.config import CompressionConfig, Config
from hvdlm.errors import HvdlmError

FRAMEWORKS = ("torch", "tensorflow")  # which trace a step anew where its method changes


def check(config: Config) -> None:
    """Check what ``communication.auto`` needs.

    Raises:
        HvdlmError: the first option that contradicts it.
    """
    options, parallel = config.communication, config.parallel
    if options.exchange == "auto":
        raise HvdlmError("communication.exchange auto is no exchange: leave it out, and set --communication.auto true.")
    if not options.auto:
        if options.max_loss_gap:
            raise HvdlmError(
                f"communication.max_loss_gap {options.max_loss_gap:g} limits what --communication.auto true may "
                "choose: set that, too, or leave it out."
            )
        return
    ranks = max(parallel.tensor, parallel.pipeline)
    contradictions = {
        f"communication.exchange {options.exchange}": "the ranks of rounds differ from the first step to the last, so "
        "that it can't be switched to"
        if options.exchange != "all_reduce"
        else "",
        "options of communication.compression": "it chooses the algorithm, with the options whose loss was measured"
        if options.compression != CompressionConfig()
        else "",
        f"communication.reduction {options.reduction}": "compressors only add gradients up"
        if options.reduction in ("adasum", "exact")
        else "",
        "communication.autotune": "Horovod would change the times that are measured" if options.autotune else "",
        f"parallel.zero {parallel.zero}": "compressors need whole gradients" if parallel.zero else "",
        "parallel.tensor and parallel.pipeline above 1": "it predicts the backward pass of a rank that has all layers"
        if ranks > 1
        else "",
        "communication.max_loss_gap in train.precision fp16": "compressors keep state that its loss scale would falsify"
        if options.max_loss_gap and config.train.precision == "fp16"
        else "",
        f"framework {config.framework}": f"its plugin doesn't change the method between steps: choose "
        f"{' or '.join(FRAMEWORKS)}"
        if config.framework not in FRAMEWORKS
        else "",
    }
    reason = next((f"{option}: {why}" for option, why in contradictions.items() if why), None)
    if reason is not None:
        raise HvdlmError(f"communication.auto can't be combined with {reason}; leave one of the two out.")
