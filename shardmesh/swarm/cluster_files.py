"""The secret of each cluster that a user of this machine is a member of, kept on disk.

`clusters/<name>.secret` in the state folder, `<name>.update` once the owner has changed it, and
`<name>.nodes.json` with nodes that were reachable.  `<name>.<owner>.secret` is that of another mesh
which was known by this name before.
Beside them lies `<name>.owner.pem` where the cluster was made: the key that may change the secret;
and `<name>.asker.pem`, by which this user's commands know each other's prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Final
from urllib.parse import quote

from shardmesh.errors import InputError
from shardmesh.swarm.identity import Identity, load_identity
from shardmesh.swarm.state_file import write_state
from shardmesh.wire.cluster_secret import ClusterSecret, new_secret, parse_secret
from shardmesh.wire.limits import CLUSTER_UPDATE_BYTES_MAX

SECRET_FILE_BYTES_MAX: Final = 4096
_NAME_LETTERS_MAX: Final = 100

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClusterFiles:
    """What is kept of one cluster in a state folder."""

    state_dir: Path
    cluster: str

    def _path(self, kind: str) -> Path:
        return self.state_dir / "clusters" / f"{file_name_of(self.cluster)}.{kind}"

    @property
    def secret_path(self) -> Path:
        return self._path("secret")

    @property
    def owner_path(self) -> Path:
        return self._path("owner.pem")

    @property
    def nodes_path(self) -> Path:
        """Where nodes are remembered, for a start without a bootstrap."""
        return self._path("nodes.json")

    def secret(self) -> ClusterSecret | None:
        """The kept secret, None if there is none; raises as `read_secret`."""
        return read_secret(self.secret_path) if self.secret_path.exists() else None

    def keep(self, secret: ClusterSecret) -> None:
        """Keeps the secret (mode 0600) for later starts; StorageError (ours) if it cannot.

        One of another owner is of another mesh with this name, and stays beside it.
        """
        other = self._kept()
        if other == secret:
            return
        if other is not None and other.owner != secret.owner:
            aside = self._path(f"{other.owner.hex()[:8]}.secret")
            write_state(aside, f"{other.text()}\n".encode())
            _log.warning(
                "another mesh was known here by the name %s: its secret is in %s now",
                self.cluster,
                aside,
            )
        write_state(self.secret_path, f"{secret.text()}\n".encode())

    def _kept(self) -> ClusterSecret | None:
        """The kept secret, None if there is none yet or none that can be read."""
        try:
            return parse_secret(self.secret_path.read_text(encoding="ascii", errors="replace"))
        except (OSError, InputError):
            return None

    def make(self) -> ClusterSecret:
        """The kept secret; made, with the key of its owner, if there is none yet."""
        if not self.secret_path.exists():
            text = new_secret(self.owner().public_key).text()
            write_state(self.secret_path, f"{text}\n".encode(), replace=False)  # the first counts
        return read_secret(self.secret_path)

    def owner(self) -> Identity:
        """The key of the owner, made if it is missing; raises as `load_identity`."""
        return load_identity(self.owner_path)

    def asker(self) -> Identity:
        """The key of this user's prompts, made if it is missing; raises as `load_identity`."""
        return load_identity(self._path("asker.pem"))

    def update(self) -> bytes | None:
        """The owner's last signed change that was taken, None if there is none."""
        try:
            with self._path("update").open("rb") as file:
                return file.read(CLUSTER_UPDATE_BYTES_MAX + 1)
        except OSError:
            return None

    def keep_update(self, signed: bytes, secret: ClusterSecret) -> None:
        """Keeps a change of the owner's and the secret that it brings; StorageError (ours).

        The secret first: a change that is kept is not taken a second time.
        """
        self.keep(secret)
        write_state(self._path("update"), signed)


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


def file_name_of(cluster: str) -> str:
    """A file name for any cluster's name; a long one is replaced by its hash."""
    name = quote(cluster, safe="")
    if len(name) > _NAME_LETTERS_MAX:
        name = hashlib.sha256(cluster.encode()).hexdigest()
    return name
