"""Cuts a model into shard files, `tokenizer.gguf` and `manifest.json`."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gguf.constants import GGMLQuantizationType, LlamaFileType

from shardmesh import __version__
from shardmesh.errors import GgufError, InputError, StorageError
from shardmesh.shards.adapters import adapter_contents
from shardmesh.shards.architectures import rules_for
from shardmesh.shards.atomic import flush_to_disk
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.gguf_file import GgufFile, refuse
from shardmesh.shards.gguf_write import n_bytes_of, write_contents
from shardmesh.shards.layers import LayerRange, check_cover
from shardmesh.shards.legal_cuts import check_legal, legal_cuts
from shardmesh.shards.manifest import (
    MANIFEST_NAME,
    NUMBER_MAX,
    SCHEMA_VERSION,
    AdapterEntry,
    AdapterFile,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    check_model_name,
    encode_manifest,
    read_manifest,
)
from shardmesh.shards.names import TOKENIZER_NAME, adapter_name, shard_name
from shardmesh.shards.piece_tokens import AUTO, choose_piece_tokens
from shardmesh.shards.publication import PUBLICATION_NAME
from shardmesh.shards.room import BESIDE_THE_SPARE, n_bytes_free
from shardmesh.shards.row_width import row_bytes_of
from shardmesh.shards.slices import FileContents, shard_contents, tokenizer_contents
from shardmesh.shards.staging import publish, staging_folder
from shardmesh.wire.limits import ADAPTERS_MAX

Progress = Callable[[int], None]


def split_model(
    model: Path,
    ranges: Sequence[LayerRange],
    out_dir: Path,
    *,
    name: str,
    progress: Progress | None = None,
    is_proven: bool = False,
    adapters: Mapping[str, Path] | None = None,
    piece_tokens: int | None = AUTO,
) -> Manifest:
    """Writes one shard per range and all that goes with them; gives the manifest.

    `adapters`: name -> file of each LoRA adapter that is cut along.
    `piece_tokens`: of a prompt, in one micro-batch of all who use the model.
    `is_proven`: the caller knows that a model of an unknown architecture stays exact, or finds out.
    `progress` is called with the bytes written since the last call.  All files appear under their
    final names together at the end; a cancellation or failure leaves nothing.  Raises GgufError or
    InputError (theirs): the model, the ranges, the length of pieces, no room; StorageError (ours).
    """
    source = read_gguf(model)
    if not is_proven:
        refuse_unknown(source)
    adapters = adapters or {}
    files = plan_files(source, ranges, name, adapters)
    piece_tokens = piece_tokens_for(source, len(ranges), piece_tokens)
    _refuse_overwriting(source, out_dir, files)
    with _storage_errors(out_dir):
        _check_room(out_dir, sum(n_bytes_of(contents) for contents in files.values()))
        with staging_folder(out_dir) as staging:
            digests = {
                file_name: _write(staging / file_name, contents, progress)
                for file_name, contents in files.items()
            }
            manifest = _manifest(source, ranges, name, list(adapters), digests, piece_tokens)
            with (staging / MANIFEST_NAME).open("wb") as file:
                file.write(encode_manifest(manifest))
                flush_to_disk(file)
            _remove_older_split(out_dir)
            publish(staging, out_dir, [*files, MANIFEST_NAME])
    return manifest


def plan_files(
    source: GgufFile,
    ranges: Sequence[LayerRange],
    name: str,
    adapters: Mapping[str, Path] | None = None,
) -> dict[str, FileContents]:
    """File name -> contents of all GGUF files of a split; raises InputError (theirs)."""
    check_cover(ranges, source.n_layer)
    check_legal(legal_cuts(source), ranges)
    check_model_name(name)
    for key in ("embedding_length", "context_length"):
        _number(source, key)
    files = {
        shard_name(shard_id): shard_contents(
            source, layers, shard_id=shard_id, n_shards=len(ranges), model_name=name
        )
        for shard_id, layers in enumerate(ranges)
    }
    files |= _plan_adapters(source, ranges, adapters or {})
    return {**files, TOKENIZER_NAME: tokenizer_contents(source)}


def _plan_adapters(
    source: GgufFile, ranges: Sequence[LayerRange], adapters: Mapping[str, Path]
) -> dict[str, FileContents]:
    if len(adapters) > ADAPTERS_MAX:
        raise InputError(f"more than {ADAPTERS_MAX} LoRA adapters")
    files = {}
    for number, path in enumerate(adapters.values()):
        for shard_id, contents in enumerate(adapter_contents(read_gguf(path), source, ranges)):
            if contents is not None:
                files[adapter_name(number, shard_id)] = contents
    return files


def piece_tokens_for(source: GgufFile, n_shards: int, wanted: int | None = AUTO) -> int:
    """Tokens of a prompt's pieces in a model of so many shards: as wanted, or chosen for AUTO.

    Raises InputError (theirs) if the hidden states of so many tokens do not fit into a frame.
    """
    row_bytes = row_bytes_of(source, rules_for(source))
    return choose_piece_tokens(wanted, n_shards=n_shards, row_bytes=row_bytes)


def refuse_unknown(source: GgufFile) -> None:
    """Raises GgufError (theirs) for an architecture that is not in the table of rules."""
    if rules_for(source).is_unknown:
        raise GgufError(
            f"architecture {source.architecture[:64]!r} is not among those that are known to stay"
            " exact when cut",
            code="GGUF_ARCHITECTURE",
            next_step="cut it with `shardmesh split`, which tries first whether it stays exact",
        )


def plan_n_bytes(
    source: GgufFile,
    ranges: Sequence[LayerRange],
    name: str,
    adapters: Mapping[str, Path] | None = None,
) -> int:
    """Bytes of all GGUF files of a split, which is what `progress` will add up to."""
    return sum(
        n_bytes_of(contents) for contents in plan_files(source, ranges, name, adapters).values()
    )


def quantization_of(source: GgufFile) -> str:
    """The model's quantisation in llama.cpp's words, such as Q4_K_M or F16.

    Taken from `general.file_type`, or else from the type that most weights have.
    """
    number = source.get_int("general.file_type", -1)
    if number in set(LlamaFileType):
        file_type = LlamaFileType(number).name
        return file_type.removeprefix("ALL_").removeprefix("MOSTLY_")
    n_bytes: dict[int, int] = {}
    for tensor in source.tensors:
        n_bytes[tensor.ggml_type] = n_bytes.get(tensor.ggml_type, 0) + tensor.n_bytes
    return GGMLQuantizationType(max(n_bytes, key=lambda kind: n_bytes[kind])).name


def default_name(source: GgufFile) -> str:
    """The model's own name, or that of its file, fit for a manifest."""
    own = source.get_text("general.name", "") or source.path.stem
    printable = "".join(letter for letter in own if letter.isprintable()).strip()
    return printable.encode()[:100].decode(errors="ignore") or "model"


def _write(path: Path, contents: FileContents, progress: Progress | None) -> tuple[int, str]:
    """Bytes and SHA-256 of a file that is then on the disk."""
    with path.open("xb") as file:
        sha256 = write_contents(file, contents, progress)
        flush_to_disk(file)
        return file.tell(), sha256


def _manifest(
    source: GgufFile,
    ranges: Sequence[LayerRange],
    name: str,
    adapters: Sequence[str],
    digests: Mapping[str, tuple[int, str]],
    piece_tokens: int,
) -> Manifest:
    shards = []
    for shard_id, layers in enumerate(ranges):
        n_bytes, sha256 = digests[shard_name(shard_id)]
        shards.append(
            ShardEntry(
                shard_id=shard_id,
                layer_start=layers.layer_start,
                layer_end=layers.layer_end,
                n_bytes=n_bytes,
                sha256=sha256,
            )
        )
    n_bytes, sha256 = digests[TOKENIZER_NAME]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model_name=name,
        architecture=source.architecture,
        n_layer=source.n_layer,
        n_embd=_number(source, "embedding_length"),
        n_ctx_train=_number(source, "context_length"),
        piece_tokens=piece_tokens,
        can_roll_back=rules_for(source).rolls_back,
        quantization=quantization_of(source),
        slicer_version=__version__,
        shards=tuple(shards),
        tokenizer=TokenizerEntry(n_bytes=n_bytes, sha256=sha256),
        adapters=tuple(
            AdapterEntry(
                name=adapter,
                files=tuple(
                    _adapter_file(digests.get(adapter_name(number, shard_id)))
                    for shard_id in range(len(ranges))
                ),
            )
            for number, adapter in enumerate(adapters)
        ),
    )


def _adapter_file(digest: tuple[int, str] | None) -> AdapterFile | None:
    return None if digest is None else AdapterFile(n_bytes=digest[0], sha256=digest[1])


def _number(source: GgufFile, key: str) -> int:
    """A width or length of the model; raises GgufError (theirs) unless it fits a manifest."""
    value = source.get_int(f"{source.architecture}.{key}")
    if not 1 <= value <= NUMBER_MAX:
        refuse(source.path, f"has {value} under {source.architecture}.{key}", "GGUF_VALUE")
    return value


def _refuse_overwriting(source: GgufFile, out_dir: Path, names: Mapping[str, object]) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is not a folder", next_step="give a folder with --out")
    targets = {(out_dir / name).resolve() for name in names}
    if targets & {tensor.path.resolve() for tensor in source.tensors}:
        raise InputError(
            f"the shards would overwrite the model {source.path}",
            next_step="give another folder with --out",
        )


def _remove_older_split(out_dir: Path) -> None:
    """Removes the manifest of an earlier split, its signature, and those shards that only it had.

    From here on the folder holds no split; a manifest that cannot be read leaves its shards alone.
    """
    manifest_path = out_dir / MANIFEST_NAME
    if not manifest_path.exists():
        return
    try:
        older = read_manifest(manifest_path)
        n_shards, n_adapters = len(older.shards), len(older.adapters)
    except InputError:
        n_shards = n_adapters = 0
    manifest_path.unlink()
    (out_dir / PUBLICATION_NAME).unlink(missing_ok=True)
    for shard_id in range(n_shards):
        (out_dir / shard_name(shard_id)).unlink(missing_ok=True)
        for number in range(n_adapters):
            (out_dir / adapter_name(number, shard_id)).unlink(missing_ok=True)


def _check_room(out_dir: Path, n_bytes: int) -> None:
    n_free = n_bytes_free(out_dir)
    if n_bytes > n_free:
        raise _no_room(
            out_dir, f": {n_bytes:,} bytes are needed, {n_free:,} are free {BESIDE_THE_SPARE}"
        )


@contextmanager
def _storage_errors(out_dir: Path) -> Iterator[None]:
    """Turns what the disk says into our errors; a full one is the person's to solve."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(out_dir, "") from error
        raise StorageError(
            f"the shards cannot be written to {out_dir}: {error.strerror or error}",
            next_step="check the folder's permissions and the disk",
        ) from error


def _no_room(out_dir: Path, detail: str) -> InputError:
    return InputError(
        f"there is no room for the shards in {out_dir}{detail}",
        code="NO_ROOM",
        next_step="free some space, or give a folder on another disk with --out",
    )
