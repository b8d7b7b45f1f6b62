"""Models and data sets of the Hugging Face Hub by name, from a cache made here; nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import _tree_cache, constants
from test_huggingface import TEXT, TRAIN, write_pretrained

from hvdlm.config import Config, DataConfig
from hvdlm.data.corpora import open_corpora
from hvdlm.errors import HvdlmError
from hvdlm_corpora import hub, hub_data
from hvdlm_huggingface.hub_models import located
from launching import losses, run_python

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
CONFIGURATIONS = """---
license: mit
configs:
- config_name: large
  data_files:
  - split: train
    path: large/train-*.jsonl
  - split: validation
    path: large/valid.jsonl
- config_name: small
  data_files: [small/a.jsonl, small/b.jsonl]
- config_name: outside
  data_files: ../../../secret.jsonl
- config_name: absolute
  data_files: SECRET
---
# A data set
"""


class Cache:
    """A cache in the form of ``huggingface_hub``; ``home``: what HF_HOME names."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def add(self, kind: str, name: str, files: Mapping[str, bytes], commit: str = COMMIT, branch: str = "main") -> Path:
        """Store a repository; return the folder of its snapshot."""
        repository = self.home / "hub" / f"{kind}s--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        for path, content in files.items():
            blob = repository / "blobs" / f"{abs(hash((path, content))):x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    made = Cache(tmp_path / "home")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    hub.snapshot.cache_clear()
    return made


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def data_set(cache: Cache, readme: str = CONFIGURATIONS) -> Path:
    files = {
        "README.md": readme.replace("SECRET", str(cache.home / "secret.jsonl")).encode(),
        "large/train-0.jsonl": rows("first", "second"),
        "large/train-1.jsonl": rows("third"),
        "large/valid.jsonl": rows("held out"),
        "small/a.jsonl": rows("small a"),
        "small/b.jsonl": rows("small b"),
        "picture.png": b"",
    }
    return cache.add("dataset", "owner/stories", files)


def trained_text(path: str, **options: Any) -> tuple[str, str]:
    """Return the training and the validation text of a path, as tokens of ``byte``."""
    config = Config(data=DataConfig(path=path, tokenizer="byte", context=4, **options))
    (corpus,) = open_corpora(config)
    data = corpus.data
    train, validation = (data.tokenizer.decode(split[:].tolist()) for split in (data.train, data.validation))
    return train, validation


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_model_is_taken_by_name(cache: Cache, tmp_path: Path, framework: str) -> None:
    """The same losses as from its folder; the run is resumed without the cache."""
    folder, run, text = tmp_path / "folder", tmp_path / "run", tmp_path / "text.txt"
    write_pretrained("llama", folder)
    text.write_text(TEXT)
    cache.add("model", "owner/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
    common = ["-m", "hvdlm", "--framework", framework, "--data.path", str(text), "--data.context", "16", *TRAIN]
    curves = []
    for named, output in ((str(folder), tmp_path / "other"), ("owner/tiny@main", run)):
        done = run_python(
            [*common, "--model.pretrained", named, "--log.run", str(output)],
            HF_HOME=str(cache.home),
            HF_HUB_OFFLINE="1",
            XDG_CACHE_HOME=str(tmp_path / "user"),
        )
        assert done.returncode == 0, done.stderr
        curves.append(losses(output))
    assert curves[0] == curves[1]
    # The tokenizer alone is still needed.
    for path in cache.home.rglob("*"):
        if path.is_symlink() and path.name != "tokenizer.json":
            path.unlink()
    resume = ["--config", str(run / "config.yaml"), "--train.steps", "6", "--checkpoint.resume", "auto"]
    resumed = run_python(["-m", "hvdlm", *resume], HF_HOME=str(cache.home), HF_HUB_OFFLINE="1")
    assert resumed.returncode == 0, resumed.stderr
    assert len(losses(run)) == 6


def test_a_revision_is_a_branch_tag_or_commit(cache: Cache) -> None:
    new = cache.add("model", "gpt2", {"config.json": b"{}"})
    old = cache.add("model", "gpt2", {"config.json": b"{ }"}, OLD_COMMIT, "v1")
    assert located(Path("gpt2")) == new
    assert located(Path("gpt2@v1")) == located(Path(f"gpt2@{OLD_COMMIT}")) == old


def test_a_folder_counts_before_a_name(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add("model", "gpt2", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert located(Path("gpt2")) == Path("gpt2")
    assert located(tmp_path / "missing") == tmp_path / "missing"  # a path is no name


def test_a_model_that_is_not_in_the_cache_is_refused(cache: Cache) -> None:
    with pytest.raises(
        HvdlmError, match=r"model.pretrained gpt3: there is no such folder, and .* can't be reached"
    ) as e:
        located(Path("gpt3"))
    assert len(str(e.value)) < 400 and "hf download gpt3" in str(e.value)


def test_an_unfinished_download_is_not_used(cache: Cache) -> None:
    """``trees`` is what huggingface_hub notes about the files of a repository."""
    snapshot = cache.add("model", "gpt2", {"config.json": b"{}"})
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    sizes = {"config.json": 2, "pytorch_model.bin": 9}
    for unused in (True, False):
        files = {name: {"size": size, "blob_id": "0"} for name, size in sizes.items()}
        (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        _tree_cache._IN_MEMORY_TREE_CACHE.clear()
        hub.snapshot.cache_clear()
        if unused:  # a file that isn't asked for
            assert located(Path("gpt2")) == snapshot
        else:
            with pytest.raises(HvdlmError, match="gpt2"):
                located(Path("gpt2"))
        sizes["model.safetensors"] = 9


def test_the_split_of_a_configuration_is_read(cache: Cache) -> None:
    data_set(cache)
    assert trained_text("hf:owner/stories/large") == ("first\nsecond\nthird\n", "held out\n")
    assert trained_text("hf:owner/stories@main/large")[0] == "first\nsecond\nthird\n"
    train, validation = trained_text("hf:owner/stories/small", validation_share=0.5)
    assert train + validation == "small a\nsmall b\n"


def test_a_data_set_validates_a_text(cache: Cache, tmp_path: Path) -> None:
    data_set(cache)
    (tmp_path / "mine.txt").write_text("mine")
    assert trained_text(str(tmp_path / "mine.txt"), validation_path="hf:owner/stories/large") == ("mine", "held out\n")


def test_data_sets_are_mixed(cache: Cache) -> None:
    data_set(cache)
    mixture = {"a": {"path": "hf:owner/stories/large"}, "b": {"path": "hf:owner/stories/small"}}
    corpora = open_corpora(Config(data=DataConfig(mixture=mixture, tokenizer="byte", context=4, validation_share=0.4)))
    assert [corpus.name for corpus in corpora] == ["a", "b"] and len(corpora[0].data.validation) == len("held out\n")


def test_a_folder_without_a_description_is_read_as_a_folder(cache: Cache) -> None:
    data_set(cache, readme="# No YAML\n")
    assert trained_text("hf:owner/stories/large") == ("first\nsecond\nthird\n", "held out\n")


def test_the_description_of_a_data_set_is_no_text_of_it(cache: Cache) -> None:
    cache.add("dataset", "owner/plain", {"README.md": b"# About it\n", "a.jsonl": rows("first", "second")})
    assert "".join(trained_text("hf:owner/plain", validation_share=0.5)) == "first\nsecond\n"
    cache.add("dataset", "owner/nothing_else", {"README.md": b"# About it\n"})
    with pytest.raises(HvdlmError, match=r"holds no .* file \(left out: 1 description of a data set \(README.md\)\)"):
        trained_text("hf:owner/nothing_else")


@pytest.mark.parametrize(
    "configurations",
    [
        "[{config_name: 2024, data_dir: large}]",
        "[{config_name: small, data_files: small/a.jsonl}, {config_name: 2024, data_dir: /large/, default: true}]",
        "[{config_name: small, data_files: small/a.jsonl}, {config_name: default, data_dir: large}]",
    ],
)
def test_a_default_configuration_may_be_a_folder(cache: Cache, configurations: str) -> None:
    data_set(cache, readme=f"---\nconfigs: {configurations}\n---\n")
    assert trained_text("hf:owner/stories") == ("first\nsecond\nthird\n", "held out\n")


def test_an_empty_list_of_configurations_is_none(cache: Cache) -> None:
    data_set(cache, readme="---\nconfigs:\n---\n")
    assert trained_text("hf:owner/stories/large")[1] == "held out\n"


def test_a_folder_outside_of_the_data_set_is_refused(cache: Cache) -> None:
    data_set(cache, readme="---\nconfigs: [{config_name: a, data_dir: ../../..}]\n---\n")
    with pytest.raises(HvdlmError, match="neither a configuration nor a folder"):
        trained_text("hf:owner/stories")


def test_token_files_are_read(cache: Cache) -> None:
    ids = np.arange(64, dtype="<u2")
    files = {"corpus_train_000001.bin": ids.tobytes(), "corpus_val_000000.bin": ids[:32].tobytes()}
    cache.add("dataset", "owner/tokens", files)
    config = Config(data=DataConfig(path="hf:owner/tokens", vocab_size=64, context=4))
    (corpus,) = open_corpora(config)
    assert (len(corpus.data.train), len(corpus.data.validation)) == (64, 32)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("hf:owner/stories", "has the configurations large, small, outside, absolute: name one, for example"),
        ("hf:owner/stories/larg", "did you mean large"),
        ("hf:owner/stories/outside", "names files of split train that the data set doesn't have"),
        ("hf:owner/stories/absolute", "names files of split train that the data set doesn't have"),
        ("hf:owner/" + "x" * 100, "this is no name of the Hugging Face Hub"),
        ("hf:owner/nothing", "the cache of huggingface_hub has no dataset of this name"),
        ("hf:", "this is no name of a data set"),
        ("hf:../../etc", "this is no name of a data set"),
        ("hf:owner/stories@v2/large", "can't be reached"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence(cache: Cache, path: str, sentence: str) -> None:
    data_set(cache)
    (cache.home / "secret.jsonl").write_bytes(rows("secret"))
    with pytest.raises(HvdlmError) as error:
        trained_text(path)
    assert sentence in str(error.value) and path in str(error.value) and len(str(error.value)) < 400


def test_a_split_that_is_missing_is_refused(cache: Cache) -> None:
    data_set(cache)
    with pytest.raises(HvdlmError, match=r"it has no split 'trian' \(--data.split\); did you mean train\?"):
        trained_text("hf:owner/stories/large", split="trian")


def test_a_mapping_names_the_files_of_splits(cache: Cache) -> None:
    files = "{train: large/train-0.jsonl, validation: [large/valid.jsonl]}"
    data_set(cache, readme=f"---\nconfigs: [{{config_name: default, data_files: {files}}}]\n---\n")
    assert trained_text("hf:owner/stories") == ("first\nsecond\n", "held out\n")


@pytest.mark.parametrize(
    "header",
    ["configs: 3", "configs: [{data_files: 3}]", "configs: [{config_name: a, data_files: 3}]", "a: [", "!!x 1"],
)
def test_damaged_descriptions_are_refused(cache: Cache, header: str) -> None:
    data_set(cache, readme=f"---\n{header}\n---\n")
    with pytest.raises(HvdlmError, match=r"the configurations in its README.md can't be read"):
        hub_data.local(DataConfig(path="hf:owner/stories"))


def test_the_cache_is_not_changed(cache: Cache) -> None:
    snapshot = data_set(cache)
    before = sorted(snapshot.parent.parent.rglob("*"))
    trained_text("hf:owner/stories/large")
    assert sorted(snapshot.parent.parent.rglob("*")) == before
