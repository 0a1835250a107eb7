"""How libtorrent is set up: a private swarm, no discovery of its own, TCP only."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from typing import Any, Final

import libtorrent as lt

from shardmesh.wire.limits import TORRENT_BYTES_MAX, TORRENT_NESTING_MAX, TORRENT_SOURCES_MAX

_EVERYBODY: Final = (
    ("0.0.0.0", "255.255.255.255"),
    ("::", str(ipaddress.IPv6Address(2**128 - 1))),
)
_BLOCKED: Final = 1

TICK_MS: Final = 100
"""With a rate limit each step of a handshake waits for the next share of it."""

REST_TICK_MS: Final = 1000
"""The same while nothing goes on."""

PRIVATE: Final[dict[str, Any]] = {
    # Who has what is told by our own DHT and by /torrent/1.0; nothing leaves the mesh.
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "dht_bootstrap_nodes": "",
    "webtorrent_stun_server": "",
    "announce_to_all_trackers": False,
    # The obfuscation against providers hides nothing from anybody who knows the info-hash, and
    # costs three more round trips before the first piece.
    "in_enc_policy": 2,
    "out_enc_policy": 2,
    # Nothing but TCP: uTP is for lines shared with others, and slower between our nodes.
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    "user_agent": "shardmesh",
    "peer_fingerprint": "-SM0100-",
    # A told address must not become a request to some service of the machine it names.
    "ssrf_mitigation": True,
    "no_connect_privileged_ports": True,
    # Two nodes may share an address: one machine, or one router.
    "allow_multiple_connections_per_ip": True,
    "ignore_limits_on_local_network": False,
    # A node that is told of again is dialed again at once, not after a minute.
    "min_reconnect_time": 1,
    "max_failcount": 20,
    "connections_limit": 4 * TORRENT_SOURCES_MAX,
    "torrent_connect_boost": TORRENT_SOURCES_MAX,
    "unchoke_slots_limit": -1,
    "tick_interval": TICK_MS,
    # How far ahead pieces are asked for: 4 MB of each source, which is 40 MB/s at a round trip of
    # 100 ms.  Nodes that fetch a file together ask one slow source for the same pieces otherwise,
    # since none knows what the others have asked for.
    "request_queue_time": 1,
    "max_allowed_in_request_queue": 250,
    "whole_pieces_threshold": 0,
    "max_metadata_size": TORRENT_BYTES_MAX,
    "max_piece_count": 2**17,
    "metadata_token_limit": 16 * TORRENT_NESTING_MAX,
    # A limit is meant for the files; what TCP adds is some percent.
    "rate_limit_ip_overhead": False,
    # Memory: the page cache of the system serves better than one of our own.
    "max_queued_disk_bytes": 32 * 1024 * 1024,
    "send_buffer_watermark": 1024 * 1024,
    "send_buffer_low_watermark": 512 * 1024,
    "file_pool_size": 64,
    "aio_threads": 2,
    "hashing_threads": 1,
    "checking_mem_usage": 64,
    "alert_queue_size": 20_000,
    "auto_sequential": False,
    "allow_i2p_mixed": False,
}


def session_settings(
    listen_hosts: Sequence[str],
    port: int,
    *,
    upload_rate_bytes_per_s: int,
    download_rate_bytes_per_s: int,
) -> dict[str, Any]:
    """Settings of a session; rates in bytes per second, 0 for no limit."""
    hosts = [f"[{host}]" if ":" in host else host for host in listen_hosts]
    return {
        **PRIVATE,
        "listen_interfaces": ",".join(f"{host}:{port}" for host in hosts),
        "listen_system_port_fallback": False,
        "max_retry_port_bind": 0,
        "upload_rate_limit": upload_rate_bytes_per_s,
        "download_rate_limit": download_rate_bytes_per_s,
        "alert_mask": (
            lt.alert_category.error
            | lt.alert_category.status
            | lt.alert_category.storage
            | lt.alert_category.peer
        ),
    }


def limit_all_addresses(session: lt.session) -> None:
    """Makes the rate limits hold for every node; by default those nearby are exempt."""
    everyone = lt.ip_filter()
    only_global = 1 << session.global_peer_class_id
    for first, last in _EVERYBODY:
        everyone.add_rule(first, last, only_global)
    session.set_peer_class_filter(everyone)


def let_in(session: lt.session, hosts: Collection[str] | None) -> None:
    """Refuses connections with all other addresses, those that exist too; None: with nobody."""
    rules = lt.ip_filter()
    if hosts is not None:
        for first, last in _EVERYBODY:
            rules.add_rule(first, last, _BLOCKED)
        for host in hosts:
            rules.add_rule(host, host, 0)
    session.set_ip_filter(rules)
