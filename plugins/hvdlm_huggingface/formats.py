"""The architectures of Hugging Face transformers that hvdlm reads and writes."""

from __future__ import annotations

from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm_huggingface.gpt_formats import GPT2, GPTNeoX
from hvdlm_huggingface.llama_formats import Gemma, Llama, Mistral, Qwen2, Qwen3
from hvdlm_huggingface.tensor_format import Format
from hvdlm_language.gpt import GPTSettings

FORMATS: dict[str, Format] = {
    architecture.name: architecture
    for architecture in (GPT2(), Llama(), Mistral(), Qwen2(), Qwen3(), GPTNeoX(), Gemma())
}


def format_of(spec: ModelSpec, preset: str | None) -> Format:
    """Return the format of an architecture that computes this model: that of ``preset``, if it does, else the first.

    Raises:
        HvdlmError: there is none.
    """
    s = spec.settings
    if not isinstance(s, GPTSettings):
        raise HvdlmError(f"Hugging Face has no model like a {spec.kind}: only GPTs have such formats.")
    # The first of equals is the preset's.
    candidates = sorted(FORMATS.values(), key=lambda candidate: candidate.preset != preset)
    closest = min(candidates, key=lambda candidate: len(candidate.unmet(s)))
    if unmet := closest.unmet(s):
        required = ", ".join(f"{name} {value}, not {getattr(s, name)}" for name, value in unmet.items())
        raise HvdlmError(
            f"this model has settings which no Hugging Face model has together (the closest, {closest.name}, has "
            f"{required}): write it with --format safetensors."
        )
    return closest
