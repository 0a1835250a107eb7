"""The gateway: an HTTP API over a running mesh, and what shows it to people."""
