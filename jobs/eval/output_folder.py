"""Folders of this machine that programs write their results to."""

from pathlib import Path

from nanochat_core.errors import UserError


def make_output_folder(path: str, flag: str) -> Path:
    """Make a folder unless it exists.

    Args:
        flag: the flag that named the folder, for the error message.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be made: {error.strerror}") from error
    return folder
