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


def log(name: str) -> Path:
    """Return the path of a log."""
    return user_cache() / "logs" / f"{name}.log"


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time build ``name``; a second one then takes the cached wheel."""
    user_cache().mkdir(parents=True, exist_ok=True)
    with (user_cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wheel(name: str, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
    """Return the wheel ``name`` for ``key``; ``build(folder)`` writes it where the cache has none."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    kept = user_cache() / "wheels" / f"{name}-{digest}"
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
