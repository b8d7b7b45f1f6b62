"""The user's cache of built wheels, keyed by all that they depend on, and of build logs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hvdlm.io.user_folders import user_cache
from hvdlm_horovod.console import say


def named(name: str, key: Mapping[str, str]) -> str:
    """Return ``name`` with a digest of ``key``."""
    return f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def log(name: str, key: Mapping[str, str]) -> Path:
    """Return the path of a log; what is built or set up at the same time has other keys, and logs of its own."""
    return user_cache() / "logs" / f"{named(name, key)}.log"


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time build ``name``; a second one then takes the cached wheel."""
    user_cache().mkdir(parents=True, exist_ok=True)
    with (user_cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wheel(name: str, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
    """Return the wheel ``name`` for ``key``; ``build(folder)`` writes it where the cache has none."""
    kept = user_cache() / "wheels" / named(name, key)
    with lock(kept.name):
        if not list(kept.glob("*.whl")):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
                build(Path(temporary))
                (Path(temporary) / "key.json").write_text(json.dumps(key, indent=1, sort_keys=True))
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(temporary, f"{kept}.partial", dirs_exist_ok=True)
                os.replace(f"{kept}.partial", kept)
        else:
            say(f"{name}: wheel from the cache ({kept})")
    return next(kept.glob("*.whl"))
