"""Merge a checkpoint into one safetensors file or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import file_lock, safe_files
from hvdlm.io.terminal import printable


def main(arguments: list[str]) -> int:
    """Convert, and print what was written."""
    from hvdlm_inference.trained_run import chosen_checkpoint
    from hvdlm_tools.merge import convert

    values = _parse(arguments)
    if values.format != "safetensors":
        return _export(values)
    output = Path(values.output)
    safe_files.check_output(output)
    with file_lock.exclusive(output):
        checkpoint = chosen_checkpoint(values.run, values.checkpoint, values.weights)
        count = convert(checkpoint, output, values.base)
    print(printable(f"{output}: {count:,} parameters of {checkpoint.path}"))
    return 0


def _export(values: Any) -> int:
    """Write the checkpoint by the plugin that has the name of the format."""
    from hvdlm import plugins
    from hvdlm_inference.trained_run import chosen_checkpoint

    manager, name = plugins.load([values.format]), values.format
    if not manager.hook.hvdlm_export.get_hookimpls():
        raise HvdlmError(f"--format: no plugin writes {name!r}; {nearest(name, ('safetensors', 'huggingface'))}")
    output = Path(values.output)
    safe_files.check_output(output, folder=True)
    tokenizer = None if values.checkpoint else Path(values.run) / "tokenizer.json"
    with file_lock.exclusive(output):
        checkpoint = chosen_checkpoint(values.run, values.checkpoint, values.weights)
        count, note = manager.hook.hvdlm_export(
            name=name,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            output=output,
            base=values.base,
            max_shard_bytes=values.max_shard_bytes,
        )
    print(printable(f"{output}: {count:,} parameters of {checkpoint.path} {note}"))
    return 0


def _parse(arguments: list[str]) -> Any:
    from hvdlm_inference.trained_run import run_file, run_parser

    parser = run_parser(
        "convert", "Merge a checkpoint's shards into one file, or export it to another format.", epilog=""
    )
    parser.add_argument("--output", type=str, default=None, help="file or folder to write, overwritten if it exists")
    parser.add_argument(
        "--format",
        type=str,
        default="safetensors",
        help="safetensors: one file with hvdlm's names; huggingface: a folder that transformers loads, of a "
        "GPT-2, Llama, Mistral, Qwen, GPT-NeoX or Gemma; or the format of the plugin of this name",
    )
    parser.add_argument(
        "--base", type=str, default=None, help="runs with adapters: path of the pretrained folder, if it has moved"
    )
    parser.add_argument(
        "--max_shard_bytes",
        type=int,
        default=None,
        help="--format huggingface: write larger weights in several files of at most so many bytes, and an index",
    )
    values = parser.parse_args(arguments)
    if values.max_shard_bytes is not None and (values.max_shard_bytes < 1 or values.format == "safetensors"):
        raise HvdlmError(
            f"--max_shard_bytes {values.max_shard_bytes}: expected 1 or more, with --format huggingface: a file of "
            "--format safetensors isn't cut."
        )
    if not values.output:
        raise HvdlmError("--output: the value is missing, expected a file to write, for example model.safetensors.")
    if values.checkpoint is None:
        run_file(values.run)
    return values
