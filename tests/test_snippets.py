"""Every snippet of the documents is run as a reader would run it: a page's in their order, in one fresh folder.

A block that is not run says why, in a comment right above it: ``<!-- not run here: needs a GPU -->``. What a page takes
for granted lies on the ``desk``; ``SMALLER`` is all that a training does otherwise than printed.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from token_writers import write_llm_c, write_megatron, write_nanogpt

from hvdlm.configuration import parsing
from launching import ROOT, environment, launch, with_step_hook

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
RUN = ("sh", "python", "yaml")
SHOWN = ("", "text", "toml", "json")
REASON = re.compile(r"<!-- not run here: needs (?:a GPU|a cluster|several hosts|the internet|root|hours)\b.* -->")

# What a training's own options are followed by, so that it takes seconds.
SMALLER = (
    "--train.steps 5 --train.batch_size 8 --data.validation_share 0.01 "
    "--log.every 1 --log.tensorboard false --log.sample_tokens 4"
)
SMALLER_MODEL = "--model.layers 2 --model.width 16 --model.heads 2 --data.context 16"
PYTHON = f"""#!/bin/bash
# Trainings are small and begin anew, unless they go on; the bench's messages are small, measurements short.
given=" $* "
if [[ "$1 $2" == "-m hvdlm" && $given != *" --dry_run "* ]]; then
  case "${{3:--}} ${{given##* -- }}" in
    bench*) set -- "$@" --smallest 1024 --largest 2048 --seconds 0.05 ;;
    *"plan --measure"*) set -- "$@" --seconds 120 --rounds 1 --models 11 ;;
    train* | -* | "run -"* | "run train "*)
      set -- "$@" {SMALLER}
      if [[ $given != *" --model.pretrained "* ]]; then set -- "$@" {SMALLER_MODEL}; fi
      if [[ $given == *" --checkpoint.resume "* ]]; then set -- "$@" --train.steps 8
      else set -- "$@" --log.overwrite true; fi ;;
  esac
fi
exec {sys.executable} "$@"
"""
# Plugins go where they disturb nobody; what comes from a package index is there, as an extra that tests need.
PIP = f"""#!/bin/bash
[[ $1 == install ]] || exit 1
shift; [[ $1 == -e ]] && shift
[[ -d $1 ]] || exec {sys.executable} -c 'import sys, importlib.metadata as m; [m.version(n) for n in sys.argv[1:]]' "$@"
exec {sys.executable} -m pip install -q --no-deps --no-build-isolation --no-index --upgrade --target "$INSTALLED" "$@"
"""
# The targets have tests of their own (test_docs.py, test_site.py) or are the tests.
MAKE = f"""#!/bin/bash
exec {shutil.which("make")} -n -C {ROOT} "$@"
"""
TEXT = "Once upon a time there was a small model that read one book, and then another.\n" * 300


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, the line above it."""

    line: int
    language: str
    code: str
    above: str

    @property
    def file(self) -> str | None:
        """The file that it is, where the text above ends with its name: "`name.py`:"."""
        match = re.search(r"`([\w./-]+\.\w+)`:$", self.above)
        return match[1] if match else None

    @property
    def excused(self) -> bool:
        """Whether the line above says why it isn't run."""
        return self.above.startswith("<!-- not run here")


def blocks(text: str) -> list[Block]:
    """Return a document's fenced blocks."""
    fenced, lines, start = [], text.splitlines(), None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line.startswith("```"):
            assert start is not None
            above = next((above for above in reversed(lines[:start]) if above.strip()), "")
            code = "\n".join(lines[start + 1 : number]) + "\n"
            fenced.append(Block(start + 1, lines[start][3:].strip(), code, above))
            start = None
    assert start is None, "a fence is not closed"
    return fenced


BLOCKS = {path.relative_to(ROOT).as_posix(): blocks(path.read_text()) for path in DOCUMENTS}


def to_run(page: str) -> list[Block]:
    """Return the blocks of a page that are run, or are files for those that are."""
    return [b for b in BLOCKS[page] if not b.excused and (b.language in RUN or b.file)]


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in BLOCKS[page]:
        where = f"{page}:{block.line}"
        assert block.language in RUN + SHOWN, f"{where}: {block.language}: write {', '.join(RUN)}, or text"
        assert not block.excused or REASON.fullmatch(block.above), f"{where}: {block.above} is no reason"
        if block.language in ("", "text"):
            commands = re.findall(r"^(?:\$|python|make|pip|horovodrun|mpirun|srun) .*", block.code, re.M)
            assert not commands, f"{where}: {commands[0]}: in a block of sh it would be run"


def test_a_block_without_a_reason_is_found() -> None:
    text = (
        "See:\n\n```bash\nls\n```\n\n<!-- not run here: too long -->\n```sh\nls\n```\n`a.yaml`:\n\n```yaml\nx: 1\n```\n"
    )
    bash, shell, file = blocks(text)
    assert bash.language not in RUN + SHOWN and (bash.line, bash.code, bash.above) == (3, "ls\n", "See:")
    assert shell.excused and not REASON.fullmatch(shell.above)
    assert file.file == "a.yaml" and not file.excused


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what pages take for granted: examples, texts, run.yaml, and two runs that died."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "examples", desk / "examples")
    (desk / "texts").mkdir()
    for name in ("my.txt", "held_out.txt", "tinyshakespeare.txt", "texts/one.txt"):
        (desk / name).write_text(TEXT)
    (desk / "my.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (desk / "books.jsonl").write_text("".join(json.dumps({"story": TEXT, "id": n}) + "\n" for n in range(3)))
    chat = [{"role": "user", "content": "What is a book?"}, {"role": "assistant", "content": TEXT[:4000]}]
    (desk / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 100)
    pair = {"question": "What is a book?", "answer": TEXT[:400]}
    (desk / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 100)
    _write_parquet(desk / "books.parquet")
    _write_token_files(desk)
    for name in ("run.yaml", "my.yaml"):
        (desk / name).write_text("data: {path: [my.txt]}\nlog: {run: runs/of_yaml}\n")
    _die(desk / "runs" / "x")
    for name in ("y", "torch", "tensorflow"):
        shutil.copytree(desk / "runs" / "x", desk / "runs" / name)
    programs = desk / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in {"python": PYTHON, "pip": PIP, "make": MAKE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "activate").write_text('export PATH="$PWD/.venv/bin:$PATH"\n')
    return desk


def _write_token_files(desk: Path) -> None:
    """Write token files as nanoGPT, llm.c and Megatron-LM do."""
    nanogpt, fineweb = desk / "nanoGPT" / "data" / "openwebtext", desk / "fineweb10B"
    nanogpt.mkdir(parents=True)
    fineweb.mkdir()
    documents = [list(range(200))] * 100
    for name in ("train", "val"):
        write_nanogpt(nanogpt / f"{name}.bin", documents)
        write_llm_c(fineweb / f"fineweb_{name}_000001.bin", documents)
    write_megatron(desk / "wiki_text_document.bin", documents)


def _write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"story": [TEXT] * 3}), path)


def _die(run: Path) -> None:
    """Leave what two ranks leave that were killed after a checkpoint: what pages do with a run can be done with it."""
    arguments = [*with_step_hook("step == 4 and os.kill(os.getpid(), signal.SIGKILL)"), "--log.run", str(run)]
    arguments += ["--checkpoint.every", "2", "--checkpoint.asynchronous", "false"]
    arguments += [*SMALLER.split(), *SMALLER_MODEL.split()]
    done = launch("mpirun", 2, arguments, HVDLM_TEST_IMPORTS="torch")
    assert done.returncode and (run / "flight_recorder").is_dir() and list(run.glob("checkpoints/step-*")), done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the user's cache folder: what one page has tokenized, others need not."""
    return tmp_path_factory.mktemp("cache")


def _write_pretrained(folder: Path) -> None:
    """Write the folder of a small model of Hugging Face and its tokenizer: of GPT-2, or Qwen, with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, Qwen2Config

    torch.manual_seed(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast, vocab = PreTrainedTokenizerFast(tokenizer_object=tokenizer), tokenizer.get_vocab_size()
    config: Any = GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    if folder.name == "qwen-folder":
        fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        fast.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 2048}
        config = Qwen2Config(vocab_size=vocab, num_attention_heads=2, num_key_value_heads=2, **sizes)
    fast.save_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


RAN: set[str] = set()
ALONE = re.compile(r"(?:horovodrun|mpirun) -np \d+ python -m hvdlm (?!.*(?:--log\.run|run\.yaml|--checkpoint|\\$))")


def not_yet(code: str) -> str:
    """Return a block without what ranks did for an earlier page, letter for letter, and what nothing later asks for."""
    left = []
    for line in code.splitlines():
        command = " ".join(re.sub(" +#.*", "", line).split())
        if not ALONE.match(line) or command not in RAN:
            left.append(line)
            RAN.add(command)
    return "\n".join(left)


PAGES = [page for page in BLOCKS if any(block.language in ("sh", "python") for block in to_run(page))]


@pytest.mark.parametrize("page", PAGES)
def test_a_reader_gets_through_the_page(page: str, desk: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(desk, folder)
    for name in ("gpt2-folder", "qwen-folder"):
        if any(name in block.code for block in to_run(page)):
            _write_pretrained(folder / name)
    installed = tmp_path / "installed"
    env = environment(XDG_CACHE_HOME=str(cache), INSTALLED=str(installed), PYTHONPATH=str(installed))
    env["HVDLM_TEST_IMPORTS"] = "torch"
    env["PATH"] = f"{folder / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"
    for block in to_run(page):
        if block.file:
            (folder / block.file).write_text(block.code)
        elif block.language != "yaml" and "@hookimpl" not in block.code:
            command = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, not_yet(block.code)], cwd=folder, env=env, text=True, capture_output=True, timeout=600
            )
            message = f"{page}:{block.line} ends with {done.returncode}\n{block.code}\n{done.stdout[-2000:]}"
            assert done.returncode == 0, message + done.stderr[-3000:]


YAML = [(page, block) for page in BLOCKS for block in to_run(page) if block.language == "yaml"]


@pytest.mark.parametrize("page, block", YAML, ids=[f"{page}:{block.line}" for page, block in YAML])
def test_yaml_is_a_configuration(page: str, block: Block, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(block.code)
    assert parsing.parse_config(["--config", str(tmp_path / "run.yaml")])


PLUGINS = {
    f"snippet_{number}": block.code
    for number, block in enumerate(
        block for page in BLOCKS for block in to_run(page) if block.language == "python" and "@hookimpl" in block.code
    )
}


def test_modules_with_hooks_are_installed_listed_and_run_with(tmp_path: Path) -> None:
    (tmp_path / "plugins-1.dist-info").mkdir()
    (tmp_path / "plugins-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    entries = "".join(f"{name} = {name}\n" for name in PLUGINS)
    (tmp_path / "plugins-1.dist-info" / "entry_points.txt").write_text(f"[hvdlm]\n{entries}")
    for name, code in PLUGINS.items():
        (tmp_path / f"{name}.py").write_text(code)
    listed = launch("", 1, ["-m", "hvdlm", "plugins"], PYTHONPATH=str(tmp_path)).stdout
    for name, code in PLUGINS.items():
        line = next(line for line in listed.splitlines() if line.startswith(f"{name} "))
        for hook in re.findall(r"^ *def hvdlm_(\w+)", code, re.M):
            assert hook.removeprefix("make_") in line, line
    arguments = ["-m", "hvdlm", "--plugins", f"[{', '.join(PLUGINS)}]", "--log.run", str(tmp_path / "run")]
    smaller = shlex.split(f"{SMALLER} {SMALLER_MODEL}")
    done = launch("", 1, [*arguments, *smaller], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
