"""Whole against cut for every model of the fixture, bit for bit; behind `make archs`.

Each cut into two that is legal and one into three is verified with a prefill longer than the
fixture's sliding window and a few single steps.  Prints a table and writes build/archs.json.  Exit
code 1 if a cut that the slicer allows is not identical.

    .venv/bin/python scripts/check_archs.py [--layers 4] [--seed 1] [--only REGEX] [--unlisted]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from build_arch_fixture import build_architecture, build_models, models_folder
from repeat_layers import write_repeated

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch
from shardmesh.engine.llama import CANNOT_TRIM, load_engine
from shardmesh.engine.verify import describe_death, verify_model
from shardmesh.engine.verify_worker import VerifyTask, compute_task
from shardmesh.errors import EngineError, ShardmeshError
from shardmesh.shards import architectures
from shardmesh.shards.architecture_rules import ArchitectureRules
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.legal_cuts import LegalCuts, legal_boundaries, legal_cuts

N_LAYERS = "4,8,16"
NO_LEGAL_CUT = "no legal cut"

N_PREFILL = 48
"""Past the fixture's sliding window of 32."""

PIECE_TOKENS = 64
"""All of them in one micro-batch."""

N_SINGLE = 4
TIMEOUT_S = 60
RESULTS = Path("build/archs.json")


class Unlisted(dict[str, ArchitectureRules]):
    """The table, with the general rules for what is not in it."""

    def get(self, architecture: str, default: object = None) -> ArchitectureRules:
        return super().get(architecture, architectures.PLAIN)


def check_model(path: Path) -> dict[str, Any]:
    """One row of the table: the state and the cuts with their results."""
    row: dict[str, Any] = {"model": path.stem, "state": "identical", "cuts": []}
    try:
        model = read_gguf(path)
        row["architecture"], row["n_layer"] = model.architecture, model.n_layer
        rules = architectures.RULES.get(model.architecture)
        if rules is not None and model.n_layer in rules.refused_layer_counts[0]:
            return {**row, "state": NO_LEGAL_CUT, "reason": "so many layers are another model"}
        row["legal"] = list(legal_boundaries(model))
        cuts = list(cuts_to_try(legal_cuts(model), row["legal"]))
    except ShardmeshError as error:
        return {**row, "state": "refused", "reason": str(error)}
    row["roll_back"] = check_roll_back(path)
    if row["roll_back"] != ("exact" if rules is None or rules.rolls_back else CANNOT_TRIM):
        return {**row, "state": "DIFFERENT", "reason": f"roll-back: {row['roll_back']}"}
    if not cuts:
        return {**row, "state": NO_LEGAL_CUT, "reason": "the model is too short for one"}
    for ranges in cuts:
        counts = [layers.n_layer for layers in ranges]
        result = check_cut(path, ranges)
        row["cuts"].append({"layers": counts, "result": result})
        if result != "identical":
            row["state"] = "DIFFERENT"
            before = row.get("reason", "")
            row["reason"] = f"{before} {','.join(map(str, counts))}: {result};".strip()
    return row


def check_repeated(path: Path) -> dict[str, Any]:
    """The row of a model of all layers twice over."""
    with tempfile.TemporaryDirectory() as folder:
        return check_model(write_repeated(path, Path(folder) / path.name, 2))


def cuts_to_try(cuts: LegalCuts, legal: Sequence[int]) -> Iterator[tuple[LayerRange, ...]]:
    """Every cut into two, and one into three."""
    n_layer = cuts.n_layer
    for layer in legal:
        yield LayerRange(0, layer), LayerRange(layer, n_layer)
    third = n_layer // 3
    if third and (thirds := cuts.nearest(ranges_of_counts([third, third, n_layer - 2 * third]))):
        yield thirds


def check_cut(path: Path, ranges: Sequence[LayerRange]) -> str:
    try:
        report = verify_model(
            path,
            ranges,
            n_single=N_SINGLE,
            n_prefill=N_PREFILL,
            piece_tokens=PIECE_TOKENS,
            prompt="",
            timeout_s=TIMEOUT_S,
            progress=lambda _: None,
            run=run_forked,
        )
    except ShardmeshError as error:
        return str(error)
    return "identical" if report.identical else f"differs by {report.max_abs_diff:.3g}"


def check_roll_back(path: Path) -> str:
    """ "exact" if tokens give the same bits after a sequence was taken back; else what happened."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=roll_back, args=(path, writing))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
    return reading.recv_bytes().decode() if reading.poll() else "its process died"


def roll_back(path: Path, writing: Any) -> None:
    """The logits of some single tokens: once, again behind a trim, again in a copy."""
    silence()
    engine = load_engine(path, EngineOptions(n_ctx=N_PREFILL + N_SINGLE, n_parallel=2))
    engine.open_sequence(0)
    tokens = [(7 * i + 3) % engine.info.n_vocab for i in range(N_PREFILL + N_SINGLE)]
    engine.compute([MicroBatch(sequence=0, position=0, tokens=tuple(tokens[:N_PREFILL]))])
    passes = []
    try:
        for _ in range(2):
            engine.trim_sequence(0, N_PREFILL)
            passes.append([logits(engine, 0, i, tokens[i]) for i in range(N_PREFILL, len(tokens))])
        engine.copy_sequence(0, 1)
        engine.open_sequence(1, n_keep=N_PREFILL)
        passes.append([logits(engine, 1, i, tokens[i]) for i in range(N_PREFILL, len(tokens))])
    except EngineError as error:
        writing.send_bytes(error.code.encode())
        return
    writing.send_bytes(b"exact" if passes[0] == passes[1] == passes[2] else b"other bits")


def logits(engine: Engine, sequence: int, position: int, token: int) -> bytes:
    micro = MicroBatch(sequence=sequence, position=position, tokens=(token,), want_logits=True)
    (output,) = engine.compute([micro])
    return b"" if output.logits is None else output.logits.tobytes()


def run_forked(task: VerifyTask, what: str, timeout_s: float) -> None:
    """A worker as a copy of this process, which has all modules loaded: quick, and may die."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(task, writing))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise EngineError(f"{what} was not computed within {timeout_s:g} s")
    if reading.poll():
        raise EngineError(f"{what}: {reading.recv_bytes().decode()}")
    if process.exitcode:
        raise EngineError(f"{what}: {describe_death(process.exitcode)}")


def work(task: VerifyTask, writing: Any) -> None:
    silence()
    try:
        compute_task(task)
    except ShardmeshError as error:
        writing.send_bytes(str(error).encode())


def silence() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if "SHOW_LOG" not in os.environ:
        os.dup2(null, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default=N_LAYERS, help="tried until a model has a legal cut")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="model names")
    parser.add_argument("--unlisted", action="store_true", help="by the general rules, all others")
    arguments = parser.parse_args()
    if arguments.unlisted:
        architectures.RULES = Unlisted(architectures.RULES)
    counts = [int(n) for n in arguments.layers.split(",")]
    rows = []
    for path in sorted(build_models(counts[0], arguments.seed).glob("*.gguf")):
        if not arguments.only.search(path.stem):
            continue
        row = check_model(path)
        for n_layers in counts[1:]:
            if row["state"] == NO_LEGAL_CUT:
                build_architecture(row["architecture"], n_layers, arguments.seed)
                row = check_model(models_folder(n_layers, arguments.seed) / path.name)
        if row["state"] == NO_LEGAL_CUT and "architecture" in row:
            row = check_repeated(models_folder(counts[0], arguments.seed) / path.name)
        rows.append(row)
        legal, reason = row.get("legal", ""), row.get("reason", "")
        print(f"{row['model']:24}{row['state']:14}{legal} {reason}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    states = [row["state"] for row in rows]
    print(", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))
    sys.exit("DIFFERENT" in states)


if __name__ == "__main__":
    # Read by libraries as they are loaded: threads that wait must not keep the cores from those
    # that work, and a dying worker must not start a debugger.
    settings = {"OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}
    if settings.items() <= os.environ.items():
        main()
    else:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
