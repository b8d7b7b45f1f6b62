"""The user's cache of built wheels, keyed by everything that they depend on, and of build logs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hvdlm.io import file_lock
from hvdlm.io.safe_files import delete_folder
from hvdlm.io.user_folders import user_cache
from hvdlm_horovod.console import BuildError, say


def named(name: str, key: Mapping[str, str]) -> str:
    """Return ``name`` with a digest of ``key``."""
    return f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def log(name: str, key: Mapping[str, str]) -> Path:
    """Return the path of a log; simultaneous builds have different keys, and so separate logs."""
    return user_cache() / "logs" / f"{named(name, key)}.log"


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Lock ``name``, so that one process builds it and a second one uses the cached wheel."""
    user_cache().mkdir(parents=True, exist_ok=True)
    try:
        held = file_lock.acquire(user_cache() / f"{name}.lock", wait=True, say=say)
    except OSError as error:
        raise BuildError(f"{error.filename}: {error.strerror}: repair the folder") from error
    with held:
        yield


def wheel(name: str, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
    """Return the wheel ``name`` for ``key`` from the cache; if there is none, ``build(folder)`` writes it."""
    cached = user_cache() / "wheels" / named(name, key)
    with lock(cached.name):
        if not list(cached.glob("*.whl")):
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
                build(Path(temporary))
                (Path(temporary) / "key.json").write_text(json.dumps(key, indent=1, sort_keys=True))
                delete_folder(cached)
                delete_folder(cached.with_name(f"{cached.name}.partial"))  # of a build that was interrupted
                shutil.copytree(temporary, f"{cached}.partial")
                os.replace(f"{cached}.partial", cached)
        else:
            say(f"{name}: wheel from the cache ({cached})")
    return next(cached.glob("*.whl"))
