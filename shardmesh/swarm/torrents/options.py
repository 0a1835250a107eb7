"""How a node takes part in the exchange of model files; imports nothing heavy."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorrentOptions:
    """How a node takes part; a rate or size of 0 is no limit."""

    listen_hosts: tuple[str, ...] = ("0.0.0.0",)
    port: int = 0
    upload_rate_bytes_per_s: int = 0
    download_rate_bytes_per_s: int = 0
    max_disk_bytes: int = 0
