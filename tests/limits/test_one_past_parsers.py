"""One past each limit of what a parser or a constructor takes, at the limit itself it is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.announcements import capabilities
from support.models import (
    TensorData,
    array_value,
    bare_string,
    string_value,
    u32_value,
    write_gguf,
)

from shardmesh.engine.base import EngineOptions
from shardmesh.engine.grammar import check_grammar
from shardmesh.engine.options import check_options
from shardmesh.errors import GgufError, InputError, ShardmeshError
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.gguf_parts import part_paths
from shardmesh.shards.library import Library
from shardmesh.shards.manifest import check_model_name
from shardmesh.shards.model_link import ModelLink, parse_model_link
from shardmesh.shards.names import adapter_name
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.dht import announcement_key, shard_key
from shardmesh.web.requests import ChatBody, CompletionBody, EmbeddingBody
from shardmesh.web.tokens import ApiTokens, RateLimits
from shardmesh.wire.announcement import Capabilities
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    ADAPTERS_MAX,
    API_TOKENS_MAX,
    BRANCHES_TOLD_MAX,
    CHOICES_MAX,
    DHT_KEY_BYTES_MAX,
    DIAL_BACK_PORTS_MAX,
    EMBEDDING_TEXTS_MAX,
    GGUF_ALIGNMENT_MAX,
    GGUF_DIMENSIONS_MAX,
    GGUF_HEADER_BYTES_MAX,
    GGUF_PARTS_MAX,
    GGUF_TENSOR_NAME_BYTES_MAX,
    GRAMMAR_BYTES_MAX,
    GRAMMAR_GROUPS_MAX,
    MODEL_FOLDERS_MAX,
    MODEL_LINK_BOOTSTRAPS_MAX,
    MODEL_LINK_CHARS_MAX,
    MODEL_NAME_BYTES_MAX,
    NODE_TAGS_MAX,
    RATE_CALLERS_MAX,
    RELAY_ADDRESSES_MAX,
    ROUND_TRIPS_MAX,
    SEQUENCES_MAX,
    SHARD_FILES_MAX,
    TOOLS_MAX,
    TORRENT_FILE_BYTES_MAX,
    TORRENT_NAME_BYTES_MAX,
)
from shardmesh.wire.messages import RepairSession, Sampling
from shardmesh.wire.node_identity import check_identity
from shardmesh.wire.relay import DialBackRequest, Reserved
from shardmesh.wire.torrent_file import is_file_name

PEER_ID = "12D3KooWAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
Take = Callable[[int], object]


def _round_trips(n: int) -> object:
    fields = msgspec.structs.asdict(capabilities())
    trips = [[f"peer-{i}", 1] for i in range(n)]
    return decode_cbor(encode_cbor({**fields, "round_trips_us": trips}), Capabilities)


def _sampling(n_grammar: int) -> object:
    fields = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    fields |= {"repeat_penalty": 1.0, "repeat_last_n": 0, "frequency_penalty": 0.0}
    rest: dict[str, object] = {"presence_penalty": 0.0, "seed": 1, "logit_bias": []}
    rest |= {"n_top_logprobs": 0, "grammar": "x" * n_grammar}
    return decode_cbor(encode_cbor({**fields, **rest}), Sampling)


def _link(n_chars: int) -> object:
    n_rest = n_chars - len(_a_link(("/",) * MODEL_LINK_BOOTSTRAPS_MAX))
    lengths = [n_rest // MODEL_LINK_BOOTSTRAPS_MAX] * MODEL_LINK_BOOTSTRAPS_MAX
    lengths[0] += n_rest - sum(lengths)
    return parse_model_link(_a_link(tuple("/" + "x" * length for length in lengths)))


def _bootstraps(n: int) -> object:
    return parse_model_link(_a_link(("/ip4/1.2.3.4/tcp/5",) * n))


def _a_link(bootstraps: tuple[str, ...]) -> str:
    link = ModelLink(
        model_name="m", manifest_digest="0" * 64, publisher=bytes(32), bootstraps=bootstraps
    )
    return str(link)


def _tool(number: int) -> dict[str, object]:
    return {"type": "function", "function": {"name": f"tool_{number}", "parameters": {}}}


def _chat(n_tools: int) -> object:
    messages, tools = [{"role": "user", "content": "x"}], [_tool(i) for i in range(n_tools)]
    return ChatBody.model_validate({"messages": messages, "tools": tools})


def _branches(n: int) -> object:
    places = dict.fromkeys(("previous_stage", "next_stage", "first_stage", "last_stage"))
    fields = {"session": bytes(16), "epoch": 1, **places}
    branches = [[number, number] for number in range(n)]
    return decode_cbor(
        encode_cbor({**fields, "type": "repair", "branches": branches}), RepairSession
    )


TAKEN: dict[str, tuple[int, Take]] = {
    "ROUND_TRIPS_MAX": (ROUND_TRIPS_MAX, _round_trips),
    "NODE_TAGS_MAX": (
        NODE_TAGS_MAX,
        lambda n: check_identity("", "", "", tuple(f"t{i}" for i in range(n))),
    ),
    "DIAL_BACK_PORTS_MAX": (
        DIAL_BACK_PORTS_MAX,
        lambda n: decode_cbor(encode_cbor({"ports": [1] * n}), DialBackRequest),
    ),
    "RELAY_ADDRESSES_MAX": (
        RELAY_ADDRESSES_MAX,
        lambda n: decode_cbor(
            encode_cbor({"type": "reserved", "lifetime_s": 1, "addresses": ["/x"] * n}), Reserved
        ),
    ),
    "BRANCHES_TOLD_MAX": (BRANCHES_TOLD_MAX, _branches),
    "GRAMMAR_BYTES_MAX": (GRAMMAR_BYTES_MAX, _sampling),
    "GRAMMAR_BYTES_MAX in a text": (GRAMMAR_BYTES_MAX, lambda n: check_grammar("x" * n)),
    "GRAMMAR_GROUPS_MAX": (GRAMMAR_GROUPS_MAX, lambda n: check_grammar("(" * n + ")" * n)),
    "MODEL_NAME_BYTES_MAX": (MODEL_NAME_BYTES_MAX, lambda n: check_model_name("m" * n)),
    "ADAPTERS_MAX": (ADAPTERS_MAX, lambda n: adapter_name(n - 1, 0)),
    "SEQUENCES_MAX": (SEQUENCES_MAX, lambda n: check_options(EngineOptions(n_parallel=n))),
    "MODEL_LINK_CHARS_MAX": (MODEL_LINK_CHARS_MAX, _link),
    "MODEL_LINK_BOOTSTRAPS_MAX": (MODEL_LINK_BOOTSTRAPS_MAX, _bootstraps),
    "API_TOKENS_MAX": (API_TOKENS_MAX, lambda n: ApiTokens(["x" * 16 for _ in range(n)])),
    "CHOICES_MAX": (CHOICES_MAX, lambda n: CompletionBody.model_validate({"prompt": "x", "n": n})),
    "CHOICES_MAX of prompts": (
        CHOICES_MAX,
        lambda n: CompletionBody.model_validate({"prompt": ["x"] * n}),
    ),
    "TOOLS_MAX": (TOOLS_MAX, _chat),
    "EMBEDDING_TEXTS_MAX": (
        EMBEDDING_TEXTS_MAX,
        lambda n: EmbeddingBody.model_validate({"input": ["x"] * n}),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_limit_is_taken_and_one_more_is_not(name: str) -> None:
    limit, take = TAKEN[name]
    take(limit)
    with pytest.raises((ShardmeshError, ValueError)):
        take(limit + 1)


# -- GGUF --------------------------------------------------------------------------------------


def _model(path: Path, tensor: TensorData, **values: bytes) -> Path:
    metadata: dict[str, Any] = {"general.architecture": string_value("llama"), **values}
    write_gguf(path, metadata, [tensor])
    return path


def _tensor(name: str = "x", shape: tuple[int, ...] = (2,)) -> TensorData:
    return TensorData(name, shape, 0, bytes(8))


def test_a_tensors_name_and_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    read_gguf(_model(path, _tensor("x" * GGUF_TENSOR_NAME_BYTES_MAX)))
    with pytest.raises(GgufError):
        read_gguf(_model(path, _tensor("x" * (GGUF_TENSOR_NAME_BYTES_MAX + 1))))
    shape = (2, *[1] * (GGUF_DIMENSIONS_MAX - 1))
    read_gguf(_model(path, _tensor(shape=shape)))
    with pytest.raises(GgufError):
        read_gguf(_model(path, _tensor(shape=(*shape, 1))))


def test_the_next_alignment_is_too_large(tmp_path: Path) -> None:
    value = {"general.alignment": u32_value(2 * GGUF_ALIGNMENT_MAX)}
    with pytest.raises(GgufError) as caught:
        read_gguf(_model(tmp_path / "m.gguf", _tensor(), **value))
    assert caught.value.code == "GGUF_VALUE"


def test_parts_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="is missing"):
        part_paths(tmp_path / f"m-00001-of-{GGUF_PARTS_MAX:05d}.gguf")
    with pytest.raises(GgufError, match="one of 1025 files"):
        part_paths(tmp_path / f"m-00001-of-{GGUF_PARTS_MAX + 1:05d}.gguf")


def test_a_header_with_values_beyond_all_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = array_value(8, [bare_string("x" * 1000)] * 5000)
    path = _model(tmp_path / "m.gguf", _tensor(), words=words)
    read_gguf(path)
    monkeypatch.setattr("shardmesh.wire.limits.GGUF_HEADER_BYTES_MAX", 2_000_000)
    with pytest.raises(GgufError) as caught:
        read_gguf(path)
    assert caught.value.code == "GGUF_LIMIT"
    assert GGUF_HEADER_BYTES_MAX > 2_000_000


# -- files and folders -------------------------------------------------------------------------


def test_files_beyond_the_last_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmesh.shards.store.SHARD_FILES_MAX", 3)
    for number in range(4):
        (tmp_path / f"{number}.gguf").write_bytes(b"")
    assert len(ShardStore(tmp_path).scan()) == 3 < SHARD_FILES_MAX


def test_folders_beyond_the_last_are_not_looked_at(tmp_path: Path) -> None:
    for number in range(MODEL_FOLDERS_MAX + 1):
        folder = tmp_path / "models" / f"m{number}"
        folder.mkdir(parents=True)
        (folder / "x.gguf").write_bytes(b"")
    own = tmp_path / "shards"
    own.mkdir()
    stores = list(Library(own, tmp_path / "models").stores())
    assert len(stores) == 1 + MODEL_FOLDERS_MAX


def test_names_and_sizes_in_a_torrent(tmp_path: Path) -> None:
    longest = "x" * (TORRENT_NAME_BYTES_MAX - 5) + ".gguf"
    assert is_file_name(longest)
    assert not is_file_name("x" + longest)
    assert TORRENT_FILE_BYTES_MAX == 2**40  # see tests/wire/test_torrent_file.py


# -- keys and callers --------------------------------------------------------------------------


def test_keys_of_the_dht_stay_below_what_is_found() -> None:
    assert len(announcement_key("c" * 128, PEER_ID).encode()) == DHT_KEY_BYTES_MAX
    for cluster in ("c", "c" * 128):
        assert len(shard_key(cluster, 511).encode()) <= DHT_KEY_BYTES_MAX


def test_the_quietest_caller_is_forgotten() -> None:
    limits = RateLimits(1)
    for number in range(RATE_CALLERS_MAX + 1):
        limits.take(f"caller {number}", 0.0)
    limits.take("caller 0", 0.0)  # forgotten, so its bucket is full again
    with pytest.raises(ShardmeshError):
        limits.take(f"caller {RATE_CALLERS_MAX}", 0.0)


def test_input_errors_say_so() -> None:
    with pytest.raises(InputError, match=str(API_TOKENS_MAX)):
        ApiTokens(["x" * 16 for _ in range(API_TOKENS_MAX + 1)])
