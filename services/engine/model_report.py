"""Reads the report on a model from the artifact store, for the gateway's report page."""

import json
import re

from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2
from nanochat_core.store import Store

PAGE = "report.md"
MAX_BYTES = 16 << 20  # far more than the few hundred kB that a page with a few plots needs
_MEDIA_TYPES = {"md": "text/markdown", "png": "image/png"}
_NAME = re.compile(r"[\w-]+\.(md|png)", re.ASCII)


def read_report(store: Store, model: str, file: str = "") -> engine_pb2.Report:
    """Read the report on ``model``: the names of its pages and pictures (md, png), and the content of ``file``.

    If ``file`` is empty, read the content of all these files.

    Raises:
        FileNotFoundError: the report does not exist, or has no such file.
        UserError: the content has more than :data:`MAX_BYTES` bytes.
    """
    folder = f"reports/{model}/"
    names = [key.removeprefix(folder) for key in store.keys(folder.rstrip("/"))]
    names = [name for name in names if _NAME.fullmatch(name)]
    if PAGE not in names:
        raise FileNotFoundError(f"report on {model}")
    if file and file not in names:
        raise FileNotFoundError(f"file {file!r} in the report on {model}")
    contents = {name: store.read(folder + name) if file in ("", name) else b"" for name in names}
    size = sum(map(len, contents.values()))
    if size > MAX_BYTES:
        raise UserError(f"the report on {model} has {size:,} bytes; at most {MAX_BYTES:,} can be sent")
    files = [
        engine_pb2.ReportFile(name=name, media_type=_MEDIA_TYPES[name.rpartition(".")[2]], content=content)
        for name, content in contents.items()
    ]
    return engine_pb2.Report(model=model, revision=_revision(store, folder), files=files)


def _revision(store: Store, folder: str) -> str:
    """The revision that the report is about; empty if the report does not name one."""
    try:
        report = json.loads(store.read(f"{folder}report.json"))
    except (FileNotFoundError, ValueError):
        return ""
    revision = report.get("revision") if isinstance(report, dict) else None
    return revision if isinstance(revision, str) else ""
