"""What happens in one simulated run: sessions and faults, all drawn from the seed.  Pure."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal, get_args

N_STAGES = 3
N_COORDINATORS = 2
SESSIONS_UNTIL_S = 2.0
"""Sessions are asked for before that, and take about a second each if nothing happens; so some find
the prompt of an earlier one, or of one that runs."""

FAULTS_UNTIL_S = 2.0
"""Faults begin before that; each is over at most FAULT_LONGEST_S later."""

FAULT_LONGEST_S = 6.0

PIECE_TOKENS = (32, 16, 64)
PROMPT_TOKENS = (1, 7, 32, 33, 70, 96, 130, 130, 190, 190)

FaultKind = Literal[
    "kill",  # the node is gone, and comes back as a new process
    "freeze",  # SIGSTOP, later SIGCONT
    "part",  # two nodes do not reach each other
    "slow link",
    "slow node",  # computes ten times slower
    "hang",  # answers heartbeats and computes nothing, until it is killed
    "cut",  # one connection ends
    "flip",  # a bit of a record on its way
    "double",  # a record arrives twice
    "swap",  # two records arrive in the wrong order
    "doubled frame",  # a stage sends hidden states twice
    "early frame",  # or for a position that is not due
    "wide frame",  # or of a wrong width
    "stray token",  # a last stage hands on a token that is not due
    "not finite",  # or NaN
    "engine fails",
    "coordinator killed",
    "coordinator gone",  # without a word: its machine lost power
]

KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
WEIGHTS = [{"kill": 6, "freeze": 3}.get(kind, 1) for kind in KINDS]
BETWEEN_TWO: frozenset[FaultKind] = frozenset(
    ("part", "slow link", "cut", "flip", "double", "swap")
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """At `at_s` something happens to a node, or between it and `other`, and passes."""

    kind: FaultKind
    at_s: float
    node: str
    other: str = ""
    lasts_s: float = 0.0

    def __str__(self) -> str:
        where = f"{self.node} and {self.other}" if self.other else self.node
        return f"{self.at_s:7.3f} {self.kind}: {where} for {self.lasts_s:.3f} s"


@dataclasses.dataclass(frozen=True)
class SessionPlan:
    """One generation, and when its user loses patience, if at all."""

    number: int
    coordinator: str
    at_s: float
    prompt: tuple[int, ...]
    n_tokens: int
    temperature: float
    cancelled_after_s: float | None
    prefers: tuple[int, ...]  # the replica of each stage, if it is there and well
    n_guesses: int  # tokens guessed ahead, at most
    guesses_right: float  # how often one is
    standby: bool  # other replicas keep copies
    hands_on: float  # how often the last stage may send a token straight to the first
    reads_after_s: float  # how long it takes to go on behind a token


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run."""

    seed: int
    n_replicas: tuple[int, ...]  # of each stage
    late_replicas: tuple[tuple[float, str], ...]  # (when, name) of those that join later
    n_parallel: int
    sessions: tuple[SessionPlan, ...]
    faults: tuple[Fault, ...]
    piece_tokens: int  # of the model

    def nodes(self) -> list[str]:
        """Names of all nodes, those that join late included."""
        return [node_name(n, i) for n, count in enumerate(self.n_replicas) for i in range(count)]

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: replicas {self.n_replicas}, {self.n_parallel} sequences each, "
            f"late {self.late_replicas}, prompts in pieces of {self.piece_tokens}"
        ]
        lines += [
            f"{s.at_s:7.3f} session {s.number} of {s.coordinator}: {len(s.prompt)} + "
            f"{s.n_tokens} tokens, temperature {s.temperature}, cancelled {s.cancelled_after_s}, "
            f"{s.n_guesses} guessed, of which right: {s.guesses_right}, "
            f"handed on: {s.hands_on}, read after {s.reads_after_s}"
            + (", with standbys" if s.standby else "")
            for s in self.sessions
        ]
        return "\n".join(lines + [str(fault) for fault in self.faults])


def node_name(stage: int, replica: int) -> str:
    return f"stage-{stage}-{replica}"


def coordinator_name(number: int) -> str:
    return f"coordinator-{number}"


def stage_of(node: str) -> int:
    return int(node.split("-")[1])


def make_plan(seed: int) -> Plan:
    """The plan of a seed; always the same."""
    chance = random.Random(seed)
    n_replicas = tuple(chance.choice((2, 2, 3)) for _ in range(N_STAGES))
    nodes = [node_name(n, i) for n, count in enumerate(n_replicas) for i in range(count)]
    late = tuple(
        (chance.uniform(0.2, FAULTS_UNTIL_S), node)
        for node in nodes
        if not node.endswith("-0") and chance.random() < 0.15
    )
    common = tuple(chance.randrange(64) for _ in range(max(PROMPT_TOKENS)))
    sessions = tuple(_session(chance, number, common) for number in range(chance.randint(1, 6)))
    # Mostly room for all, sometimes for few: then they have to take turns.
    n_parallel = chance.choice((2, 4, 8))
    count = chance.choice((1, 2, 3, 4, 6, 8))
    faults = sorted((_fault(chance, nodes) for _ in range(count)), key=lambda fault: fault.at_s)
    piece_tokens = PIECE_TOKENS[seed % len(PIECE_TOKENS)]
    return Plan(seed, n_replicas, late, n_parallel, sessions, tuple(faults), piece_tokens)


def _session(chance: random.Random, number: int, common: tuple[int, ...]) -> SessionPlan:
    """A prompt that begins like others; how far is drawn."""
    n_tokens = chance.choice(PROMPT_TOKENS)
    n_common = chance.choice((0, n_tokens // 2, n_tokens, n_tokens))
    others = tuple(chance.randrange(3) for _ in range(N_STAGES))
    prefers = chance.choice(((0,) * N_STAGES,) * 2 + (others,))  # who goes the same way finds more
    return SessionPlan(
        number=number,
        coordinator=coordinator_name(chance.randrange(N_COORDINATORS)),
        at_s=chance.uniform(0.0, SESSIONS_UNTIL_S),
        prompt=common[:n_common] + tuple(chance.randrange(64) for _ in range(n_tokens - n_common)),
        n_tokens=chance.randint(1, 40),
        temperature=chance.choice((0.0, 0.9)),
        prefers=prefers,
        cancelled_after_s=chance.uniform(0.0, 2.0) if chance.random() < 0.1 else None,
        n_guesses=chance.choice((0, 0, 2, 8, 32)),
        guesses_right=chance.choice((0.2, 0.7, 0.9, 1.0)),
        standby=chance.random() < 0.7,
        hands_on=chance.choice((0.0, 0.5, 1.0, 1.0)),
        reads_after_s=chance.choice((0.0, 0.0, 0.0, 0.02, 0.2)),
    )


def _fault(chance: random.Random, nodes: list[str]) -> Fault:
    (kind,) = chance.choices(KINDS, WEIGHTS)
    node, other = chance.choice(nodes), ""
    if kind in ("coordinator killed", "coordinator gone"):
        node = coordinator_name(chance.randrange(N_COORDINATORS))
    if kind in BETWEEN_TWO:
        others = [coordinator_name(n) for n in range(N_COORDINATORS)]
        others += [name for name in nodes if stage_of(name) != stage_of(node)]  # each has a link
        other = chance.choice(others)
    at_s = chance.uniform(0.0, FAULTS_UNTIL_S)
    lasts_s = chance.choice((0.05, 0.4, chance.uniform(0.0, FAULT_LONGEST_S)))
    return Fault(kind, at_s, node, other, lasts_s)
