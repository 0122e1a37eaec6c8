"""Vouchers as text: what is read is what was written, and nothing else is a voucher."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol.voucher import Voucher, voucher_digest

vouchers = st.builds(Voucher, st.integers(1, 2**32 - 1), st.binary(min_size=20, max_size=20))


@given(voucher=vouchers, spaces=st.sampled_from(["", " ", "\n", "\t "]))
def test_a_voucher_reads_back_however_it_was_pasted(voucher: Voucher, spaces: str) -> None:
    text = str(voucher)
    assert Voucher.parse(text) == voucher
    assert Voucher.parse(spaces + text.upper() + spaces) == voucher


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hpkv1-10-" + "a" * 31,
        "hpkv1-10-" + "a" * 33,
        "hpkv1-10-" + "1" * 32,
        "hpkv2-10-" + "a" * 32,
        "hpkv1-0-" + "a" * 32,
        "hpkv1-010-" + "a" * 32,
        "hpkv1--10-" + "a" * 32,
        "hpkv1-4294967296-" + "a" * 32,
        "hpkv1-\u0661\u0660-" + "a" * 32,
    ],
)
def test_other_text_is_no_voucher(text: str) -> None:
    with pytest.raises(ValueError, match="voucher"):
        Voucher.parse(text)


@given(voucher=vouchers)
def test_neither_repr_nor_digest_tell_the_secret(voucher: Voucher) -> None:
    assert repr(voucher) == f"Voucher(amount={voucher.amount})"
    assert voucher.digest == voucher_digest(voucher.secret)
    assert len(voucher.digest) == 32


def test_a_generated_voucher_takes_its_secret_from_the_given_source() -> None:
    assert Voucher.generate(7, lambda size: b"s" * size) == Voucher(7, b"s" * 20)
