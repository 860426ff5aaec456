"""Paths that users give, names that users choose for models and datasets in the store, and the cache folder."""

import errno
import os
import re
from pathlib import Path

from nanochat_core.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Maximum number of characters in a name. File systems allow names of at most 255 bytes, and this limit leaves room for
# the longer temporary name that a file has while it is written.
_LONGEST_NAME = 200
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def check_name(name: str, kind: str) -> str:
    """Returns ``name`` if it is a valid name for ``kind``, such as ``a model``. Raises UserError for any other name.

    A valid name consists of at most 200 ASCII letters, digits, dots, underscores and hyphens, and begins with a letter
    or a digit. It has no slash, because it is also the name of a folder. It has no comma and no colon, because a
    mixture of datasets is written as ``name:weight,name:weight``.
    """
    if len(name) > _LONGEST_NAME:
        raise UserError(f"{name[:40]!r}… cannot name {kind}: it is longer than {_LONGEST_NAME} characters")
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name {kind}; use letters, digits, '.', '_' and '-'")
    return name


def user_path(text: str) -> Path:
    """The path of a file or folder that may not exist, with ``~`` and ``~name`` replaced by home folders.

    Raises UserError if the system cannot tell whether the path exists, for example because the path is too long or a
    folder above it cannot be read, and if there is no user ``name``.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such user's home folder") from error
    except OSError as error:
        if error.errno not in _ABSENT:
            shown = text if len(text) <= 200 else f"{text[:200]}…"
            raise UserError(f"{shown} cannot be read: {error.strerror}") from error
    return path


def cache_folder() -> Path:
    """The folder for files that this machine can make again: compiled kernels and the results of the CPU calibration.

    The folder may not exist yet.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanochat", "kernels")
