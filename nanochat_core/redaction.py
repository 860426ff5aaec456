"""Removes API keys from texts that leave a service: logs, errors and traces."""

import re

API_KEY_FORM = r"nc-[0-9a-f]{12}-[0-9a-f]{48}"
"""Regular expression of the gateway's API keys. A key has this form so that it can be found in any text."""

# The text may end in the middle of a key, so the secret part may have any length.
_API_KEY = re.compile(r"nc-[0-9a-f]{12}-[0-9a-f]+")


def redact(text: str) -> str:
    """Returns the text with the secret part of each API key replaced by ``***``."""
    return _API_KEY.sub(lambda found: f"{found[0][:15]}-***", text) if "nc-" in text else text
