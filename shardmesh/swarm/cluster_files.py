"""The secret of each cluster that a user of this machine is a member of, kept on disk.

`clusters/<name>.secret` in the state folder; beside it lies `<name>.owner.pem` where the cluster
was made, the key that may change the secret.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final
from urllib.parse import quote

from shardmesh.errors import InputError
from shardmesh.swarm.identity import Identity, load_identity
from shardmesh.swarm.state_file import write_state
from shardmesh.wire.cluster_secret import ClusterSecret, new_secret, parse_secret

SECRET_FILE_BYTES_MAX: Final = 4096
_NAME_LETTERS_MAX: Final = 100


def secret_path(state_dir: Path, cluster: str) -> Path:
    """Where the secret of a cluster is kept."""
    return state_dir / "clusters" / f"{_file_name(cluster)}.secret"


def owner_path(state_dir: Path, cluster: str) -> Path:
    """Where the key of a cluster's owner is kept, on the machine that made the cluster."""
    return state_dir / "clusters" / f"{_file_name(cluster)}.owner.pem"


def read_secret(path: Path) -> ClusterSecret:
    """The secret in a file.

    Raises InputError (theirs) if the file cannot be read, holds none, or others may read it.
    """
    try:
        mode = path.stat().st_mode & 0o077
        with path.open("rb") as file:
            data = file.read(SECRET_FILE_BYTES_MAX)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}",
            next_step="correct --secret-file, or give --secret",
        ) from error
    if mode:
        raise InputError(
            f"{path} holds a secret that other users of this machine may read or change",
            next_step=f"chmod 600 {path}",
        )
    return parse_secret(data.decode("ascii", "replace"))


def kept_secret(state_dir: Path, cluster: str) -> ClusterSecret | None:
    """The secret that is kept for the cluster, None if there is none; raises as `read_secret`."""
    path = secret_path(state_dir, cluster)
    return read_secret(path) if path.exists() else None


def keep_secret(state_dir: Path, cluster: str, secret: ClusterSecret) -> None:
    """Keeps the secret (mode 0600) for later starts; StorageError (ours) if it cannot."""
    write_state(secret_path(state_dir, cluster), f"{secret.text()}\n".encode())


def make_secret(state_dir: Path, cluster: str) -> ClusterSecret:
    """The kept secret of a cluster; made, with the key of its owner, if there is none yet."""
    path = secret_path(state_dir, cluster)
    if not path.exists():
        owner = load_owner(state_dir, cluster)
        text = new_secret(owner.public_key).text()
        write_state(path, f"{text}\n".encode(), replace=False)  # of two, the first one counts
    return read_secret(path)


def load_owner(state_dir: Path, cluster: str) -> Identity:
    """The key of the cluster's owner, made if it is missing; raises as `load_identity`."""
    return load_identity(owner_path(state_dir, cluster))


def _file_name(cluster: str) -> str:
    """A file name for any cluster's name; a long one is replaced by its hash."""
    name = quote(cluster, safe="")
    if len(name) > _NAME_LETTERS_MAX:
        name = hashlib.sha256(cluster.encode()).hexdigest()
    return name
