"""Keep the ``nanochat`` command out of wheels.

The command starts programs of ``services``, ``jobs`` and ``deploy``. Those names are too general for somebody else's
environment, so a wheel contains ``nanochat_core`` alone. An editable install of the repository has all packages.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableCommands(BuildHookInterface[Any]):
    """Build hook of Hatchling that keeps the ``nanochat`` command for editable installs only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's interface
        """Drop the scripts unless ``version`` is ``editable``."""
        if version != "editable":
            self.metadata.core.scripts.clear()
