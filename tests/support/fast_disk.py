"""Makes ``os.fsync`` return at once, in each process that imports this module.

No test cuts the power, so nothing that a test does can show whether data have reached the disk. Waiting for the disk
would take longer than many tests, and would hide races.
"""

import os


def _return_at_once(fd: object) -> None:
    """Does nothing."""


os.fsync = _return_at_once
