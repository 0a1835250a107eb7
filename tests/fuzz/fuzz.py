"""Feeds altered inputs to every parser: `python tests/fuzz/fuzz.py --seconds 60`.

An input is one of the corpus, altered by a generator whose seed is printed, so that every case can
be had again: `--seed SEED --case NUMBER`.  Whatever is no ShardmeshError, or takes too long, is a
finding; its input is saved and belongs into the corpus once it is mended.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

TESTS_DIR = Path(__file__).resolve().parents[1]
if str(TESTS_DIR) not in sys.path:
    sys.path.insert(0, str(TESTS_DIR))

from support.fuzz_targets import TARGETS  # noqa: E402

from shardmesh.errors import ShardmeshError  # noqa: E402

CORPUS_DIR = Path(__file__).resolve().parent / "corpus"
SLOW_S = 2.0
INPUT_BYTES_MAX = 1024 * 1024
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def corpus(name: str) -> list[Path]:
    """The files of one target; those named `good-` must be read, the others refused."""
    return sorted((CORPUS_DIR / name).iterdir())


def altered(data: bytes, other: bytes, generator: random.Random) -> bytes:
    """`data` after one to four changes; `other` lends pieces."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randint(0, len(changed))
        n = generator.choice((1, 1, 2, 4, 8, 32))
        match generator.randrange(7):
            case 0 if changed:  # flip a bit
                changed[at % len(changed)] ^= 1 << generator.randrange(8)
            case 1:  # a number that lies at a border
                size = generator.choice((1, 2, 4, 8))
                number = generator.choice(_NUMBERS) & (2 ** (8 * size) - 1)
                order = generator.choice(("little", "big"))
                changed[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
            case 2:  # leave out
                del changed[at : at + n]
            case 3:  # repeat
                changed[at:at] = changed[at : at + n] * generator.choice((1, 2, 50))
            case 4:  # put in
                changed[at:at] = generator.randbytes(n)
            case 5:  # cut off
                del changed[at:]
            case _:  # a piece of another input
                start = generator.randint(0, len(other))
                changed[at : at + n] = other[start : start + 4 * n]
    return bytes(changed[:INPUT_BYTES_MAX])


def case(seed: int, number: int, inputs: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """Target and input of one case; the same for the same seed, number and corpus."""
    generator = random.Random(f"{seed}/{number}")
    name = generator.choice(sorted(inputs))
    return name, altered(generator.choice(inputs[name]), generator.choice(inputs[name]), generator)


def try_one(name: str, data: bytes) -> str | None:
    """Why this is a finding, None if it is none."""
    begun_s = time.monotonic()
    try:
        TARGETS[name](data)
    except ShardmeshError:
        pass
    except Exception:  # noqa: BLE001 - that is what is looked for
        return traceback.format_exc()
    elapsed_s = time.monotonic() - begun_s
    return f"took {elapsed_s:.1f} s" if elapsed_s > SLOW_S else None


def findings(
    seed: int, numbers: Iterator[int], until_s: float
) -> Iterator[tuple[int, str, bytes, str | None]]:
    """Every case that was tried, with what was found."""
    inputs = {name: [path.read_bytes() for path in corpus(name)] for name in TARGETS}
    for number in numbers:
        if time.monotonic() > until_s:
            return
        name, data = case(seed, number, inputs)
        yield number, name, data, try_one(name, data)


def main() -> int:
    """Exit status 1 if there were findings."""
    parser = argparse.ArgumentParser(description="Feeds altered inputs to every parser.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--case", type=int, help="try only this one")
    parser.add_argument("--out", type=Path, default=Path("build", "fuzz"), help="for findings")
    options = parser.parse_args()
    last = 2**62 if options.case is None else options.case + 1
    numbers = iter(range(options.case or 0, last))
    n_cases = n_findings = 0
    for number, name, data, why in findings(
        options.seed, numbers, time.monotonic() + options.seconds
    ):
        n_cases += 1
        if why is None:
            continue
        n_findings += 1
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
        path.write_bytes(data)
        print(f"{name}: --seed {options.seed} --case {number}, saved as {path}\n{why}")
    print(f"seed {options.seed}: {n_cases} cases, {n_findings} findings")
    return 1 if n_findings else 0


if __name__ == "__main__":
    sys.exit(main())
