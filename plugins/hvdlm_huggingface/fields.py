"""The fields of a config.json: values of theirs, which describe no computation, and which are left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hvdlm_language.gpt import GPTSettings

# transformers/activations.py: classes that compute the same function.
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
EXACT_GELU = ("gelu", "gelu_python")
SILU = ("silu", "swish")

# Fields of transformers' PreTrainedConfig and of its models' that don't change logits: names, training,
# generation and heads of other tasks.
_METADATA = """
    architectures model_type transformers_version _name_or_path name_or_path dtype torch_dtype use_cache
    initializer_range bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    attn_pdrop embd_pdrop resid_pdrop attention_dropout reorder_and_upcast_attn pretraining_tp
    hidden_dropout classifier_dropout
    gradient_checkpointing summary_type summary_use_proj summary_activation summary_first_dropout
    summary_proj_to_labels task_specific_params finetuning_task problem_type id2label label2id
    output_attentions output_hidden_states return_dict use_return_dict chunk_size_feed_forward torchscript
    is_decoder is_encoder_decoder cross_attention_hidden_size tie_encoder_decoder pruned_heads use_bfloat16
    tf_legacy_loss attn_implementation _attn_implementation_autoset forced_bos_token_id forced_eos_token_id
    suppress_tokens begin_suppress_tokens max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values exponential_decay_length_penalty n_ctx
""".split()


class Fields(Mapping[str, Any]):
    """A read-only mapping that records which fields were asked for.

    Args:
        values: the content of a config.json.
        aliases: {field: other names that it may have}; where a field is missing or null, the first of them counts.
    """

    def __init__(self, values: Mapping[str, Any], aliases: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self._values = values
        self._aliases = aliases or {}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """Return a field's value; raise KeyError where it is missing."""
        names = [name for name in (key, *self._aliases.get(key, ())) if self._values.get(name) is not None]
        name = names[0] if names else key
        self._read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the file."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of fields in the file."""
        return len(self._values)

    def unused(self) -> list[str]:
        """Return the fields with a value that were not read and that are no metadata."""
        return sorted(name for name in self if self._values[name] is not None and name not in {*self._read, *_METADATA})


def value(config: Fields, key: str, valid: Callable[[Any], bool], expected: str, default: Any) -> Any:
    """Return a field of config.json, or ``default`` where it is missing or null; without a default it must be there."""
    content = config.get(key)
    if content is None:
        if default is None:
            raise KeyError(key)
        return default
    if not valid(content):
        raise ValueError(f"its {key} is {str(content)[:40]!r}, expected {expected}")
    return content


def count(config: Fields, key: str, default: int | None = None) -> int:
    """Return a field that is a whole number above 0."""
    return int(value(config, key, lambda v: type(v) is int and 0 < v < 2**31, "a whole number above 0", default))


def number(config: Fields, key: str, default: float | None) -> float:
    """Return a field that is a number above 0."""
    return float(value(config, key, lambda v: type(v) in (int, float) and 0 < v < 1e12, "a number above 0", default))


def switch(config: Fields, key: str, default: bool) -> bool:
    """Return a field that is true or false."""
    return bool(value(config, key, lambda v: type(v) is bool, "true or false", default))


def expect(config: Fields, key: str, allowed: tuple[Any, ...], default: Any) -> None:
    """Check that a field has one of the values that hvdlm's models stand for.

    Raises:
        ValueError: it has another one.
    """
    content = config.get(key, default)
    if content not in allowed:
        expected = " or ".join("none" if one is None else repr(one) for one in allowed)
        raise ValueError(f"its {key} is {str(content)[:40]!r}, hvdlm's models have {expected}")


def rotary(config: Fields, context: int, base: str = "rope_theta") -> dict[str, Any]:
    """Return the settings of rotary positions: nested values count, as in transformers (modeling_rope_utils.py).

    ``base``: the field that holds the base where it isn't nested.

    Raises:
        ValueError: hvdlm computes no such positions.
    """
    outer = number(config, base, 10000.0)
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    values = scaling or parameters or {}
    if not isinstance(values, dict):
        raise ValueError(f"its rope_parameters are {str(values)[:40]!r}, expected a mapping")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"its rope_type is {str(kind)[:40]!r}, hvdlm's positions are 'default' or 'llama3'")
    nested = Fields(values)
    settings: dict[str, Any] = {"rotary_base": number(nested, "rope_theta", outer), "rotary_scaling": None}
    if kind == "llama3":
        # Beside the mapping, where some models have it, it counts before the one within.
        inner = count(nested, "original_max_position_embeddings", context)
        settings["rotary_scaling"] = number(nested, "factor", None)
        settings["rotary_scaling_context"] = count(config, "original_max_position_embeddings", inner)
        settings["rotary_scaling_low"] = number(nested, "low_freq_factor", None)
        settings["rotary_scaling_high"] = number(nested, "high_freq_factor", None)
    return settings


def rotary_share(config: Fields, key: str, default: float) -> float:
    """Return the share of a head that is rotated: a nested ``partial_rotary_factor`` counts, else the field ``key``."""
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = Fields(values if isinstance(values, dict) else {})
    return number(nested, "partial_rotary_factor", number(config, key, default))


def rotary_fields(s: GPTSettings, **more: Any) -> dict[str, Any]:
    """Return the fields of config.json of rotary positions, those of scaled ones as earlier versions read them, too."""
    parameters = {"rope_type": "default", "rope_theta": s.rotary_base, **more}
    if s.rotary_scaling is None:
        return {"rope_parameters": parameters}
    scaling = {
        "rope_type": "llama3",
        "factor": s.rotary_scaling,
        "low_freq_factor": s.rotary_scaling_low,
        "high_freq_factor": s.rotary_scaling_high,
        "original_max_position_embeddings": s.rotary_scaling_context,
    }
    return {"rope_parameters": {**parameters, **scaling}, "rope_scaling": {**parameters, **scaling}}
