"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path

from ..errors import FxqError

__all__ = ["check_target", "write_whole"]


def check_target(target: str | PathLike[str], *sources: str | PathLike[str] | None) -> None:
    """See before the work that a result may go to ``target``: no folder, and none of the files that are read.

    Raises:
        FxqError: It may not; nothing was written.
    """
    path = Path(target)
    if path.is_dir():
        raise FxqError(f"{target} is a folder", hint="name a file in it")
    for source in sources:
        if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
            raise FxqError(f"{target} is a file that is read here: the result would replace it", hint="name another")


def write_whole(path: str | PathLike[str], data: bytes | memoryview) -> None:
    """Write ``data`` to ``path`` so that no reader, and no crash, ever sees half of it.

    The bytes go to a temporary file in the same folder, which then replaces ``path``. The folder is made if
    it is missing. The file gets the permissions that an ordinary new file would have.

    Raises:
        OSError: The folder cannot be made or written to; ``path`` is then as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(_permissions(target))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _permissions(target: Path) -> int:
    """Those of the file that is replaced, or what the process's mask leaves of a new file's."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
