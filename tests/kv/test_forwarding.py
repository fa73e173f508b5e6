"""Messages between members: round trips, and nothing but `WireError` for what does not parse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import ConditionFailed, IntegrityError, OutcomeUnknown, WireError
from elastickv.kv.forwarding import (
    ErrorInfo,
    RegisterSelf,
    WriteGroup,
    WriteGroupReply,
    WriteItem,
    WriteReply,
    decode,
    decode_outcome,
    encode,
    error_to_info,
    info_to_error,
)

GROUP = WriteGroup(5000, [WriteItem([(0, b"k", b"v", 7), (1, b"d", b"", 0)], [(b"k", 3)])])
REPLY = WriteGroupReply([WriteReply(1, 2, None), WriteReply(0, 0, ErrorInfo("X", "m", "r"))])


@pytest.mark.parametrize("message", [GROUP, REPLY, RegisterSelf(1, 2, 3)],
                         ids=lambda message: type(message).__name__)
def test_round_trip(message: object) -> None:
    assert decode(encode(message), type(message)) == message


@given(st.binary(max_size=80))
def test_random_bytes_are_a_wire_error_or_a_message(data: bytes) -> None:
    for message_type in (WriteGroup, WriteGroupReply, RegisterSelf):
        try:
            decode(data, message_type)
        except WireError:
            continue


def test_text_that_is_no_utf8_is_a_wire_error() -> None:
    damaged = encode(REPLY).replace(b"m", b"\xff")
    with pytest.raises(WireError):
        decode(damaged, WriteGroupReply)


@pytest.mark.parametrize("size", range(len(encode(GROUP))))
def test_a_truncated_message_is_a_wire_error(size: int) -> None:
    with pytest.raises(WireError):
        decode(encode(GROUP)[:size], WriteGroup)


def test_an_answer_to_an_operation_that_was_carried_out_leaves_its_outcome_open() -> None:
    assert decode_outcome(encode(7), int, "look") == 7
    with pytest.raises(OutcomeUnknown) as caught:
        decode_outcome(b"\xc1", int, "look")
    assert caught.value.remedy == "look"


def test_an_error_comes_back_as_its_own_class() -> None:
    error = info_to_error(error_to_info(ConditionFailed("no", remedy="again")))
    assert type(error) is ConditionFailed
    assert (error.message, error.remedy) == ("no", "again")


def test_a_class_of_this_node_alone_comes_back_as_the_nearest_shared_one() -> None:
    class Private(IntegrityError):
        """Not part of the tree that members share."""

    error = info_to_error(error_to_info(Private("damaged", remedy="mend")))
    assert type(error) is IntegrityError
    assert "damaged" in str(error)


def test_a_class_that_only_newer_members_know_leaves_the_outcome_open() -> None:
    error = info_to_error(ErrorInfo("FromTheFuture", "something", ""))
    assert type(error) is OutcomeUnknown
