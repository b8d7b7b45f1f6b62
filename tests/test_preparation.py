"""``prepare`` with several workers, killed at any moment, seen from outside: always the same folder, or none."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_documents import WRITERS

from hvdlm import cli
from hvdlm.config import DataConfig
from hvdlm.configuration import parsing
from hvdlm.data import documents, preparation, prepare_progress, progress, sources, tokenizers, workers
from hvdlm.data.source_chunks import Reading
from hvdlm.data.workers import WorkerDied
from hvdlm.errors import HvdlmError
from launching import environment

LINES = [f"the line number {i} says {'much ' * (i % 7)}红楼梦" for i in range(3000)]
SMALL_PIECES = "from hvdlm.data import documents, journal, sources; sources._CHUNK = 4000; documents._PIECE = 4000\n"


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Cut sources into pieces of some thousand bytes."""
    patch.setattr(sources, "_CHUNK", 4000)
    patch.setattr(documents, "_PIECE", 4000)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


def write_corpus(place: Path) -> list[str]:
    """Write a text, JSON lines and a table, of some 40 pieces; return their folder."""
    folder = place / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(LINES[:1000]) + "\n", encoding="utf-8")
    WRITERS["x.jsonl"](folder / "b.jsonl", LINES[1000:2000])
    WRITERS["x.parquet"](folder / "c.parquet", LINES[2000:])
    return [str(folder)]


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    return write_corpus(tmp_path)


def settings(corpus: list[str], tmp_path: Path, tokenizer: str = "char") -> DataConfig:
    size = 300 if tokenizer in ("word", "bpe") else None
    return DataConfig(path=corpus, tokenizer=tokenizer, vocab_size=size, cache=str(tmp_path / "cache"))


def files(folder: Path) -> dict[str, str]:
    """Return the digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def left(folder: Path) -> list[str]:
    """Return what lies beside a token folder, but for locks, the corpus and the cache."""
    names = (path.name for path in folder.parent.iterdir() if path.suffix != ".lock")
    return sorted(name for name in names if name not in ("corpus", "cache"))


# Places


@pytest.mark.parametrize("name", [*WRITERS, "x.txt", "x.txt.gz"])
def test_reading_goes_on_at_the_end_of_any_piece(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in WRITERS:
        WRITERS[name](path, LINES)
    else:
        data = "\n".join(LINES).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    whole_reading = Reading()
    whole = list(sources.pieces(str(path), reading=whole_reading))
    assert len(whole) > 20 and whole_reading.done == path.stat().st_size
    for number in (0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        reading = Reading()
        rest = list(sources.pieces(str(path), place=whole[number].end, reading=reading))
        assert rest == whole[number + 1 :]
        assert sources.digest(str(path), reading) == sources.digest(str(path), whole_reading)


def test_a_word_longer_than_any_is_cut_between_characters_wherever_reading_began(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("红" * 100_000 + " end")
    whole = list(sources.pieces(str(path)))
    assert "".join(piece.text for piece in whole) == path.read_text() and len(whole) > 3
    for number, piece in enumerate(whole):
        assert list(sources.pieces(str(path), place=piece.end)) == whole[number + 1 :]


# Workers


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_the_folder_is_the_same_for_any_number_of_workers(tokenizer: str, corpus: list[str], tmp_path: Path) -> None:
    found = []
    for count in (1, 2, 3):
        folder = tmp_path / f"by-{count}"
        data = preparation.prepare(settings(corpus, tmp_path, tokenizer), str(folder), count)
        found.append((files(folder), data.fingerprint))
    assert found[0] == found[1] == found[2] and set(found[0][0]) == {"header.json", "tokenizer.json", "tokens.bin"}


def test_few_texts_are_under_way_at_a_time() -> None:
    read = 0

    def texts() -> Iterator[tuple[str, int]]:
        nonlocal read
        for read in range(1, 101):
            yield f"text {read}", read

    for label, ids in workers.encoded(tokenizers.ByteTokenizer(), texts(), 2):
        assert bytes(ids.tolist()).decode() == f"text {label}"
        assert read - label < 2 * 2
    assert label == 100


def test_short_texts_and_quick_tokenizers_need_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    word, byte = tokenizers.train("word", 9, ["a b"]), tokenizers.ByteTokenizer()
    assert [workers.choose(None, word, size) for size in (10**6, 10**9)] == [1, 8]
    assert workers.choose(None, byte, 10**9) == 1 and workers.choose(3, byte, 10) == 3


def test_a_text_that_fails_in_a_worker_ends_all_with_its_sentence_and_leaves_nothing(
    corpus: list[str], tmp_path: Path
) -> None:
    vocabulary = tmp_path / "cache" / "tokenizer.json"
    vocabulary.parent.mkdir()
    characters = "".join(sorted(set("\n".join(LINES))))
    vocabulary.write_text(json.dumps({"kind": "char", "characters": characters}))
    Path(corpus[0], "b.txt").write_text("é\n")
    folder = tmp_path / "tokens"
    with pytest.raises(HvdlmError, match="character 'é' is not among"):
        preparation.prepare(settings(corpus, tmp_path, str(vocabulary)), str(folder), 2)
    assert not left(folder) and not multiprocessing.active_children()


def test_a_worker_that_dies_ends_all_with_a_sentence_and_the_next_attempt_goes_on(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add, config = prepare_progress.Journal.add, settings(corpus, tmp_path)
    expected = files(preparation.prepare(config, str(tmp_path / "expected")).folder)
    monkeypatch.setattr(prepare_progress, "_EVERY", 0)

    def killing(self: prepare_progress.Journal, *more: Any) -> None:
        add(self, *more)
        if self.state.pieces == 5:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    monkeypatch.setattr(prepare_progress.Journal, "add", killing)
    with pytest.raises(WorkerDied, match=r"a worker that encodes died: .*--workers 1.*goes on"):
        preparation.prepare(config, str(tmp_path / "tokens"), 2)
    assert not multiprocessing.active_children() and not (tmp_path / "tokens").exists()
    monkeypatch.setattr(prepare_progress.Journal, "add", add)
    assert files(preparation.prepare(config, str(tmp_path / "tokens")).folder) == expected
    assert "going on after" in capfd.readouterr().err and left(tmp_path / "tokens") == ["expected", "tokens"]


def test_a_full_disk_ends_it_with_a_sentence_and_leaves_nothing(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: prepare_progress.Journal, *more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_progress.Journal, "add", full)
    with pytest.raises(HvdlmError, match=r"can't be written to .*tokens: No space left on device: free space"):
        preparation.prepare(settings(corpus, tmp_path), str(tmp_path / "tokens"), 2)
    assert not left(tmp_path / "tokens") and not multiprocessing.active_children()


def test_workers_import_no_framework(corpus: list[str], tmp_path: Path) -> None:
    for name in ("torch", "tensorflow", "keras", "horovod", "mpi4py"):
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text("import os; os._exit(9)\n")
    command = [sys.executable, "-m", "hvdlm", "prepare", "--data.path", corpus[0], "--workers", "2"]
    command += ["--output", str(tmp_path / "tokens"), "--data.cache", str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment(PYTHONPATH=str(tmp_path / "fake")), capture_output=True, text=True)
    assert done.returncode == 0 and "training and" in done.stdout and not done.stderr


# Kills

MOMENTS = {
    "while the tokenizer is trained": ("tokenizers.train", "before", 1),
    "before anything is on disk": ("journal.Journal.begin", "before", 1),
    "before the first journal": ("journal.Journal._save", "before", 1),
    "after the first piece": ("journal.Journal.add", "after", 1),
    "in the text": ("journal.Journal.add", "after", 7),
    "in the JSON lines": ("journal.Journal.add", "after", 17),
    "in the table": ("journal.Journal.add", "after", 27),
    "before a journal takes its name": ("os.replace", "before", 9),
    "when all is encoded": ("journal.Journal.finish", "after", 1),
    "before the folder has its name": ("journal.Journal.put_in_place", "before", 1),
    "before the rest is deleted": ("journal.Journal.discard", "before", 1),
}
KILLED = (
    SMALL_PIECES
    + """
import os, signal, sys
from hvdlm import cli
from hvdlm.data import tokenizers
journal._EVERY = 0
name, when, count = {moment!r}
holder, _, attribute = name.rpartition(".")
holder = eval(holder)
real, calls = getattr(holder, attribute), 0

def killing(*arguments, **more):
    global calls
    calls += 1
    if when == "before" and calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **more)
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
def test_killed_at_any_moment_the_same_command_goes_on_to_the_same_folder(
    moment: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = files(preparation.prepare(settings(corpus, tmp_path), str(tmp_path / "expected")).folder)
    count = 2 if moment == "in the table" else 1
    arguments = command(corpus, tmp_path, count)
    code = KILLED.format(moment=MOMENTS[moment], arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = (tmp_path / "tokens").exists()
    assert before == (moment == "before the rest is deleted")
    if before:  # it is whole: the command is refused, and a run takes it
        assert files(tmp_path / "tokens") == expected and cli.main(arguments) == 2
        (tmp_path / "tokens").rename(tmp_path / "cache")
    assert cli.main(arguments) == 0
    said = re.findall(r"going on after ([\d,]+) tokens", capsys.readouterr().err)
    begun = ("in the", "after", "when all", "before a journal", "before the folder")
    assert bool(said) == moment.startswith(begun)
    if moment.startswith("in the"):
        assert int(said[0].replace(",", "")) > 1000
    assert files(tmp_path / "tokens") == expected and left(tmp_path / "tokens") == ["expected", "tokens"]


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until something holds; a test that waits for ever has failed."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_workers_end_with_the_process_that_started_them(corpus: list[str], tmp_path: Path) -> None:
    code = SMALL_PIECES + (
        "import signal; from hvdlm import cli\n"
        "journal.Journal.add = lambda *more: signal.pause()\n"
        f"cli.main({command(corpus, tmp_path, 2)!r})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment()) as process:
        wait_for(lambda: len(children(process.pid)) >= 3)  # two workers, and the keeper of what they share
        started = children(process.pid)
        process.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def test_an_interruption_says_how_to_go_on(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = prepare_progress.Journal.add

    def interrupting(self: prepare_progress.Journal, *more: Any) -> None:
        add(self, *more)
        if self.state.pieces == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_progress.Journal, "add", interrupting)
    monkeypatch.setattr(prepare_progress, "_EVERY", 0)
    assert cli.main(command(corpus, tmp_path, 1)) == 130
    assert capsys.readouterr().err == "hvdlm: interrupted; the same command goes on where it was\n"
    monkeypatch.setattr(prepare_progress.Journal, "add", add)
    assert cli.main(command(corpus, tmp_path, 1)) == 0
    assert "going on after" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["source", "option"])
def test_work_on_another_text_or_with_other_settings_is_not_gone_on_with(
    change: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(corpus, tmp_path)
    arguments = command(corpus, tmp_path, 1)
    if change == "source":
        Path(corpus[0], "a.txt").write_text("another text\n" * 2000)
    else:
        arguments += ["--data.separator", "|"]
    assert cli.main(arguments) == 0
    assert "going on" not in capsys.readouterr().err and left(tmp_path / "tokens") == ["tokens"]
    more = {"separator": "|"} if change == "option" else {}
    config = DataConfig(path=corpus, cache=str(tmp_path / "cache"), **more)  # type: ignore[arg-type]
    assert files(preparation.prepare(config).folder) == files(tmp_path / "tokens")


def begun(corpus: list[str], tmp_path: Path) -> Path:
    """Begin ``tokens``, be killed in the JSON lines, and return the partial folder."""
    code = KILLED.format(moment=MOMENTS["in the JSON lines"], arguments=command(corpus, tmp_path, 1))
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return prepare_progress.partial(tmp_path / "tokens")


def said(**changes: Any) -> Callable[[Path], Any]:
    """Return a damage: entries of the journal are changed."""

    def action(path: Path) -> None:
        found = json.loads((path / "journal.json").read_text())
        (path / "journal.json").write_text(json.dumps(found | changes))

    return action


def shortened(name: str) -> Callable[[Path], Any]:
    """Return a damage: a file is cut."""
    return lambda path: os.truncate(path / name, 9)


def linked(name: str) -> Callable[[Path], Any]:
    """Return a damage: a file is a link to one elsewhere."""

    def action(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(path.parent / "elsewhere")

    return action


HARMS: dict[str, Callable[[Path], Any]] = {
    "no journal": lambda path: (path / "journal.json").unlink(),
    "half a journal": lambda path: os.truncate(path / "journal.json", 50),
    "no mapping": lambda path: (path / "journal.json").write_text("[]"),
    "too deep": lambda path: (path / "journal.json").write_text("[" * 10**5),
    "another format": said(format="x"),
    "a source that is not there": said(source=7, digests=["0"] * 7),
    "less than nothing": said(tokens=-1),
    "more than all": said(tokens=10**30),
    "a word for a number": said(offset="5"),
    "a truth for a number": said(number=True),
    "a place before the first piece": said(source=0, pieces=0, tokens=0, bytes=0, digests=[]),
    "no digests": said(digests=None),
    "digests that are none": said(digests=[5]),
    "too many digests": said(digests=["0", "0", "0"]),
    "another tokenizer": said(tokenizer="0" * 64),
    "more pieces": said(pieces=10**9),
    "fewer pieces": said(pieces=3),
    "more tokens": said(tokens=10**9),
    "fewer tokens": said(tokens=3),
    "cut tokens": shortened("tokens/tokens.bin"),
    "cut places": shortened("places.bin"),
    "no tokenizer": lambda path: (path / "tokens/tokenizer.json").write_text("{}"),
    "odd places": lambda path: (path / "places.bin").write_bytes(b"\xff" * 24 * 200),
    "linked tokens": linked("tokens/tokens.bin"),
    "linked places": linked("places.bin"),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a folder with a corpus and tokens that were begun, and what they become."""
    place = tmp_path_factory.mktemp("killed")
    made = write_corpus(place)
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        expected = files(preparation.prepare(settings(made, place), str(place / "expected")).folder)
        begun(made, place)
    return place, expected


@pytest.mark.parametrize("harm", list(HARMS))
def test_damaged_work_is_begun_anew(
    harm: str, killed: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, expected = killed
    (tmp_path / "elsewhere").write_bytes(b"keep me" * 100_000)
    shutil.copytree(prepare_progress.partial(place / "tokens"), prepare_progress.partial(tmp_path / "tokens"))
    HARMS[harm](prepare_progress.partial(tmp_path / "tokens"))
    config = settings([str(place / "corpus")], place)
    assert files(preparation.prepare(config, str(tmp_path / "tokens")).folder) == expected
    assert "going on" not in capsys.readouterr().err and left(tmp_path / "tokens") == ["elsewhere", "tokens"]
    assert (tmp_path / "elsewhere").read_bytes() == b"keep me" * 100_000


def test_undamaged_work_is_gone_on_with(
    killed: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, expected = killed
    shutil.copytree(prepare_progress.partial(place / "tokens"), prepare_progress.partial(tmp_path / "tokens"))
    config = settings([str(place / "corpus")], place)
    assert files(preparation.prepare(config, str(tmp_path / "tokens")).folder) == expected
    assert "going on after" in capsys.readouterr().err


def test_a_partial_folder_that_is_a_link_is_not_followed(tmp_path: Path, corpus: list[str]) -> None:
    begun(corpus, tmp_path).rename(tmp_path / "corpus" / "there")
    before = files(tmp_path / "corpus" / "there" / "tokens")
    prepare_progress.partial(tmp_path / "tokens").symlink_to(tmp_path / "corpus" / "there")
    assert cli.main(command([str(tmp_path / "corpus" / "a.txt")], tmp_path, 1)) == 0
    assert files(tmp_path / "corpus" / "there" / "tokens") == before


def test_several_at_once_write_one_folder_once(corpus: list[str], tmp_path: Path) -> None:
    code = SMALL_PIECES + (
        "import sys; from hvdlm import cli; from hvdlm.data import preparation as p\n"
        "run = p.Preparation.run\n"
        "p.Preparation.run = lambda *more: (print('writes', flush=True), run(*more))\n"
        f"sys.exit(cli.main(['prepare', '--data.path', {corpus[0]!r}, '--data.cache', {str(tmp_path / 'cache')!r}]))"
    )
    begin = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **begin) for _ in range(3)]  # type: ignore[call-overload]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sum("writes" in out for out, _ in said) == 1
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    assert all(str(folder) in out for out, _ in said) and left(folder) == [folder.name]


# What is shown


def test_what_is_done_is_told_in_lines_where_nobody_looks(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0)
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


def test_short_work_says_nothing(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preparation.prepare(settings(corpus, tmp_path))
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_where_a_person_looks(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "on_terminal", lambda _: True)
    monkeypatch.setattr(progress, "_FIRST", 0)
    preparation.prepare(settings(corpus, tmp_path))
    bars = capsys.readouterr().err
    assert "training the tokenizer: 100%|" in bars and "encoding: 100%|" in bars
    assert re.search(r"encoding: 100%.* tokens, [\d,]+ tokens/s", bars)


def test_a_number_of_workers_that_is_none_is_refused(corpus: list[str], tmp_path: Path) -> None:
    for value, sentence in (("0", "--workers: got 0, expected 1 or more."), ("two", "--workers: got 'two', expected")):
        arguments = [*command(corpus, tmp_path, 1), "--workers", value]
        with pytest.raises(HvdlmError, match=sentence):
            parsing.parse_prepare(arguments[1:])
