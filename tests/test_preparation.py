"""``prepare`` writes the same folder with any number of workers and after any interruption, or none."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvdlm import cli
from hvdlm.config import DataConfig
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.errors import HvdlmError
from hvdlm_corpora import (
    documents,
    preparation,
    prepare_command,
    prepare_progress,
    progress_bar,
    sources,
    tokenizers,
    workers,
)
from hvdlm_corpora.passages import Passage, SpecialTokens
from hvdlm_corpora.source_chunks import ReadProgress
from hvdlm_corpora.workers import WorkerDied
from launching import environment, run_python, wait_until
from record_files import PACKERS, WRITERS

LINES = [f"the line number {i} says {'much ' * (i % 7)}红楼梦" for i in range(3000)]
SMALL_CHUNKS = (
    "from hvdlm_corpora import documents, prepare_progress, sources; sources._CHUNK = 4000; documents._CHUNK = 4000\n"
)


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    """Cut sources into chunks of some thousand bytes."""
    patch.setattr(sources, "_CHUNK", 4000)
    patch.setattr(documents, "_CHUNK", 4000)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


def write_corpus(folder: Path) -> list[str]:
    """Write a text, JSON lines and a table, of some 40 chunks, into ``corpus``; return its path in a list."""
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("\n".join(LINES[:1000]) + "\n", encoding="utf-8")
    WRITERS["x.jsonl"](corpus / "b.jsonl", LINES[1000:2000])
    WRITERS["x.parquet"](corpus / "c.parquet", LINES[2000:])
    return [str(corpus)]


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    return write_corpus(tmp_path)


def settings(corpus: list[str], tmp_path: Path, tokenizer: str = "char") -> DataConfig:
    size = 300 if tokenizer in ("word", "bpe") else None
    return DataConfig(path=corpus, tokenizer=tokenizer, vocab_size=size, cache=str(tmp_path / "cache"))


def files(folder: Path) -> dict[str, str]:
    """Return the digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def remaining(folder: Path) -> list[str]:
    """Return the names beside a token folder, without the corpus and the cache, and a lock of a killed process."""
    names = (path.name for path in folder.parent.iterdir() if path.suffix != ".lock")
    return sorted(name for name in names if name not in ("corpus", "cache"))


# Reading


@pytest.mark.parametrize("name", [*WRITERS, "x.txt", "utf-16.txt", *(f"x.txt{suffix}" for suffix in PACKERS)])
def test_reading_resumes_at_the_end_of_any_chunk(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in WRITERS:
        WRITERS[name](path, LINES)
    else:
        data = "\r\n".join(LINES).encode("utf-16" if name == "utf-16.txt" else "utf-8")
        path.write_bytes(PACKERS[path.suffix](data) if path.suffix in PACKERS else data)
    whole_reading = ReadProgress()
    whole = list(sources.text_chunks(str(path), progress=whole_reading))
    assert len(whole) > 20 and whole_reading.bytes_read == path.stat().st_size
    for number in (0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        reading = ReadProgress()
        rest = list(sources.text_chunks(str(path), start=whole[number].end, progress=reading))
        assert rest == whole[number + 1 :]
        assert sources.digest(str(path), reading) == sources.digest(str(path), whole_reading)


def test_overlong_words_are_split_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("红" * 100_000 + " end")
    whole = list(sources.text_chunks(str(path)))
    assert "".join(chunk.text for chunk in whole) == path.read_text() and len(whole) > 3
    for number, chunk in enumerate(whole):
        assert list(sources.text_chunks(str(path), start=chunk.end)) == whole[number + 1 :]


# Workers


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_the_folder_is_the_same_for_any_number_of_workers(tokenizer: str, corpus: list[str], tmp_path: Path) -> None:
    results = []
    for count in (1, 2, 3):
        folder = tmp_path / f"by-{count}"
        data = preparation.prepare(settings(corpus, tmp_path, tokenizer), str(folder), count)
        results.append((files(folder), data.fingerprint))
    assert results[0] == results[1] == results[2] and set(results[0][0]) == {
        "header.json",
        "tokenizer.json",
        "tokens.bin",
    }


def test_few_texts_are_in_flight_at_a_time() -> None:
    read = 0

    def texts() -> Iterator[tuple[Passage, int]]:
        nonlocal read
        for read in range(1, 101):
            yield Passage(f"text {read}", True, (), SpecialTokens()), read

    for label, encoded in workers.encoded(ByteTokenizer(), texts(), 2):
        assert bytes(encoded.ids.tolist()).decode() == f"text {label}"
        assert read - label < 2 * 2
    assert label == 100


def test_workers_are_used_for_long_texts_and_slow_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    word, byte = tokenizers.train("word", 9, ["a b"]), ByteTokenizer()
    assert [workers.choose(None, word, size) for size in (10**6, 10**9)] == [1, 8]
    assert workers.choose(None, byte, 10**9) == 1 and workers.choose(3, byte, 10) == 3


def test_an_encoding_error_in_a_worker_ends_prepare(corpus: list[str], tmp_path: Path) -> None:
    vocabulary = tmp_path / "cache" / "tokenizer.json"
    vocabulary.parent.mkdir()
    characters = "".join(sorted(set("\n".join(LINES))))
    vocabulary.write_text(json.dumps({"kind": "char", "characters": characters}))
    Path(corpus[0], "b.txt").write_text("é\n")
    folder = tmp_path / "tokens"
    with pytest.raises(HvdlmError, match="character 'é' is not among"):
        preparation.prepare(settings(corpus, tmp_path, str(vocabulary)), str(folder), 2)
    assert not remaining(folder) and not multiprocessing.active_children()


def test_prepare_resumes_after_the_death_of_a_worker(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add, config = prepare_progress.Journal.add, settings(corpus, tmp_path)
    expected = files(preparation.prepare(config, str(tmp_path / "expected")).folder)
    monkeypatch.setattr(prepare_progress, "_SAVE_SECONDS", 0)

    def killing(self: prepare_progress.Journal, *arguments: Any) -> None:
        add(self, *arguments)
        if self.state.pieces == 5:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    monkeypatch.setattr(prepare_progress.Journal, "add", killing)
    with pytest.raises(WorkerDied, match=r"an encoding worker died: .*--workers 1.*resumes"):
        preparation.prepare(config, str(tmp_path / "tokens"), 2)
    assert not multiprocessing.active_children() and not (tmp_path / "tokens").exists()
    monkeypatch.setattr(prepare_progress.Journal, "add", add)
    assert files(preparation.prepare(config, str(tmp_path / "tokens")).folder) == expected
    assert "resuming after" in capfd.readouterr().err and remaining(tmp_path / "tokens") == ["expected", "tokens"]


def test_a_full_disk_ends_prepare_and_leaves_nothing(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: prepare_progress.Journal, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_progress.Journal, "add", full)
    with pytest.raises(HvdlmError, match=r"can't be written to .*tokens: No space left on device: free space"):
        preparation.prepare(settings(corpus, tmp_path), str(tmp_path / "tokens"), 2)
    assert not remaining(tmp_path / "tokens") and not multiprocessing.active_children()


def test_workers_import_no_framework(corpus: list[str], tmp_path: Path) -> None:
    for name in ("torch", "tensorflow", "keras", "horovod", "mpi4py"):
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text("import os; os._exit(9)\n")
    command = ["-m", "hvdlm", "prepare", "--data.path", corpus[0], "--workers", "2"]
    command += ["--output", str(tmp_path / "tokens"), "--data.cache", str(tmp_path / "cache")]
    done = run_python(command, PYTHONPATH=str(tmp_path / "fake"))
    assert done.returncode == 0 and "training and" in done.stdout and not done.stderr


# Kills

MOMENTS = {
    "while the tokenizer is trained": ("tokenizers.train", "before", 1),
    "before anything is on disk": ("prepare_progress.Journal.begin", "before", 1),
    "before the first journal": ("prepare_progress.Journal._save", "before", 1),
    "after the first chunk": ("prepare_progress.Journal.add", "after", 1),
    "in the text": ("prepare_progress.Journal.add", "after", 7),
    "in the JSON lines": ("prepare_progress.Journal.add", "after", 17),
    "in the table": ("prepare_progress.Journal.add", "after", 27),
    "before a journal takes its name": ("os.replace", "before", 9),
    "when all is encoded": ("prepare_progress.Journal.finish", "after", 1),
    "before the folder has its name": ("prepare_progress.Journal.publish", "before", 1),
    "before the rest is deleted": ("prepare_progress.Journal.discard", "before", 1),
}
KILLED = (
    SMALL_CHUNKS
    + """
import os, signal, sys
from hvdlm import cli
from hvdlm_corpora import tokenizers
prepare_progress._SAVE_SECONDS = 0
name, when, count = {moment!r}
holder, _, attribute = name.rpartition(".")
holder = eval(holder)
real, calls = getattr(holder, attribute), 0

def killing(*arguments, **options):
    global calls
    calls += 1
    if when == "before" and calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **options)
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(holder, attribute, killing)
sys.exit(cli.main({arguments!r}))
"""
)


def command(corpus: list[str], tmp_path: Path, count: int) -> list[str]:
    """Return the arguments that prepare ``tokens`` with so many workers."""
    chosen = ["--data.path", corpus[0], "--data.cache", str(tmp_path / "cache"), "--workers", str(count)]
    return ["prepare", *chosen, "--output", str(tmp_path / "tokens")]


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_killed_prepare_resumes_to_the_same_folder(
    moment: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(settings(corpus, tmp_path), document_token="l")  # with an index of documents
    expected = files(preparation.prepare(config, str(tmp_path / "expected")).folder)
    assert "documents.bin" in expected
    count = 2 if moment == "in the table" else 1
    arguments = [*command(corpus, tmp_path, count), "--data.document_token", "l"]
    code = KILLED.format(moment=MOMENTS[moment], arguments=arguments)
    done = run_python(["-c", code])
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = (tmp_path / "tokens").exists()
    assert before == (moment == "before the rest is deleted")
    if before:  # it is complete: the command is refused, and a run can read it
        assert files(tmp_path / "tokens") == expected and cli.main(arguments) == 2
        (tmp_path / "tokens").rename(tmp_path / "cache")
    assert cli.main(arguments) == 0
    resumed = re.findall(r"resuming after ([\d,]+) tokens", capsys.readouterr().err)
    begun = ("in the", "after", "when all", "before a journal", "before the folder")
    assert bool(resumed) == moment.startswith(begun)
    if moment.startswith("in the"):
        assert int(resumed[0].replace(",", "")) > 1000
    assert files(tmp_path / "tokens") == expected and remaining(tmp_path / "tokens") == ["expected", "tokens"]


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_end_with_the_process_that_started_them(corpus: list[str], tmp_path: Path) -> None:
    code = SMALL_CHUNKS + (
        "import signal; from hvdlm import cli\n"
        "prepare_progress.Journal.add = lambda *arguments: signal.pause()\n"
        f"cli.main({command(corpus, tmp_path, 2)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment())
    try:
        # Two workers, and multiprocessing's resource tracker.
        wait_until(lambda: len(children(process.pid)) >= 3, process=process)
        started = children(process.pid)
    finally:
        process.kill()
        process.wait(30)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def test_an_interruption_says_how_to_resume(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = prepare_progress.Journal.add

    def interrupting(self: prepare_progress.Journal, *arguments: Any) -> None:
        add(self, *arguments)
        if self.state.pieces == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_progress.Journal, "add", interrupting)
    monkeypatch.setattr(prepare_progress, "_SAVE_SECONDS", 0)
    assert cli.main(command(corpus, tmp_path, 1)) == 130
    assert capsys.readouterr().err == "hvdlm: interrupted; the same command resumes\n"
    monkeypatch.setattr(prepare_progress.Journal, "add", add)
    assert cli.main(command(corpus, tmp_path, 1)) == 0
    assert "resuming after" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["source", "option"])
def test_changed_sources_or_settings_start_from_scratch(
    change: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_partial(corpus, tmp_path)
    arguments = command(corpus, tmp_path, 1)
    if change == "source":
        Path(corpus[0], "a.txt").write_text("another text\n" * 2000)
    else:
        arguments += ["--data.separator", "|"]
    assert cli.main(arguments) == 0
    assert "resuming" not in capsys.readouterr().err and remaining(tmp_path / "tokens") == ["tokens"]
    options = {"separator": "|"} if change == "option" else {}
    config = DataConfig(path=corpus, cache=str(tmp_path / "cache"), **options)  # type: ignore[arg-type]
    assert files(preparation.prepare(config).folder) == files(tmp_path / "tokens")


def write_partial(corpus: list[str], tmp_path: Path) -> Path:
    """Start to prepare ``tokens``, kill it in the JSON lines, and return the partial folder."""
    code = KILLED.format(moment=MOMENTS["in the JSON lines"], arguments=command(corpus, tmp_path, 1))
    done = run_python(["-c", code])
    assert done.returncode == -signal.SIGKILL, done.stderr
    return prepare_progress.partial(tmp_path / "tokens")


def changed_entries(**changes: Any) -> Callable[[Path], Any]:
    """Return a function that changes entries of the journal."""

    def action(path: Path) -> None:
        content = json.loads((path / "journal.json").read_text())
        (path / "journal.json").write_text(json.dumps(content | changes))

    return action


def shortened(name: str) -> Callable[[Path], Any]:
    """Return a function that cuts a file."""
    return lambda path: os.truncate(path / name, 9)


def linked(name: str) -> Callable[[Path], Any]:
    """Return a function that replaces a file by a link to one outside the folder."""

    def action(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(path.parent / "elsewhere")

    return action


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no journal": lambda path: (path / "journal.json").unlink(),
    "half a journal": lambda path: os.truncate(path / "journal.json", 50),
    "a journal that is no mapping": lambda path: (path / "journal.json").write_text("[]"),
    "a deeply nested journal": lambda path: (path / "journal.json").write_text("[" * 10**5),
    "another format": changed_entries(format="x"),
    "a missing source": changed_entries(source=7, digests=["0"] * 7),
    "a negative count": changed_entries(tokens=-1),
    "an enormous count": changed_entries(tokens=10**30),
    "text for a number": changed_entries(offset="5"),
    "a boolean for a number": changed_entries(number=True),
    "a position before the first chunk": changed_entries(source=0, pieces=0, tokens=0, bytes=0, digests=[]),
    "no digests": changed_entries(digests=None),
    "invalid digests": changed_entries(digests=[5]),
    "too many digests": changed_entries(digests=["0", "0", "0"]),
    "another tokenizer": changed_entries(tokenizer="0" * 64),
    "more chunks": changed_entries(pieces=10**9),
    "fewer chunks": changed_entries(pieces=3),
    "more tokens": changed_entries(tokens=10**9),
    "fewer tokens": changed_entries(tokens=3),
    "tokens.bin cut": shortened("tokens/tokens.bin"),
    "places.bin cut": shortened("places.bin"),
    "no tokenizer": lambda path: (path / "tokens/tokenizer.json").write_text("{}"),
    "odd values in places.bin": lambda path: (path / "places.bin").write_bytes(b"\xff" * 24 * 200),
    "tokens.bin is a link": linked("tokens/tokens.bin"),
    "places.bin is a link": linked("places.bin"),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a folder with a corpus and a partial token folder, and the digests of its complete files."""
    folder = tmp_path_factory.mktemp("killed")
    paths = write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        expected = files(preparation.prepare(settings(paths, folder), str(folder / "expected")).folder)
        write_partial(paths, folder)
    return folder, expected


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_progress_starts_from_scratch(
    damage: str, killed: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = killed
    (tmp_path / "elsewhere").write_bytes(b"keep me" * 100_000)
    shutil.copytree(prepare_progress.partial(folder / "tokens"), prepare_progress.partial(tmp_path / "tokens"))
    DAMAGES[damage](prepare_progress.partial(tmp_path / "tokens"))
    config = settings([str(folder / "corpus")], folder)
    assert files(preparation.prepare(config, str(tmp_path / "tokens")).folder) == expected
    assert "resuming" not in capsys.readouterr().err and remaining(tmp_path / "tokens") == ["elsewhere", "tokens"]
    assert (tmp_path / "elsewhere").read_bytes() == b"keep me" * 100_000


def test_undamaged_progress_is_resumed(
    killed: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = killed
    shutil.copytree(prepare_progress.partial(folder / "tokens"), prepare_progress.partial(tmp_path / "tokens"))
    config = settings([str(folder / "corpus")], folder)
    assert files(preparation.prepare(config, str(tmp_path / "tokens")).folder) == expected
    assert "resuming after" in capsys.readouterr().err


def test_a_partial_folder_that_is_a_link_is_not_followed(tmp_path: Path, corpus: list[str]) -> None:
    write_partial(corpus, tmp_path).rename(tmp_path / "corpus" / "there")
    before = files(tmp_path / "corpus" / "there" / "tokens")
    prepare_progress.partial(tmp_path / "tokens").symlink_to(tmp_path / "corpus" / "there")
    assert cli.main(command([str(tmp_path / "corpus" / "a.txt")], tmp_path, 1)) == 0
    assert files(tmp_path / "corpus" / "there" / "tokens") == before


def test_progress_in_a_linked_folder_is_not_continued(tmp_path: Path, corpus: list[str]) -> None:
    partial = write_partial(corpus, tmp_path)
    before = files((partial / "tokens").rename(tmp_path / "elsewhere"))
    (partial / "tokens").symlink_to(tmp_path / "elsewhere")
    assert cli.main(command(corpus, tmp_path, 1)) == 0
    assert files(tmp_path / "elsewhere") == before


def test_concurrent_preparations_write_one_folder_once(corpus: list[str], tmp_path: Path) -> None:
    code = SMALL_CHUNKS + (
        "import sys; from hvdlm import cli; from hvdlm_corpora import preparation as p\n"
        "run = p.Preparation.run\n"
        "p.Preparation.run = lambda *arguments: (print('writes', flush=True), run(*arguments))\n"
        f"sys.exit(cli.main(['prepare', '--data.path', {corpus[0]!r}, '--data.cache', {str(tmp_path / 'cache')!r}]))"
    )
    begin = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **begin) for _ in range(3)]  # type: ignore[call-overload]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("writes" in out for out, _ in outputs) == 1
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    assert all(str(folder) in out for out, _ in outputs) and remaining(folder) == [folder.name]


# Progress


def test_progress_is_printed_in_lines_without_a_terminal(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar, "_LINE_SECONDS", 0)
    preparation.prepare(settings(corpus, tmp_path))
    lines = capsys.readouterr().err.splitlines()
    trained = [line for line in lines if line.startswith("training the tokenizer: ")]
    encoded = [line for line in lines if line.startswith("encoding: ")]
    assert trained + encoded == lines and len(trained) == len(encoded) > 20
    total = sum(path.stat().st_size for path in Path(corpus[0]).iterdir())
    assert trained[-1] == f"training the tokenizer: 100% of {total / 1000:.3g} KB, 0:00 left"
    tokens = r"encoding: (\d+)% of .* KB, ([\d,]+) tokens, [\d,]+ tokens/s, \d+:\d\d left"
    figures = [re.fullmatch(tokens, line) for line in encoded]
    shares, counts = zip(*((int(f[1]), int(f[2].replace(",", ""))) for f in figures if f), strict=True)
    assert len(shares) == len(encoded) and list(shares) == sorted(shares) and shares[-1] == 100
    assert counts[-1] == len("\n".join(LINES) + "\n") and 40 < shares[list(counts).index(counts[len(counts) // 2])] < 60


def test_short_preparations_print_nothing(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preparation.prepare(settings(corpus, tmp_path))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_progress_bar(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar, "on_terminal", lambda _: True)
    monkeypatch.setattr(progress_bar, "_DELAY", 0)
    preparation.prepare(settings(corpus, tmp_path))
    bars = capsys.readouterr().err
    assert "training the tokenizer: 100%|" in bars and "encoding: 100%|" in bars
    assert re.search(r"encoding: 100%.* tokens, [\d,]+ tokens/s", bars)


def test_an_invalid_number_of_workers_is_refused(corpus: list[str], tmp_path: Path) -> None:
    for value, sentence in (("0", "--workers: got 0, expected 1 or more."), ("two", "--workers: got 'two', expected")):
        arguments = [*command(corpus, tmp_path, 1), "--workers", value]
        with pytest.raises(HvdlmError, match=sentence):
            prepare_command._parse(arguments[1:])
