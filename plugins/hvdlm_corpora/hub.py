"""Models and data sets of the Hugging Face Hub by name: their folder in the cache of ``huggingface_hub``."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hvdlm.diagnostics.phases import process
from hvdlm.io import file_lock, launcher_env
from hvdlm.io.untrusted_input import shown
from hvdlm.io.user_folders import user_cache

_NAME = re.compile(r"(?P<name>[\w][\w.-]*(/[\w][\w.-]*)?)(@(?P<revision>[\w][\w./-]*))?")


class Repository(NamedTuple):
    """A repository ``name`` or ``owner/name``, and a branch, tag or commit of it; None: its main branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def named(text: str) -> Repository | None:
    """Return the repository that ``NAME``, ``OWNER/NAME`` or one of these with ``@REVISION`` names; None: no name."""
    match = _NAME.fullmatch(text)
    return Repository(match["name"], match["revision"]) if match else None


class Unavailable(Exception):
    """A repository can't be had: its text says why and what to do, as the rest of a sentence."""


@functools.cache
def snapshot(kind: str, repository: Repository, patterns: tuple[str, ...]) -> Path:
    """Return the folder of the cache with a repository's files that match ``patterns``, downloaded if need be.

    What the cache holds is taken as it is, without asking the hub for a newer revision: a run means the same tomorrow,
    and ranks don't ask one by one. One process of a user downloads, the others wait for it.

    Args:
        kind: ``model`` or ``dataset``.
        repository: whose files.
        patterns: of the paths of files (shell patterns, in which ``*`` matches slashes, too).

    Raises:
        Unavailable: the hub can't be reached, or it has no such repository or revision.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        cached = _download(kind, repository, patterns, local=True)
    except HFValidationError:
        raise Unavailable("this is no name of the Hugging Face Hub: check it.") from None
    if cached is not None:
        return cached
    lock = user_cache() / f"hub-{kind}-{re.sub('[^A-Za-z0-9.-]', '_', str(repository))}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    launch = launcher_env.launch_identity()
    with process.during("downloading from the Hugging Face Hub", patience=math.inf):
        with file_lock.acquire(lock, wait=True, launch=launch, shared=False):
            cached = _download(kind, repository, patterns, local=True)
            return cached or _from_hub(kind, repository, patterns)


def _download(kind: str, repository: Repository, patterns: Sequence[str], local: bool) -> Path | None:
    """Return the folder of a snapshot, of the cache alone if ``local``: None if it isn't there or is incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository.name,
                repo_type=kind,
                revision=repository.revision,
                allow_patterns=list(patterns),
                local_files_only=local,
            )
        )
    except LocalEntryNotFoundError:
        if local:
            return None
        raise


def _from_hub(kind: str, repository: Repository, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors

    try:
        folder = _download(kind, repository, patterns, local=False)
    except errors.GatedRepoError:
        raise Unavailable(
            f"the {kind} {repository} of the Hugging Face Hub asks for its terms to be accepted: accept them on "
            "huggingface.co, and set HF_TOKEN to a token of that account."
        ) from None
    except errors.RevisionNotFoundError:
        raise Unavailable(f"the Hugging Face Hub has no revision {repository.revision} of {repository.name}.") from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(
            f"the Hugging Face Hub has no {kind} of this name, or it is private: check the name, or set HF_TOKEN."
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        reason = shown(str(error.__cause__ or error).partition("\n")[0], 120)
        raise Unavailable(
            f"the cache of huggingface_hub has no {kind} of this name, and the hub can't be reached ({reason}): "
            f"download it where there is internet (hf download {repository.name}) and set HF_HOME."
        ) from error
    assert folder is not None
    return folder


def root_of(snapshot: Path) -> Path:
    """Return the folder of the cache that a snapshot's files, which are links, may lie in."""
    return snapshot.parent.parent
