"""The journal's chain: whatever was altered, dropped, inserted, moved or cut off is named by its number."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError
from foedus_common.journal import START, BrokenChain, Checkpoint, Entry, next_entry, verify


def chain(length: int, start: Checkpoint = START, word: str = "x") -> list[Entry]:
    entries: list[Entry] = []
    for _ in range(length):
        entries.append(next_entry(start, 1_800_000_000.25, "site.approved", {"site": word}))
        start = Checkpoint(entries[-1].number, entries[-1].head)
    return entries


LOG = chain(6)
END = Checkpoint(6, LOG[-1].head)


def broken_at(entries: list[Entry], checkpoints: list[Checkpoint] | None = None) -> int:
    with pytest.raises(BrokenChain) as error:
        verify(entries, checkpoints or [])
    assert f"entry {error.value.number}:" in str(error.value)
    return error.value.number


def test_the_form_of_an_entry_is_pinned() -> None:
    assert LOG[0].body == b'{"at":1800000000.25,"event":"site.approved","site":"x"}'
    assert LOG[0].event == {"at": 1_800_000_000.25, "event": "site.approved", "site": "x"}
    parts = (b"journal", (1).to_bytes(8, "big"), bytes(32), LOG[0].body)
    encoded = b"foedus/v1/" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert LOG[0].head == hashlib.sha256(encoded).digest()


def test_a_whole_log_verifies_and_gives_its_end() -> None:
    assert verify([]) == START
    assert verify(LOG) == END
    assert verify(LOG, [Checkpoint(3, LOG[2].head), START, END]) == END


@given(st.integers(0, 5), st.data())
def test_a_flipped_bit_is_named(position: int, data: st.DataObject) -> None:
    entry = LOG[position]
    place = data.draw(st.sampled_from(["body", "head"]))
    value = bytearray(getattr(entry, place))
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bad = [*LOG[:position], replace(entry, **{place: bytes(value)}), *LOG[position + 1 :]]
    assert broken_at(bad) == position + 1


def test_a_number_that_was_altered_is_named() -> None:
    assert broken_at([*LOG[:2], replace(LOG[2], number=7), *LOG[3:]]) == 3


@given(st.integers(0, 4))
def test_a_dropped_entry_is_named(position: int) -> None:
    assert broken_at(LOG[:position] + LOG[position + 1 :]) == position + 1


@given(st.integers(0, 4))
def test_a_dropped_entry_is_named_even_when_the_rest_is_numbered_anew(position: int) -> None:
    rest = [replace(entry, number=entry.number - 1) for entry in LOG[position + 1 :]]
    assert broken_at(LOG[:position] + rest) == position + 1


@given(st.permutations(range(6)).filter(lambda order: list(order) != sorted(order)))
def test_moved_entries_are_named(order: list[int]) -> None:
    first_wrong = next(i for i, position in enumerate(order) if position != i)
    assert broken_at([LOG[i] for i in order]) == first_wrong + 1


@given(st.integers(0, 6))
def test_an_inserted_entry_is_named(position: int) -> None:
    stranger = Entry(position + 1, b"{}", bytes(32))
    assert broken_at([*LOG[:position], stranger, *LOG[position:]]) == position + 1


@given(st.integers(0, 5))
def test_a_cut_log_verifies_alone_but_not_against_a_checkpoint(length: int) -> None:
    assert verify(LOG[:length]).number == length
    assert broken_at(LOG[:length], [END]) == length + 1


@given(st.integers(0, 5), st.integers(1, 6))
def test_a_rewritten_log_is_named_by_the_first_checkpoint_it_differs_from(position: int, checkpoint: int) -> None:
    before = START if position == 0 else Checkpoint(position, LOG[position - 1].head)
    rewritten = LOG[:position] + chain(6 - position, before, word="y")
    known = [END, Checkpoint(checkpoint, LOG[checkpoint - 1].head)]
    assert verify(rewritten).number == 6
    assert broken_at(rewritten, known) == (checkpoint if checkpoint > position else 6)


def test_two_checkpoints_that_contradict_each_other_cannot_both_hold() -> None:
    assert broken_at(LOG, [Checkpoint(2, LOG[1].head), Checkpoint(2, bytes(32))]) == 2


def test_a_broken_chain_is_one_sentence_for_the_operator() -> None:
    with pytest.raises(
        LocalError, match=r"^The journal is broken at entry 7: it is missing, and everything after it.$"
    ):
        verify(LOG, [Checkpoint(9, bytes(32))])
