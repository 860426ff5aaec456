"""Datasets of text in the store: ``python -m jobs.train.dataset download|convert|validate|list``."""

import dataclasses
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from jobs.data.download import MOST_SHARDS, download, open_source
from jobs.data.local_text import DATA_HELP, TEXT_COLUMN_HELP, VAL_DATA_HELP, local_text
from jobs.data.shards import (
    MANIFEST,
    Shard,
    describe_shard,
    read_manifest,
    shard_keys,
    split_shards,
    write_dataset,
)
from jobs.program import JobSettings, print_subcommands, run_command
from nanochat_core.errors import UserError, run_main
from nanochat_core.paths import check_name
from nanochat_core.settings import setting
from nanochat_core.store import Lease, Store, open_store

log = logging.getLogger("jobs.train.dataset")

PROGRAM = "python -m jobs.train.dataset"
CLIMBMIX = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_{shard:05d}.parquet"
CLIMBMIX_SHARDS = 6543


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadSettings(JobSettings):
    """Download parquet shards into the store; the same command resumes an interrupted download."""

    dataset: str = setting(help="name for the dataset in the store")
    source: str = setting(CLIMBMIX, "URL with {shard} in place of the shard's number, s3://bucket/prefix, or a folder")
    source_shards: int = setting(
        CLIMBMIX_SHARDS, "shards at the URL; the last one is the validation split", minimum=2, maximum=MOST_SHARDS
    )
    shards: str = setting("0-169", "training shards to download: numbers and ranges, comma separated")
    parallel: int = setting(8, "number of shards that are downloaded at the same time", minimum=1, maximum=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertSettings(JobSettings):
    """Convert local parquet, JSON, CSV or plain text files to shards in the store."""

    data: str = setting(help=DATA_HELP)
    val_data: str = setting("", VAL_DATA_HELP)
    text_column: str = setting("text", TEXT_COLUMN_HELP)
    dataset: str = setting(help="name for the dataset in the store")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateSettings(JobSettings):
    """Read every document of a dataset and compare its shards with the manifest."""

    dataset: str = setting(help="name of the dataset in the store")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListSettings(JobSettings):
    """List the datasets of the store."""


def validate(store: Store, name: str) -> dict[str, int]:
    """Read every document of ``data/<name>``. Raises a UserError that names each shard that is not valid.

    Returns:
        The counts ``shards``, ``documents`` and ``empty_documents``, and ``text_bytes``: the number of bytes of the
        text in UTF-8.
    """
    manifest = read_manifest(store, name)
    keys = shard_keys(store, name)
    problems = []
    try:
        split_shards(store, name)
    except UserError as error:
        problems.append(str(error))
    if manifest is not None and not manifest.complete:
        problems.append("its download was interrupted; run it again")
    known = manifest.shards if manifest else {}
    present = {key.rsplit("/", 1)[-1] for key in keys}
    problems += [f"{file} is in {MANIFEST}, but it is missing" for file in sorted(known.keys() - present)]
    documents = empty = text_bytes = 0
    for key in tqdm(keys, desc="validate", unit="shard", disable=not sys.stderr.isatty(), file=sys.stderr):
        file = key.rsplit("/", 1)[-1]
        path = store.fetch(key)
        try:
            info = describe_shard(path, file)
            if 0 in info.row_groups:
                raise UserError(f"{file} has an empty row group ({info.row_groups.index(0)})")
            if file in known and info != known[file]:
                raise UserError(f"{file} is not the file that {MANIFEST} describes")
            shard = Shard(path, file)
            for group in range(len(info.row_groups)):
                lengths = pc.fill_null(pc.binary_length(shard.read(group)), 0)
                documents += len(lengths)
                empty += pc.sum(pc.equal(lengths, 0)).as_py()
                text_bytes += pc.sum(lengths).as_py()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"data/{name} in {store} is not valid: {'; '.join(problems)}")
    return {"shards": len(keys), "documents": documents, "empty_documents": empty, "text_bytes": text_bytes}


def shard_numbers(text: str) -> list[int]:
    """Parse numbers and ranges: ``0-3,7`` gives ``[0, 1, 2, 3, 7]``. Raises UserError for any other text."""
    numbers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", piece)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--shards is {text!r}; give numbers and ranges such as 0-169 or 0-3,7")
        if len(match[2] or match[1]) > len(str(MOST_SHARDS)) or int(match[2] or match[1]) >= MOST_SHARDS:
            raise UserError(f"--shards names shard {match[2] or match[1]}; the last possible one is {MOST_SHARDS - 1}")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(numbers)


def _download(settings: DownloadSettings) -> None:
    check_name(settings.dataset, "a dataset")
    numbers = shard_numbers(settings.shards)
    source = open_source(settings.source, settings.source_shards)
    store = open_store(settings.home)
    with Lease(store, f"data/{settings.dataset}", "jobs.train.dataset download"):
        manifest = download(store, settings.dataset, source, settings.source, numbers, settings.parallel)
    log.info(
        "dataset complete",
        extra={
            "dataset": settings.dataset,
            "shards": len(manifest.shards),
            "documents": sum(shard.documents for shard in manifest.shards.values()),
            "sha256": manifest.sha256,
        },
    )


def _convert(settings: ConvertSettings) -> None:
    check_name(settings.dataset, "a dataset")
    store = open_store(settings.home)
    with Lease(store, f"data/{settings.dataset}", "jobs.train.dataset convert"):
        if store.keys(f"data/{settings.dataset}"):
            raise UserError(
                f"data/{settings.dataset} in {store} is there already; use another --dataset name, or delete it"
            )
        training, validation = local_text(settings.data, settings.val_data, settings.text_column).documents()
        source = str(Path(settings.data).resolve())
        manifest = write_dataset(store, settings.dataset, training, validation, source=source)
    documents = [shard.documents for shard in manifest.shards.values()]
    log.info(
        "dataset written",
        extra={
            "dataset": settings.dataset,
            "shards": len(documents),
            "train_documents": sum(documents[:-1]),
            "validation_documents": documents[-1],
        },
    )


def _validate(settings: ValidateSettings) -> None:
    contents = validate(open_store(settings.home), settings.dataset)
    log.info("dataset is valid", extra={"dataset": settings.dataset, **contents})


def _list(settings: ListSettings) -> None:
    store = open_store(settings.home)
    names = sorted({key.split("/")[1] for key in store.keys("data") if key.endswith(".parquet")})
    print(f"{'dataset':<24}{'shards':>8}{'documents':>14}{'MB':>10}  source")
    for name in names:
        manifest = read_manifest(store, name)
        if manifest is None:
            print(f"{name:<24}{len(shard_keys(store, name)):>8}{'?':>14}{'?':>10}  put there by hand")
            continue
        shards = manifest.shards.values()
        documents, size = sum(shard.documents for shard in shards), sum(shard.bytes for shard in shards) / 1e6
        note = "" if manifest.complete else " (download interrupted)"
        print(f"{name:<24}{len(shards):>8}{documents:>14,}{size:>10,.1f}  {manifest.source}{note}")


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "download": (DownloadSettings, _download),
    "convert": (ConvertSettings, _convert),
    "validate": (ValidateSettings, _validate),
    "list": (ListSettings, _list),
}


def main() -> None:
    command, *argv = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print_subcommands(PROGRAM, {name: settings for name, (settings, _) in COMMANDS.items()})
        return
    if command not in COMMANDS:
        raise UserError(f"give one of the commands {', '.join(COMMANDS)}; {PROGRAM} download --help lists its flags")
    run_command(f"jobs.train.dataset {command}", "dataset", *COMMANDS[command], argv)


if __name__ == "__main__":
    run_main(main, PROGRAM)
