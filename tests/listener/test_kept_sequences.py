"""Which sequence a new session gets: nothing that is worth keeping is lost while there is room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardmesh.listener.kept_sequences import KeptSequences, Place, Prefix, held_of, n_common
from shardmesh.wire.messages import PrefixPiece

N_CTX = 512


def prefix(name: str) -> Prefix:
    """A letter is a piece of 32 tokens."""
    return tuple(
        PrefixPiece(end=32 * (i + 1), digest=name[: i + 1].encode().ljust(16))
        for i in range(len(name))
    )


def kept(*names: str, n_parallel: int = 4, n_ctx: int = N_CTX) -> KeptSequences:
    """Sequences with these prompts, the first the least recently used."""
    sequences = KeptSequences(n_parallel, n_ctx)
    for place in [sequences.take(()) for _ in names]:
        sequences.give_back(place.sequence, prefix(names[place.sequence]))
    return sequences


def test_an_unknown_prompt_gets_an_empty_sequence_then_the_least_recently_used() -> None:
    sequences = kept("a", "b", n_parallel=3)
    assert [sequences.take(prefix("x")) for _ in range(3)] == [Place(2), Place(0), Place(1)]
    assert sequences.n_free == 0


def test_a_kept_prompt_that_is_wholly_wanted_is_taken_over() -> None:
    sequences = kept("ab", "cd")
    assert sequences.take(prefix("abx")) == Place(0, 64)
    assert sequences.n_kept == 1


def test_one_that_others_may_want_is_copied() -> None:
    sequences = kept("abc", "cd")
    assert sequences.take(prefix("abx")) == Place(2, 64, copy_of=0)
    assert sequences.n_kept == 2


def test_the_least_recently_used_makes_room_for_a_copy_but_not_the_source() -> None:
    sequences = kept("abc", "cd", n_parallel=2)
    assert sequences.take(prefix("abx")) == Place(1, 64, copy_of=0)
    assert sequences.take(prefix("abx")) == Place(0, 64)


def test_a_running_session_is_shared_at_once() -> None:
    sequences = KeptSequences(2, N_CTX)
    first = sequences.take(prefix("ab"))
    running = [(first.sequence, prefix("a"))]
    assert sequences.take(prefix("abc"), running) == Place(1, 32, copy_of=0)


def test_of_equals_a_kept_one_is_taken_which_costs_no_copy() -> None:
    sequences = kept("ab")
    assert sequences.take(prefix("abc"), [(3, prefix("ab"))]) == Place(0, 64)


def test_the_longest_common_beginning_wins() -> None:
    sequences = kept("ab", "abc", "abcx")
    assert sequences.take(prefix("abcdef")) == Place(1, 96)


def test_a_copy_of_a_long_context_for_a_short_prefix_is_not_made() -> None:
    n_ctx = 64 * 1024
    assert kept("abc", n_ctx=n_ctx).take(prefix("ax")) == Place(0, 32)
    sequences = KeptSequences(2, n_ctx)
    busy = sequences.take(())
    assert sequences.take(prefix("ax"), [(busy.sequence, prefix("abc"))]) == Place(1)


def test_what_was_only_begun_is_not_held() -> None:
    assert held_of(prefix("abc"), 95) == prefix("ab")
    assert held_of(prefix("abc"), 96) == prefix("abc")


names = st.text("ab", max_size=4)


@given(st.lists(st.tuples(st.booleans(), names, st.integers(0, 3)), max_size=30))
def test_each_sequence_is_one_sessions_and_holds_what_it_says(
    steps: list[tuple[bool, str, int]],
) -> None:
    """Against a plain list of what lies in each sequence; true = a session comes, else one goes."""
    sequences = KeptSequences(3, N_CTX)
    holds: dict[int, str] = {0: "", 1: "", 2: ""}  # what is computed in each
    running: dict[int, str] = {}
    for comes, name, which in steps:
        if comes and sequences.n_free:
            place = sequences.take(prefix(name), [(s, prefix(n)) for s, n in running.items()])
            assert place.sequence not in running
            if place.copy_of is not None:
                assert place.copy_of != place.sequence
                holds[place.sequence] = holds[place.copy_of]
            n_pieces = place.n_held // 32
            assert holds[place.sequence][:n_pieces] == name[:n_pieces]
            assert len(holds[place.sequence]) >= n_pieces
            best = max((n_common(prefix(name), prefix(h)) for h in running.values()), default=0)
            assert n_pieces >= best
            holds[place.sequence] = running[place.sequence] = name
        elif running and not comes:
            sequence = sorted(running)[which % len(running)]
            sequences.give_back(sequence, prefix(running.pop(sequence)))
        assert sequences.n_free == 3 - len(running)
