"""Words, keys and blobs: fixed vectors, and what an attacker could try on a blob."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.errors import CorruptBlob, UserError
from hpkvfs.protocol.group import SigningKey
from hpkvfs.types import ANCHOR_BIT, BLOB_SIZE, PAYLOAD_SIZE, BlobId, BlobRef
from hpkvfs.volume.blob import CODES, Kind, Opened, Sealer
from hpkvfs.volume.keys import VaultKeys, check_words, make_words

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "format.json").read_text())
WORDS = VECTORS["words"]
KEYS = VaultKeys.from_words(WORDS)
PAYLOAD = bytes(range(256)) * 64


def fixed_rng() -> object:
    numbers = count(1)
    return lambda size: next(numbers).to_bytes(size, "big")


def test_keys_are_those_of_the_vectors() -> None:
    assert KEYS.root.hex() == VECTORS["root"]
    assert VaultKeys.from_words(WORDS, "TREZOR").root.hex() == VECTORS["root_with_passphrase"]
    assert KEYS.signer(BlobId(0)).public.hex() == VECTORS["blob_0"]
    assert KEYS.signer(BlobId(258)).public.hex() == VECTORS["blob_258"]
    assert KEYS.signer(BlobId(ANCHOR_BIT | 7)).public.hex() == VECTORS["anchor_7"]
    assert KEYS.entry_signer(bytes(32)).public.hex() == VECTORS["entry_of_zeros"]
    assert KEYS.fingerprint.hex() == VECTORS["fingerprint"]


def test_a_sealed_blob_is_that_of_the_vectors() -> None:
    ref, blob = Sealer(KEYS, fixed_rng()).seal(BlobId(258), Kind.NODE, PAYLOAD)  # type: ignore[arg-type]
    assert ref.encode().hex() == VECTORS["sealed_ref"]
    assert blob[:64].hex() == VECTORS["sealed_start"]


@pytest.mark.parametrize("words", [12, 24])
def test_new_words_open_the_same_vault_however_they_are_typed(words: int) -> None:
    made = make_words(words, os.urandom)
    assert len(made.split()) == words
    typed = "  " + made.upper().replace(" ", "\n ")
    assert VaultKeys.from_words(typed).root == VaultKeys.from_words(made).root
    assert make_words(words, os.urandom) != made


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("abandon about", "expected 12 or 24 words, found 2"),
        (WORDS.replace("about", "abot"), "word 12 is not one of the BIP39 words"),
        (WORDS.replace("about", "zoo"), "checksum"),
    ],
)
def test_wrong_words_are_refused_and_not_repeated(words: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        check_words(words)
    assert "abot" not in str(caught.value)


def test_two_seals_of_one_payload_have_nothing_in_common() -> None:
    sealer = Sealer(KEYS, os.urandom)
    (one, first), (two, second) = (sealer.seal(BlobId(1), Kind.EXTENT, PAYLOAD) for _ in "12")
    assert one.digest != two.digest and first[33:] != second[33:]
    assert len(first) == len(second) == BLOB_SIZE
    assert sealer.open(one, Kind.EXTENT, first) == sealer.open(two, Kind.EXTENT, second) == PAYLOAD


@given(place=st.integers(0, BLOB_SIZE - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed(place: int, bit: int) -> None:
    sealer = Sealer(KEYS, os.urandom)
    ref, blob = sealer.seal(BlobId(3), Kind.NODE, PAYLOAD)
    bad = bytearray(blob)
    bad[place] ^= 1 << bit
    with pytest.raises(CorruptBlob):
        sealer.open(ref, Kind.NODE, bytes(bad))
    with pytest.raises(CorruptBlob):
        sealer.open_unreferenced(ref.id, Kind.NODE, bytes(bad))


def test_a_blob_is_good_for_one_id_one_kind_and_one_vault() -> None:
    sealer, other = Sealer(KEYS, os.urandom), Sealer(VaultKeys(bytes(32)), os.urandom)
    ref, blob = sealer.seal(BlobId(3), Kind.NODE, PAYLOAD)
    assert sealer.open(ref, Kind.NODE, blob) == PAYLOAD
    for opener, blob_id, kind in [
        (sealer, BlobId(4), Kind.NODE),
        (sealer, BlobId(ANCHOR_BIT | 3), Kind.NODE),
        (sealer, BlobId(3), Kind.EXTENT),
        (other, BlobId(3), Kind.NODE),
    ]:
        with pytest.raises(CorruptBlob):
            opener.open(BlobRef(blob_id, ref.digest), kind, blob)
    with pytest.raises(CorruptBlob):
        sealer.open_unreferenced(ref.id, Kind.NODE, blob[:-1])


def sealed_by_the_server(public: bytes, kind: Kind, payload: bytes) -> bytes:
    """As well as anybody can who has FORMAT.md and the storage key."""
    ephemeral = SigningKey(os.urandom(32))
    salt, info = kind.value, ephemeral.public + public
    hkdf = HKDF(hashes.SHA256(), length=32, salt=salt, info=info)
    cipher = ChaCha20Poly1305(hkdf.derive(ephemeral.shared(public)))
    return ephemeral.public + cipher.encrypt(bytes(12), payload, kind.value + public)


@pytest.mark.parametrize("kind", list(Kind))
def test_who_knows_a_storage_key_cannot_seal_for_it(kind: Kind) -> None:
    sealer, blob_id = Sealer(KEYS, os.urandom), BlobId(ANCHOR_BIT | 3)
    made_up = sealed_by_the_server(KEYS.signer(blob_id).public, kind, PAYLOAD)
    with pytest.raises(CorruptBlob, match="does not open"):
        sealer.open_unreferenced(blob_id, kind, made_up)
    assert not sealer.is_ours(blob_id, made_up)
    assert sealer.is_ours(blob_id, sealer.seal(blob_id, kind, PAYLOAD)[1])


def test_only_whole_payloads_are_sealed() -> None:
    with pytest.raises(ValueError, match="16384"):
        Sealer(KEYS, os.urandom).seal(BlobId(1), Kind.NODE, bytes(PAYLOAD_SIZE - 1))


def test_keys_do_not_show_themselves() -> None:
    shown = repr(KEYS) + repr(KEYS.signer(BlobId(1)))
    assert KEYS.root.hex() not in shown and repr(KEYS.root) not in shown


@pytest.mark.parametrize("kind", list(Kind))
def test_what_is_kept_of_a_blob_makes_the_very_same_again(kind: Kind) -> None:
    ref, blob, sealed = Sealer(KEYS, os.urandom).make(BlobId(7), kind, PAYLOAD)
    other = Sealer(VaultKeys(KEYS.root), os.urandom)
    for kept in (sealed, other.unseal(ref, kind, blob)):
        raw = kept.encode()
        assert other.again(BlobId(7), Opened.decode(raw)) == blob
        assert raw.startswith(CODES[kind]) and raw.endswith(PAYLOAD)
        assert kept.key.hex() not in repr(kept) and repr(kept.key) not in repr(kept)


def test_what_is_no_opened_blob() -> None:
    raw = Sealer(KEYS, os.urandom).make(BlobId(7), Kind.NODE, PAYLOAD)[2].encode()
    for bad in (raw[:-1], raw + b"\0", b"", b"\xff" + raw[1:]):
        with pytest.raises(ValueError, match="opened"):
            Opened.decode(bad)
