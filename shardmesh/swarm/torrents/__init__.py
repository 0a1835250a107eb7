"""Model files between nodes: a private BitTorrent swarm of the mesh's own nodes."""
