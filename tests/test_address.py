"""Where a server may be: onion addresses, and none that would show who asks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.address import DEFAULT_PORT, Address, onion_host
from hpkvfs.errors import UserError

# Of the Tor Project's own site, and its key.
KNOWN = "2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion"


def test_a_known_address_parses_and_is_made_again() -> None:
    address = Address.parse(f"{KNOWN}:80")
    assert (address.host, address.port, address.is_onion) == (KNOWN, 80, True)
    assert address.identity is not None
    assert onion_host(address.identity) == KNOWN
    assert str(address) == f"{KNOWN}:80"


def test_the_port_may_be_left_out_and_capitals_do_not_matter() -> None:
    assert Address.parse(KNOWN.upper()) == Address(KNOWN, DEFAULT_PORT)


@given(st.binary(min_size=32, max_size=32))
def test_every_key_has_an_address(key: bytes) -> None:
    assert Address.parse(onion_host(key)).identity == key


@given(st.integers(0, 55), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_a_wrong_letter_is_noticed(at: int, letter: str) -> None:
    wrong = f"{KNOWN[:at]}{letter}{KNOWN[at + 1 :]}"
    if wrong != KNOWN:
        with pytest.raises(UserError, match="not an onion address"):
            Address.parse(wrong)


@pytest.mark.parametrize("host", ["abc.onion", ".onion", "expyuzz4wqqyqhjn.onion", f"x{KNOWN}"])
def test_what_is_no_version_3_address_is_refused(host: str) -> None:
    with pytest.raises(UserError):
        Address.parse(host)


def test_an_onion_address_is_private_and_has_an_identity_others_have_none() -> None:
    Address.parse(KNOWN).check_private(insecure_direct=False)
    assert Address.parse("127.0.0.1:7387").identity is None
    with pytest.raises(UserError, match="show it your address"):
        Address.parse("example.org:80").check_private(insecure_direct=False)
