"""Format versions of the files in the artifact store, and how readers treat files of older and newer versions.

Every JSON file that a program writes into the store for another program has a number ``format``; in ``tokenizer.json``,
the number follows the name of the format. A file without this number has format 1, because the files from before
version 0.1.0 have no number. A reader reads every format up to its own, and refuses a newer format with
:class:`NewerFormatError`. A reader never treats a newer file as damaged, because damaged files are replaced.

Raise the format number of a kind of file when an older reader would misread the new content. If older readers may
ignore a new field, the number stays: readers ignore the unknown fields of most files. In some files every field
matters, for example in the shape of a model. These files are read with ``known`` fields, and an unknown field is
refused like a newer format.
"""

from collections.abc import Collection, Mapping
from typing import Any

from nanochat_core.errors import UserError


class NewerFormatError(UserError):
    """A file is not damaged, but this version of nanochat cannot read it, because a newer version wrote it."""

    def __init__(self, shown: str, found: str) -> None:
        super().__init__(
            f"{shown} {found}: a newer version of nanochat wrote it, and nothing was changed; use that version, "
            "or another name for what you make with this one"
        )


def with_format(fields: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The content of a file: its format version and ``fields``."""
    return {"format": version, **fields}


def without_format(stored: Any, newest: int, shown: str, known: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a file that :func:`with_format` made, after a check of its version.

    Args:
        stored: content of the file, as JSON values.
        newest: the newest format that the caller reads.
        shown: name of the file in error messages.
        known: all fields that the caller understands; empty if the caller ignores unknown fields.

    Raises:
        NewerFormatError: the format is newer, or a field is unknown.
        ValueError: ``stored`` is no JSON object, or its format is no version number; the file is damaged.
    """
    if not isinstance(stored, dict):
        raise ValueError("it is no JSON object")
    version = stored.get("format", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its format is {version!r}, which is no version number")
    if version > newest:
        raise NewerFormatError(shown, f"has format {version}, and this version of nanochat reads at most {newest}")
    fields = {name: value for name, value in stored.items() if name != "format"}
    if known and (unknown := sorted(fields.keys() - set(known))):
        raise NewerFormatError(shown, f"has the unknown field {unknown[0]!r}")
    return fields
