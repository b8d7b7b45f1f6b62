"""The fields of a config.json: which of them are read, which describe no computation, and which are left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Fields of transformers' PreTrainedConfig, GPT2Config and LlamaConfig that don't change logits: names, training,
# generation and heads of other tasks.
_METADATA = """
    architectures model_type transformers_version _name_or_path name_or_path dtype torch_dtype use_cache
    initializer_range bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    attn_pdrop embd_pdrop resid_pdrop attention_dropout reorder_and_upcast_attn pretraining_tp
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
