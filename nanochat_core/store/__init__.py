"""The artifact store: files by key below one URL, a folder or an S3 prefix, shared by the jobs and the engine.

``base`` is the interface, ``folder`` and ``s3`` are the two kinds of store, and ``cache`` keeps downloads from S3.
"""

from nanochat_core.store.base import Store, StoreError
from nanochat_core.store.folder import FolderStore
from nanochat_core.store.opening import DEFAULT_HOME, open_store
from nanochat_core.store.s3 import S3Store

__all__ = ["DEFAULT_HOME", "FolderStore", "S3Store", "Store", "StoreError", "open_store"]
