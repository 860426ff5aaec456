"""Folders on the host that calls write to, where the profile has no filesystem of its own."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile

_PREFIX = "nanochat-sandbox-"
_LOCK = ".lock"


class ScratchRoot:
    """A private folder that holds one folder per worker.

    It is locked while its executor lives, so that a later one can tell and remove what a killed one left behind.
    """

    def __init__(self, parent: str) -> None:
        """Raises OSError when ``parent`` is not a writable folder."""
        _remove_abandoned(parent)
        # Under another name until it is locked, so that nobody takes it for abandoned.
        unlocked = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent)
        self._lock = os.open(os.path.join(unlocked, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = os.path.join(parent, os.path.basename(unlocked)[1:])
        os.rename(unlocked, self.path)

    def new(self) -> str:
        """An empty folder for one worker."""
        return tempfile.mkdtemp(prefix="call-", dir=self.path)

    def close(self) -> None:
        remove(self.path)
        os.close(self._lock)


def exceeds(folder: str, max_bytes: int, max_files: int) -> bool:
    """Whether ``folder`` holds more than the code may store, or hides what it holds.

    Stops counting at the limit, so its cost is bounded whatever the code did.
    """
    used = files = 0
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    files += 1
                    try:
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
                    except FileNotFoundError:
                        continue  # removed while we look
                    if used > max_bytes or files > max_files:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError:
            return True  # unreadable, or nested deeper than a path can be long
    return False


def remove(folder: str) -> None:
    """Remove ``folder`` whatever is in it: unreadable folders, names that are not text, any depth.

    Nothing may still be writing to it. Folders found inside are first moved to the top, so that neither the length of
    a path nor recursion limits matter. Links are removed, never followed.
    """
    try:
        os.rmdir(folder)
        return
    except FileNotFoundError:
        return
    except OSError:
        pass  # not empty, the rarer case
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    moved = 0
    try:
        while names := os.listdir(top):
            for name in names:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                os.chmod(name, 0o700, dir_fd=top)
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
                try:
                    for child in os.listdir(inner):
                        if stat.S_ISDIR(os.lstat(child, dir_fd=inner).st_mode):
                            moved += 1
                            os.chmod(child, 0o700, dir_fd=inner)
                            os.rename(child, f".moved-{os.getpid()}-{moved}", src_dir_fd=inner, dst_dir_fd=top)
                        else:
                            os.unlink(child, dir_fd=inner)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(folder)


def _remove_abandoned(parent: str) -> None:
    for entry in os.scandir(parent):
        if not (entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False)):
            continue
        try:
            lock = os.open(os.path.join(entry.path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # another user's, or one that is just being made
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(entry.path)
        except BlockingIOError:
            pass  # its executor is alive
        finally:
            os.close(lock)
