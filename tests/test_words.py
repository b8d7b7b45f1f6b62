"""Code and documents use the terms of the field: banned words, each with the term to use in its place.

``python tests/test_words.py`` prints all violations, as ``file:line: word -> term``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hvdlm", "backends", "plugins", "tests", "benchmarks", "scripts", "examples", "docs")
PACKAGES = ("hvdlm", "backends", "plugins")

# Regular expressions for all text: documents, help texts, comments, docstrings and messages.
PROSE = {
    r"\b(?:go|goes|going|went) on (?:from|with|where|exactly|as|in the|after|behind|until)\b": "resumes, continues",
    r"\b(?:is|are|was|were|be|been) gone on\b|\bgone on\b": "resumed, continued",
    r"\bwhat (?:an? |the )?(?:\w+ )?(?:sees|hears|says of|tells of)\b": "a noun for the thing itself",
    r"\bhears? that\b|\bheard (?:a step|once|by)\b": "called when ..., receives",
    r"\banswer to (?:``|`)|\banswers to (?:its|the|a) name\b": "return the ..., is selected by its name",
    r"\bwho waits\b": "the waiting rank, while waiting",
    r"\brarer synchroni[sz]ation\b|\bsynchroni[sz]ation is rarer\b": "local SGD, infrequent synchronisation",
    r"\btold (?:once|twice|elsewhere|again|beforehand|afterwards)\b": "reported ...",
    r"\b(?:is|are|was|were) told (?:of|what|that|to)\b": "is reported, receives, is asked to",
    r"\blooks? ahead\b": "uses Nesterov momentum",
    r"\b(?:come|comes|came|coming) to grief\b": "fails",
    r"\blikeliest\b": "most probable, greedy",
    r"\blistening model\b": "speech recognition model",
    r"\bspace is looked at\b": "free disk space is checked",
    r"\breplicas are compared\b": "replicas are checksummed to detect divergence",
    r"\bsmall values between all ranks\b": "host-side messages (JSON) between ranks",
    r"\bdivides the scores\b": "sampling temperature",
    r"\b(?:stands?|stood|standing) still\b": "is blocked, is paused",
    r"\banswered (?:by|with) (?:one|a) sentence\b": "reported in one sentence",
    r"\bledgers?\b": "flight recorder",
    r"\bsentinels?\b(?! (?:value|object))": "watchdog",
    r"\bevidence\b": "failure files",
    r"\btold=|\btell\(\)": "shell names by content: stop_requested, forward_signal",
}

# Names that a Python file defines: variables, parameters, attributes, functions, classes.
NAMES = {
    "found": "the content: checkpoint, sizes, matches",
    "said": "the content: message, output",
    "told": "the content: reported, message, counts",
    "heard": "the content: received, messages",
    "hear": "receive, on_event",
    "tell": "report, send",
    "tell_of": "report_...",
    "piece": "shard, chunk",
    "pieces": "shards, chunks",
    "place": "index, position, zero_rank",
    "part": "shard, segment, zero_rank",
    "parts": "shards, segments, zero_size",
    "apart": "replicas_diverge",
    "ledger": "flight_recorder",
    "sentinel": "watchdog",
    "evidence": "failure_files",
    "meeting": "preflight",
}

# Names of modules and packages.
MODULES = {
    "answers": "forward, inference",
    "base": "base_weights, compressor",
    "control": "signals, consensus",
    "counted": "counted_graph",
    "dealing": "write_plan",
    "described": "rebuild_spec",
    "evidence": "failure_files",
    "finding": "discovery",
    "folders": "shared_folders",
    "growth": "tokenizer_expansion",
    "guard": "step_guard",
    "journal": "prepare_progress",
    "keeping": "retention",
    "launched": "process_tree",
    "ledger": "flight_recorder",
    "ledger_view": "recorder_reader",
    "links": "pipeline_stage, tensor_ranks",
    "meeting": "preflight",
    "merged": "merge",
    "own": "custom_module",
    "pieces": "shards, chunks",
    "plain": "base class of the room",
    "record": "run_folder",
    "recovery": "rollback",
    "sentinel": "watchdog",
    "stage": "harness",
    "standing": "run_status",
    "subjects": "plugin_under_test",
    "supervised": "settings",
}

# Exceptions: (path, word) of names that other libraries prescribe, and of modules whose folder explains them.
ALLOWED: set[tuple[str, str]] = {
    ("plugins/hvdlm_torch/models/base.py", "base"),
    ("plugins/hvdlm_tensorflow/models/base.py", "base"),
    ("plugins/hvdlm_corpora/prepare_progress.py", "pieces"),  # a key of journal.json
}

# Phrases may continue on the next line, after the comment sign.
_COMPILED = [(re.compile(p.replace(" ", r"[\s#]+"), re.IGNORECASE), instead) for p, instead in PROSE.items()]


def files(*suffixes: str) -> Iterator[Path]:
    """Yield the project's files with one of these suffixes, but for this one."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            generated = {"build", "__pycache__"} & set(path.relative_to(ROOT).parts) or ".egg-info" in str(path)
            if path.suffix in suffixes and path.is_file() and not generated and path != Path(__file__).resolve():
                yield path
    yield from (path for path in sorted(ROOT.iterdir()) if path.suffix in suffixes)


def check_prose(text: str, line: int = 1) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and replacement of every banned phrase in ``text``; inline code is skipped."""
    text = re.sub(r"(`+)([^`]+)(`+)", lambda code: code[1] + _blank(code[2]) + code[3], text)
    for pattern, instead in _COMPILED:
        for match in pattern.finditer(text):
            yield line + text.count("\n", 0, match.start()), re.sub(r"[\s#]+", " ", match[0]), instead


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", "_", text)


def check_markdown(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the banned phrases of a document, its code blocks left out."""
    yield from check_prose(re.sub(r"^```.*?^```", lambda block: _blank(block[0]), text, flags=re.M | re.S))


def check_comments(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the banned phrases in the comments of YAML, TOML, shell and make files."""
    lines = ["#" + line.partition("#")[2] if "#" in line else "" for line in text.splitlines()]
    yield from check_prose("\n".join(lines))


def check_python(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the banned phrases in comments, docstrings and messages, and the banned names that are defined."""
    comments = [""] * (text.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0] - 1] = token.string
    yield from check_prose("\n".join(comments))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from check_prose(node.value, node.lineno)
        for line, name in defined_names(node):
            if instead := NAMES.get(name.strip("_").lower()):
                yield line, name, instead


def defined_names(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of what a node defines; names that it only uses may be another library's."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.lineno, node.name
    elif isinstance(node, ast.arg):
        yield node.lineno, node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.lineno, node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.lineno, node.attr
    elif isinstance(node, ast.alias) and node.asname:
        yield node.lineno, node.asname


CHECKS = {
    ".md": check_markdown,
    ".py": check_python,
    **dict.fromkeys((".yaml", ".yml", ".toml", ".cfg", ".sh", ".sbatch", ".def", ".txt"), check_comments),
}


def check_file(path: Path) -> list[str]:
    """Return the violations of a file."""
    name = path.relative_to(ROOT).as_posix()
    check = CHECKS.get(path.suffix, check_comments)
    violations = sorted(set(check(path.read_text())))
    return [f"{name}:{line}: {word} -> {new}" for line, word, new in violations if (name, word) not in ALLOWED]


def check_modules() -> list[str]:
    """Return the modules and packages with a banned name."""
    paths = [path for path in files(".py") if path.relative_to(ROOT).parts[0] in PACKAGES]
    modules = sorted({path.parent if path.name == "__init__.py" else path for path in paths})
    names = [(path.relative_to(ROOT).as_posix(), path.stem) for path in modules if path.stem in MODULES]
    return [f"{name}: {stem} -> {MODULES[stem]}" for name, stem in names if (name, stem) not in ALLOWED]


def texts() -> list[Path]:
    """Return all files to check."""
    return [*files(*CHECKS), ROOT / "Makefile"]


@pytest.mark.parametrize("folder", (*FOLDERS, "."))
def test_no_banned_words(folder: str) -> None:
    top = ROOT / folder
    paths = [p for p in texts() if (p.parent == ROOT if folder == "." else top in p.parents)]
    violations = [violation for path in paths for violation in check_file(path)]
    assert paths and not violations, "\n" + "\n".join(violations)


def test_no_module_has_a_banned_name() -> None:
    violations = check_modules()
    assert not violations, "\n" + "\n".join(violations)


def test_banned_phrases_are_detected_in_markdown() -> None:
    text = "A run is gone on with; SGD looks\nahead.\n\n```python\nledger = 1\n```\n\nThe `ledger`, a ledger `x`.\n"
    assert [(line, word) for line, word, _ in sorted(check_markdown(text))] == [
        (1, "is gone on"),
        (1, "looks ahead"),
        (8, "ledger"),
    ]


def test_banned_words_are_detected_in_python() -> None:
    text = '''"""Answer to ``x``."""
import thing as told
# the likeliest
def hear(part, other):  # innocent: in part, not found
    other.found = f"who waits {part}"
    return "not found", path.parts, "ledger"
'''
    assert [(line, word) for line, word, _ in sorted(check_python(text))] == [
        (1, "Answer to ``"),
        (2, "told"),
        (3, "likeliest"),
        (4, "hear"),
        (4, "part"),
        (5, "found"),
        (5, "who waits"),
    ]


def test_comments_of_other_files_are_checked() -> None:
    assert [word for _, word, _ in check_comments("ledger: 1  # the ledger\n# it comes\n# to grief\n")] == [
        "comes to grief",
        "ledger",
    ]


if __name__ == "__main__":
    found_violations = [violation for path in texts() for violation in check_file(path)] + check_modules()
    print("\n".join(found_violations))
    sys.exit(bool(found_violations))
