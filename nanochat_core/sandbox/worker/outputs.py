"""Collects the files that code leaves in its scratch folder."""

import os
import sys
from collections.abc import Callable, Iterator


def collector(
    given: dict[bytes, bytes], max_bytes: int, max_files: int, endings: tuple[bytes, ...]
) -> Callable[[object], tuple[list[bytes], bool]]:
    """Return a function that saves the pictures that the code has made, and collects the files of the current folder.

    The argument of the function is the value of the code. The function saves the open figures of matplotlib, and the
    value if it has a method that returns a picture. It then returns a list of files (name, content, name, content,
    ...), and whether files are missing in the list because of the limits or an error. The list has the regular files
    whose names end with one of ``endings``, except files that are in ``given`` with the same name and content. A file
    that cannot be read is left out and does not count as missing.
    """
    folder = os.getcwd()

    def collect(value: object) -> tuple[list[bytes], bool]:
        found: list[bytes] = []
        rest = max_bytes
        try:
            os.chdir(folder)
            _save_figures()
            _save_value(value)
            for name in _regular_files():
                if not name.endswith(endings):
                    continue
                try:
                    with open(name, "rb") as file:
                        content = file.read(rest + 1)
                except OSError:
                    continue
                if given.get(name) == content:
                    continue
                if len(content) > rest or len(found) == 2 * max_files:
                    return found, True
                rest -= len(content)
                found += [name, content]
        except BaseException:
            return found, True
        return found, False

    return collect


def _regular_files() -> Iterator[bytes]:
    """Paths of all regular files in the current folder and its subfolders, folder by folder, in order of the names."""
    for parent, folders, names in os.walk(b"."):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield path[2:]


def _save_figures() -> None:
    """Save the open figures of matplotlib, if the code uses it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig(f"figure-{number}.png")


def _save_value(value: object) -> None:
    """Save a picture of the value, if the value has one of the methods by which notebooks draw values."""
    for name, method in (("result.png", "_repr_png_"), ("result.svg", "_repr_svg_")):
        try:
            drawn = getattr(value, method)()
        except Exception:  # noqa: S112 - most values have no such method
            continue
        if isinstance(drawn, (str, bytes)):
            with open(name, "wb") as file:
                file.write(drawn.encode() if isinstance(drawn, str) else drawn)
            return
