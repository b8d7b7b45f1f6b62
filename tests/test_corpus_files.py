"""Which files of a corpus are read (splits, shards, hidden files, links, suffixes), and what is printed of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError
from hvdlm_corpora import corpus_files, preparation, progress_bar, splits
from record_files import WRITERS, write_arrow, write_data_set


@pytest.fixture(autouse=True)
def _every_note_is_printed() -> None:
    progress_bar.note.cache_clear()


def chosen(path: Path, **options: Any) -> tuple[list[str], list[str]]:
    """Return the names of the files for training and validation, below ``path``."""
    config = splits.choose(DataConfig(path=[str(path)], **options))
    groups = (config.paths, config.validation_paths)
    training, validation = ([str(Path(file).relative_to(path)) for file in group] for group in groups)
    return training, validation


def write(folder: Path, *names: str) -> None:
    """Write a small file of every name, in the format of its suffix."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = WRITERS.get(f"x{path.suffix}")
        if writer:
            writer(path, [f"text of {name}"])
        else:
            path.write_text(f"text of {name}\n")


SPLITS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "files": (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"], ["valid.jsonl"]),
    "folders": (["train/a.parquet", "validation/a.parquet", "test/a.parquet"], ["train/a.parquet"],
                ["validation/a.parquet"]),
    "longer names": (["wiki.train.txt", "wiki.val.txt", "wiki.test.txt"], ["wiki.train.txt"], ["wiki.val.txt"]),
    "synonyms": (["training/a.txt", "dev/a.txt", "eval/a.txt"], ["training/a.txt"], ["dev/a.txt"]),
    "two of them": (["d/train-1.csv", "d/train-2.csv", "d/test.csv"], ["d/train-1.csv", "d/train-2.csv"], []),
    "the nearest name counts": (["test-corpus/train/a.txt", "test-corpus/test/a.txt"], ["test-corpus/train/a.txt"], []),
    "no split": (["a.txt", "contest.txt", "trainer.md"], ["a.txt", "contest.txt", "trainer.md"], []),
    "one split": (["train/a.txt", "train/b.txt"], ["train/a.txt", "train/b.txt"], []),
}  # fmt: skip


@pytest.mark.parametrize("names, training, validation", SPLITS.values(), ids=list(SPLITS))
def test_splits_are_recognised_by_their_names(
    names: list[str], training: list[str], validation: list[str], tmp_path: Path
) -> None:
    write(tmp_path, *names)
    assert chosen(tmp_path) == (training, validation)


def test_what_a_data_set_leaves_out_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "train.txt", "valid.txt", "test.txt", "README.md")
    assert chosen(tmp_path, split="test") == (["test.txt"], ["valid.txt"])
    assert capsys.readouterr().err == (
        f"hvdlm: data.path {tmp_path}: training split test (1 files), validation split valid (1 files), not read: "
        "1 that belong to no split; split train\n"
    )
    with pytest.raises(HvdlmError, match=r"has no split 'tets' .*did you mean test"):
        chosen(tmp_path, split="tets")


def test_a_complete_corpus_needs_no_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.txt", "b/c.md", "data-00000-of-00002.jsonl", "data-00001-of-00002.jsonl")
    assert len(chosen(tmp_path)[0]) == 4
    assert capsys.readouterr().err == ""


def test_an_incomplete_set_of_shards_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "c4-train.00000-of-01024.json", "c4-train.00007-of-01024.json", "b-0-of-1.txt")
    chosen(tmp_path)
    assert f"hvdlm: data.path {tmp_path}/c4-train: 2 of a set of 1,024 files\n" == capsys.readouterr().err


def test_hidden_files_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt", ".git/x.md")
    assert chosen(tmp_path)[0] == ["a.txt"]
    assert capsys.readouterr().err == f"hvdlm: data.path {tmp_path}: 1 files, not read: 4 hidden\n"


def test_files_of_other_types_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.txt", "b.png", "c.png", "Makefile", "texts.tar.gz", "settings.json", "figures.csv")
    (tmp_path / "settings.json").write_text('{"epochs": 3}')
    (tmp_path / "figures.csv").write_text("step,loss\n1,2\n")
    assert chosen(tmp_path)[0] == ["a.txt"]
    printed = capsys.readouterr().err
    assert "4 other types (.gz, .png, Makefile)" in printed
    assert "2 no field 'text' (figures.csv, settings.json)" in printed


def test_a_folder_without_texts_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, "a.png", ".hidden.txt")
    with pytest.raises(HvdlmError, match=r"the folder holds no \.txt, .* file \(left out: 1 hidden; 1 other types"):
        chosen(tmp_path)


def test_linked_files_are_read_and_linked_folders_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "blobs", "0123")
    write(tmp_path / "elsewhere", "b.txt")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").symlink_to("../blobs/0123")  # as in the cache of huggingface_hub
    (corpus / "more").symlink_to("../elsewhere")
    (corpus / "loop").symlink_to(".")
    (corpus / "dangling.txt").symlink_to("../nowhere")
    assert chosen(corpus)[0] == ["a.txt"]
    assert "2 linked folders (loop, more)" in (printed := capsys.readouterr().err)
    assert "1 other types (.txt)" in printed or "dangling" in printed
    linked = splits.choose(DataConfig(path=[str(corpus / "more")]))
    assert linked.paths == [str(corpus / "more" / "b.txt")]


def test_a_pattern_names_the_folders_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.txt", "b/c.txt")
    config = splits.choose(DataConfig(path=[str(tmp_path / "*")]))
    assert config.paths == [str(tmp_path / "a.txt")]
    assert "not read: 1 folder that the pattern matches" in capsys.readouterr().err
    assert corpus_files.find(str(tmp_path / "**"), "text").notes == []


def test_caches_beside_a_data_set_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(tmp_path, ["a"])
    write_arrow(tmp_path / "cache-1dad339083a48ce6.arrow", ["mapped"])
    assert chosen(tmp_path)[0] == ["data-00000-of-00001.arrow"]
    assert "1 not listed in the data set's state.json" in capsys.readouterr().err


def test_a_file_named_in_full_is_always_read(tmp_path: Path) -> None:
    write(tmp_path, "._a.txt", "notes")
    for name in ("._a.txt", "notes"):
        config = DataConfig(path=str(tmp_path / name), tokenizer="byte", cache=str(tmp_path / "cache"))
        assert len(preparation.prepare(config).train) > 0


def test_a_readable_name_is_found_for_every_suffix() -> None:
    for name in ("a.txt", "a.TXT.GZ", "a.jsonl.zst", "a.csv", "a.parquet", "a.arrow", "a.md.xz"):
        assert corpus_files.is_known(name)
    for name in ("a.png", "a.tar.gz", "a.tar", "a.tgz", "a.zip", "txt"):
        assert not corpus_files.is_known(name)
