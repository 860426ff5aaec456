"""The promotion of a checkpoint: the file ``models/<name>/PROMOTED`` names the checkpoint that engines serve."""

from nanochat_core.checkpoint.names import CheckpointRef
from nanochat_core.store import Store

# Content of the file ``PROMOTED`` after a promotion was withdrawn.
_WITHDRAWN = "none"


def promote(store: Store, ref: CheckpointRef) -> None:
    """Makes ``ref`` the checkpoint that engines serve."""
    store.write(_promoted_key(ref.model), f"{ref.revision}\n".encode())


def withdraw(store: Store, model: str) -> None:
    """Withdraws the promotion of ``model``, because the promoted weights no longer exist or will now be deleted.

    An engine that already serves these weights continues to serve them.
    """
    store.write(_promoted_key(model), f"{_WITHDRAWN}\n".encode())


def promoted(store: Store, model: str) -> CheckpointRef | None:
    """The promoted checkpoint; None if none was promoted yet or the promotion was withdrawn.

    Raises UserError if the file ``PROMOTED`` names no checkpoint.
    """
    try:
        revision = store.read(_promoted_key(model)).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return None if revision == _WITHDRAWN else CheckpointRef.parse(model, revision)


def was_promoted(store: Store, model: str) -> bool:
    """Whether a checkpoint of the model was ever promoted, even if the promotion was withdrawn later."""
    return store.exists(_promoted_key(model))


def _promoted_key(model: str) -> str:
    return f"models/{model}/PROMOTED"
