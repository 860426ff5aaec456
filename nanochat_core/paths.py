"""Paths that users give, and names that they give to what is in the store."""

import errno
import re
from pathlib import Path

from nanochat_core.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# File systems have names of at most 255 bytes, and a file that is being written has a longer name than later.
_LONGEST_NAME = 200
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def check_name(name: str, kind: str) -> str:
    """Returns ``name`` if it may name ``kind`` (such as ``a model``) in the store. Raises UserError for another name.

    The name is the name of a folder, and a mixture separates names by commas and weights by colons.
    """
    if len(name) > _LONGEST_NAME:
        raise UserError(f"{name[:40]!r}… cannot name {kind}: it is longer than {_LONGEST_NAME} characters")
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name {kind}; use letters, digits, '.', '_' and '-'")
    return name


def user_path(text: str) -> Path:
    """The path of a file or folder that may not exist, with ``~`` and ``~name`` replaced by home folders.

    Raises UserError if the system cannot tell whether it exists: the name is too long, a folder above it cannot be
    read, or ``name`` is no user.
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
