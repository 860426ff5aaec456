"""Changes to modules of the standard library that expect more from the system than the isolation allows."""

import os
import sys
import types
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder
from collections.abc import Callable, Sequence

# Index of the argument ``uri`` among the arguments that follow the database in sqlite3.connect.
_URI_POSITION = 6


def _adapt_sqlite3(module: types.ModuleType) -> None:
    """Lock databases by creating folders instead of by file locks, which the isolation refuses."""
    connect = module.connect

    def connect_without_file_locks(
        database: object, *arguments: object, uri: object = False, **options: object
    ) -> object:
        if len(arguments) > _URI_POSITION:
            *arguments, uri = arguments  # type: ignore[assignment]
        name = os.fsdecode(database)  # type: ignore[arg-type]
        if not uri and name not in ("", ":memory:"):
            for character in "%?#":  # these characters have a meaning in a URI
                name = name.replace(character, f"%{ord(character):02x}")
            name, uri = f"file:{name}", True
        if uri and "vfs=" not in name:
            name += ("&" if "?" in name else "?") + "vfs=unix-dotfile"
        return connect(name, *arguments, uri=uri, **options)

    module.connect = connect_without_file_locks  # type: ignore[attr-defined]


def _adapt_dbm(module: types.ModuleType) -> None:
    """Make no databases with the C libraries gdbm and ndbm, because these libraries lock their files."""
    module._names = [name for name in module._names if name not in ("dbm.gnu", "dbm.ndbm")]  # type: ignore[attr-defined]


def _adapt_thread_pools(module: types.ModuleType) -> None:
    """Let a pool work with the threads that it has if it may not start another thread."""
    start_one = module.ThreadPoolExecutor._adjust_thread_count

    def start_one_if_allowed(pool: types.SimpleNamespace) -> None:
        try:
            start_one(pool)
        except RuntimeError:
            if not pool._threads:
                raise

    module.ThreadPoolExecutor._adjust_thread_count = start_one_if_allowed


def _adapt_event_loops(module: types.ModuleType) -> None:
    """Let an event loop end even if no thread may start. Unchanged, the loop starts a thread to end its thread pool."""
    shut_down = module.BaseEventLoop.shutdown_default_executor

    async def shut_down_with_any_thread(loop: types.SimpleNamespace, *arguments: object) -> None:
        try:
            await shut_down(loop, *arguments)
        except RuntimeError:
            loop._default_executor.shutdown(wait=True)

    module.BaseEventLoop.shutdown_default_executor = shut_down_with_any_thread


_ADAPTATIONS: dict[str, Callable[[types.ModuleType], None]] = {
    "asyncio.base_events": _adapt_event_loops,
    "concurrent.futures.thread": _adapt_thread_pools,
    "dbm": _adapt_dbm,
    "sqlite3": _adapt_sqlite3,
}


class _Finder:
    """Finds the modules of ``_ADAPTATIONS`` as Python does, and adapts each of them when its code has run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        adapt = _ADAPTATIONS.get(name)
        spec = PathFinder.find_spec(name, path, target) if adapt else None
        if spec is None or spec.loader is None or adapt is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_adapt(module: types.ModuleType) -> None:
            execute(module)
            adapt(module)

        spec.loader.exec_module = execute_and_adapt  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Adapt the modules of ``_ADAPTATIONS`` that are imported from now on."""
    sys.meta_path.insert(0, _Finder)


def ignore_modes_and_times() -> None:
    """Ignore refused changes of modes and times of files in the current folder, instead of raising PermissionError.

    Functions that copy files change modes and times. These functions then work although the isolation refuses such
    changes.
    """
    folder = os.path.realpath(".")

    def ignore_refusal(change: Callable[..., None]) -> Callable[..., None]:
        def change_if_allowed(path: object, *arguments: object, **options: object) -> None:
            try:
                change(path, *arguments, **options)
            except PermissionError:
                if not isinstance(path, (str, bytes, os.PathLike)) or options.get("dir_fd"):
                    raise
                if not os.path.realpath(os.fsdecode(path)).startswith(folder + "/"):
                    raise

        return change_if_allowed

    os.chmod, os.utime = ignore_refusal(os.chmod), ignore_refusal(os.utime)
