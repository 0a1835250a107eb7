"""`make sim`: many seeds of the simulation, on all cores; prints the seeds that failed."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from sim.run import Outcome, SimulationError, simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    begun_s = time.monotonic()
    failed: list[int] = []
    outcomes: list[Outcome] = []
    with multiprocessing.Pool() as pool:
        for number, result in enumerate(pool.imap(try_seed, seeds), start=options.first):
            if isinstance(result, Outcome):
                outcomes.append(result)
            else:
                failed.append(number)
                print(f"{result}\n", flush=True)
    print(
        f"{len(outcomes)} seeds were right in {time.monotonic() - begun_s:.0f} s: "
        f"{sum(o.n_finished for o in outcomes)} sessions finished with the undisturbed tokens, "
        f"{sum(o.n_repairs for o in outcomes)} stages were replaced, "
        f"{sum(o.n_late_frames for o in outcomes)} late frames were refused, "
        f"longest pause {max((o.longest_pause_s for o in outcomes), default=0.0):.2f} s"
    )
    if failed:
        print(f"{len(failed)} seeds failed: {failed}")
    return 1 if failed else 0


def try_seed(seed: int) -> Outcome | str:
    try:
        return simulate(seed)
    except SimulationError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
