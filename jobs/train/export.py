"""Export a checkpoint for other programs: ``python -m jobs.train.export --model d12 --format huggingface …``."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from jobs.program import JobSettings, run_program
from jobs.train.huggingface.folder import write_huggingface
from jobs.train.upstream.export import write_upstream
from nanochat_core.checkpoint import STAGES, CheckpointRef, check_model_name, pick_checkpoint
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.settings import setting
from nanochat_core.store import open_store
from nanochat_core.store.base import hidden_path

log = logging.getLogger("jobs.train.export")

_WRITERS = {"huggingface": write_huggingface, "nanochat": write_upstream}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(JobSettings):
    """Export a checkpoint as a Hugging Face folder or in the layout of karpathy/nanochat."""

    model: str = setting(help="name of the model in the store")
    revision: str = setting(
        "",
        "<stage>/step_<n> or promoted; by default the newest checkpoint of the model's last stage among base, sft, rl",
    )
    format: Literal["huggingface", "nanochat"] = setting(
        help="huggingface for transformers and lm_eval, or nanochat for karpathy/nanochat"
    )
    folder: str = setting(help="folder to write to, which must be new or empty")


def export_checkpoint(settings: ExportSettings) -> CheckpointRef:
    """Write a checkpoint in another format. The folder to write to appears only when all files are written."""
    check_model_name(settings.model)
    folder = user_path(settings.folder).absolute()
    _check_empty(folder)
    checkpoint = pick_checkpoint(open_store(settings.home), settings.model, settings.revision, *STAGES)
    with _new_folder(folder) as part:
        _WRITERS[settings.format](checkpoint, part)
    log.info("exported", extra={"checkpoint": checkpoint.ref.prefix, "format": settings.format, "folder": str(folder)})
    return checkpoint.ref


def _check_empty(folder: Path) -> None:
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--folder {folder} is not empty; nothing is replaced, so name a new folder")
    except OSError as error:
        raise UserError(f"--folder {folder} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder, which is renamed to ``folder`` if the ``with`` block ends without an error."""
    part = hidden_path(folder)
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    # RuntimeError and SafetensorError are caught too, because torch and safetensors raise them on a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"--folder {folder} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    run_program("jobs.train.export", "export", ExportSettings, export_checkpoint)
