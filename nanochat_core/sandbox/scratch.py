"""Scratch folders on the host, for workers that cannot mount scratch file systems of their own."""

import asyncio
import fcntl
import logging
import os
import stat
import tempfile

log = logging.getLogger("nanochat.sandbox")

_PREFIX = "nanochat-sandbox-"
_LOCK = ".lock"
# A folder with this prefix belongs to the sandbox if a file system of at most this size is mounted on it.
_MOUNTED_PREFIX, _MAX_FILE_SYSTEM_BYTES = "nanochat-scratch-", 1 << 30


class ScratchRoot:
    """The scratch folders on the host, for workers that cannot mount a file system of their own.

    Folders ``nanochat-scratch-*`` in ``parent``, on which file systems of limited size are mounted, are the scratch
    folders, unless another executor uses them. If there are no such folders, the scratch folders are in a private
    folder of the executor. The executor keeps its private folder locked while it runs. A private folder that is not
    locked belonged to a killed executor, and the next executor removes it.

    Attributes:
        path: the private folder.
        sized: whether each scratch folder is a file system of its own, which limits the folder's size.
        mount_point: an empty folder in ``path``, for workers that can mount a file system on it.
    """

    path: str
    mount_point: str

    def __init__(self, parent: str) -> None:
        """Create the private folder in ``parent``. Raises OSError if ``parent`` is not a writable folder."""
        self._parent = parent = os.path.abspath(parent)  # absolute, because fork servers have another current folder
        self._lock = -1
        self._mounted: dict[str, int] = {}
        self._free: list[str] = []
        self._count = 0
        self.make()
        self._mounted = _lock_file_systems(parent)
        self._count = len(self._mounted)
        self.sized = bool(self._mounted)
        self._places = asyncio.Semaphore(self._count if self.sized else 1 << 30)
        for folder in self._mounted:
            empty(folder)
        self._free += self._mounted

    def make(self) -> None:
        """Create the private folder, for the first time or after somebody has removed it.

        Raises OSError if the folder cannot be created.
        """
        self._remove_private()
        _remove_abandoned(self._parent)
        # The folder gets its final name only after it is locked, so that no other executor removes it as abandoned.
        unlocked = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent)
        self._lock = os.open(os.path.join(unlocked, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = os.path.join(self._parent, os.path.basename(unlocked)[1:])
        os.rename(unlocked, self.path)
        self.mount_point = os.path.join(self.path, "mount")
        os.mkdir(self.mount_point, 0o700)
        self._free = [folder for folder in self._free if folder in self._mounted]

    @property
    def places(self) -> int | None:
        """How many workers can have a scratch folder at once; ``None`` if there is no limit."""
        return self._count if self.sized else None

    @property
    def intact(self) -> bool:
        """Whether the private folder still exists. A program that cleans temporary folders may have removed it."""
        return os.path.isdir(self.mount_point)

    async def take(self) -> str:
        """An empty folder for one worker.

        If mounted folders are used, waits until one is free. Otherwise, makes a new folder if none is free, and raises
        OSError if this fails.
        """
        await self._places.acquire()
        try:
            if self._free:
                return self._free.pop()
            folder = os.path.join(self.path, f"call-{self._count}")
            os.mkdir(folder, 0o700)
            self._count += 1
            return folder
        except BaseException:
            self._places.release()
            raise

    async def give_back(self, folder: str) -> None:
        """Empty the folder of a worker that has ended, so that another worker can take it."""
        try:
            if os.listdir(folder):
                await asyncio.to_thread(empty, folder)
        except FileNotFoundError:
            reusable = False  # somebody has removed the folder
        except OSError as error:
            log.error("a scratch folder could not be emptied", extra={"folder": folder, "error": str(error)})
            reusable = False
        else:
            reusable = folder in self._mounted or os.path.dirname(folder) == self.path
        if reusable:
            self._free.append(folder)
        # If a mounted folder cannot be used again, its place stays taken. No plain folder replaces it, because nothing
        # would limit the size of a plain folder.
        if reusable or not self.sized:
            self._places.release()

    def close(self) -> None:
        """Remove the private folder and everything in it. Idempotent."""
        self._remove_private()
        for lock in self._mounted.values():
            os.close(lock)
        self._mounted = {}

    def _remove_private(self) -> None:
        if self._lock >= 0:
            remove(self.path)
            os.close(self._lock)
            self._lock = -1


def _lock_file_systems(parent: str) -> dict[str, int]:
    """The mounted scratch folders in ``parent`` that no other executor uses, each with a descriptor that locks it."""
    locks = {}
    for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
        if not (entry.name.startswith(_MOUNTED_PREFIX) and os.path.ismount(entry.path)):
            continue
        size = os.statvfs(entry.path)
        if size.f_blocks * size.f_frsize > _MAX_FILE_SYSTEM_BYTES or not os.access(entry.path, os.W_OK | os.X_OK):
            continue
        lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            locks[entry.path] = lock
    return locks


def exceeds(folder: str, max_bytes: int, max_files: int) -> bool:
    """Whether ``folder`` contains more than the code may store, or a folder that cannot be read.

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
                        continue  # the code removed the entry during the scan
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
    """Empty ``folder`` by :func:`empty`, and then remove it."""
    try:
        empty(folder)
        os.rmdir(folder)
    except FileNotFoundError:
        return


def empty(folder: str) -> None:
    """Remove everything in ``folder``, even unreadable folders, names that are not text, and very deep folders.

    The caller must make sure that no process writes to the folder any more. Nested folders are first moved to the top.
    Neither the length of a path nor the depth of recursion can then exceed a limit. Links are never followed.
    """
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
