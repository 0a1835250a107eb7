"""Finding each other: the only place that knows libp2p and libtorrent."""
