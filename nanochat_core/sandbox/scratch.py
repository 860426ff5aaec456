"""Scratch folders on the host, for the isolation profile that has no file system of its own."""

import fcntl
import os
import stat
import tempfile

_PREFIX = "nanochat-sandbox-"
_LOCK = ".lock"


class ScratchRoot:
    """A private folder that contains one scratch folder for each worker of an executor.

    The executor keeps the folder locked while it runs. A folder that is no longer locked belongs to a killed executor,
    and the next executor removes it.
    """

    def __init__(self, parent: str) -> None:
        """Create the folder in ``parent``. Raises OSError if ``parent`` is not a writable folder."""
        _remove_abandoned(parent)
        # The folder gets its final name only after it is locked, so that no other executor removes it as abandoned.
        unlocked = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent)
        self._lock = os.open(os.path.join(unlocked, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = os.path.join(parent, os.path.basename(unlocked)[1:])
        os.rename(unlocked, self.path)

    def new(self) -> str:
        """Create an empty folder for one worker."""
        return tempfile.mkdtemp(prefix="call-", dir=self.path)

    def close(self) -> None:
        """Remove the folder and everything in it."""
        remove(self.path)
        os.close(self._lock)


def exceeds(folder: str, max_bytes: int, max_files: int) -> bool:
    """Whether ``folder`` contains more than the code may store, or something that cannot be counted.

    Counting stops at the limit, so the cost is bounded.
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
                        continue  # the code removed it during the scan
                    if used > max_bytes or files > max_files:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError:
            return True  # the folder is unreadable, or its path is too long
    return False


def remove(folder: str) -> None:
    """Remove ``folder``, even if it contains unreadable folders, names that are not text, or very deep folders.

    The caller must make sure that no process writes to the folder any more. Nested folders are first moved to the top.
    Neither the length of a path nor the depth of recursion can then exceed a limit. Links are never followed.
    """
    try:
        os.rmdir(folder)
        return
    except FileNotFoundError:
        return
    except OSError:
        pass  # the folder is not empty, which is rare
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
    """Remove the folders in ``parent`` that killed executors have left behind."""
    for entry in os.scandir(parent):
        if not (entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False)):
            continue
        try:
            lock = os.open(os.path.join(entry.path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # the folder belongs to another user, or another process is removing it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(entry.path)
        except BlockingIOError:
            pass  # the executor of this folder is alive
        finally:
            os.close(lock)
