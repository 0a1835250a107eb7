"""What holds if nothing is said."""

from __future__ import annotations

from typing import Final

DEFAULT_BOOTSTRAP: Final = "/ip4/127.0.0.1/tcp/51820"
"""A bootstrap on the same machine; if none was named, the LAN is searched too."""
