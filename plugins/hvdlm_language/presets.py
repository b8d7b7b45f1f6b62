"""The language models that ``model.name`` takes, each a plugin of its name."""

from __future__ import annotations

from collections.abc import Mapping

from hvdlm import hookimpl
from hvdlm.models.spec import ModelMaker
from hvdlm_language.gpt import PRESETS as GPTS
from hvdlm_language.rnn import PRESETS as RNNS

PRESETS: Mapping[str, ModelMaker] = {**GPTS, **RNNS}


class Preset:
    """Plugin that brings one model."""

    def __init__(self, name: str) -> None:
        self._name = name

    @hookimpl
    def hvdlm_models(self) -> Mapping[str, ModelMaker]:
        """Return the model by its name."""
        return {self._name: PRESETS[self._name]}


gpt, gpt2, llama, mistral = Preset("gpt"), Preset("gpt2"), Preset("llama"), Preset("mistral")
qwen2, qwen3, neox, gemma = Preset("qwen2"), Preset("qwen3"), Preset("neox"), Preset("gemma")
rnn, gru, lstm = Preset("rnn"), Preset("gru"), Preset("lstm")
