"""What a benchmark found: figures, medians, a line of JSON, a table.  Pure but for `machine`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from rich.table import Table

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison; `ratio` where more is better, `ms` where a time is the goal."""

    name: str
    mesh: Figures
    baseline: Figures
    runs: int
    ratio: float | None = None
    ms: float | None = None
    derived: Figures = dataclasses.field(default_factory=dict)  # what follows: columns of their own

    def to_json(self, machine: Figures) -> str:
        """One line."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, {})}
        return json.dumps({**values, "machine": machine})


def median_of(values: Sequence[float], unit: str) -> Figures:
    """The median beside all values, so that a reader sees how far they lie apart."""
    return {unit: round(statistics.median(values), 3), "all": [round(v, 3) for v in values]}


def paired(mesh: Sequence[float], baseline: Sequence[float]) -> tuple[float, list[float]]:
    """The ratio of medians, and the ratio of each pair, which were measured close together."""
    ratio = statistics.median(mesh) / statistics.median(baseline)
    pairs = [round(ours / theirs, 4) for ours, theirs in zip(mesh, baseline, strict=True)]
    return round(ratio, 4), pairs


def machine() -> Figures:
    """What the figures depend on; `load` above 0 says that others were at work before."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "n_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "load": round(psutil.getloadavg()[0], 2),
    }


def table(results: Sequence[Result]) -> Table:
    """All results for a person."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    shown.add_column("benchmark", style="bold")
    for name in ("mesh", "baseline", "result", "pairs"):
        shown.add_column(name, justify="right")
    derived = list(dict.fromkeys(key for result in results for key in result.derived))
    for key in derived:
        shown.add_column(key, justify="right")
    for result in results:
        outcome = f"{result.ms:.3f} ms" if result.ms is not None else f"{result.ratio:.3f}"
        pairs = result.mesh.get("pair_ratios") or []
        spread = f"{min(pairs):.3f} to {max(pairs):.3f}" if pairs else ""
        shown.add_row(
            result.name,
            _median_text(result.mesh),
            _median_text(result.baseline),
            outcome,
            spread,
            *(str(result.derived.get(key, "")) for key in derived),
        )
    return shown


def _median_text(figures: Figures) -> str:
    """The first figure, which `median_of` put there."""
    unit, value = next(iter(figures.items()))
    return f"{value:.4g} {unit.replace('_per_s', '/s').replace('_', ' ')}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
