"""Transcripts: the framing documented, and no two histories with one hash."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol.group import short_scalar
from hpkvfs.protocol.transcript import Transcript

fields = st.lists(st.tuples(st.text("ab", max_size=3), st.binary(max_size=4)), max_size=4)


def record(domain: str, history: list[tuple[str, bytes]]) -> Transcript:
    transcript = Transcript(domain)
    for label, data in history:
        transcript.append(label, data)
    return transcript


def test_framing_is_byte_exact() -> None:
    framed = b"\x06domain\0\0\0\x01d" + b"\x01a\0\0\0\x02\x01\x02"
    expected = hashlib.sha512(framed).digest()
    transcript = record("d", [("a", b"\x01\x02")])
    assert transcript.digest() == expected
    quarters = [expected[i : i + 16] for i in range(0, 64, 16)]
    assert transcript.weights() == tuple(map(short_scalar, quarters))
    assert transcript.challenge() == short_scalar(expected[:16])


@given(fields, fields)
def test_different_histories_have_different_digests(
    first: list[tuple[str, bytes]], second: list[tuple[str, bytes]]
) -> None:
    same = record("d", first).digest() == record("d", second).digest()
    assert same == (first == second)


@given(fields)
def test_the_domain_separates(history: list[tuple[str, bytes]]) -> None:
    assert record("d", history).challenge() != record("e", history).challenge()


def test_asking_does_not_change_the_answer() -> None:
    asked, other = record("d", []), record("d", [])
    asked.challenge()
    asked.append("a", b"")
    other.append("a", b"")
    assert asked.digest() == other.digest()
