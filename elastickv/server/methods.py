"""A service method without a transport: both fronts serve the same tables of these.

A method gets the parsed request and the seconds that it may take, and raises `elastickv.errors`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError

from elastickv.errors import InvalidArgument
from elastickv.kv.api import MAX_TIMEOUT_S
from elastickv.kv.turns import Turns

DEFAULT_TIMEOUT_S: Final = 10.0
"""For a call whose caller set no deadline."""
_MAX_MARGIN_S: Final = 0.1
_MARGIN_SHARE: Final = 0.1

SMALL_MESSAGE_BYTES: Final = 1 << 20
"""The largest request of a method that takes no value. A message is parsed before it is known
whether its caller may call the method, and takes many times the memory then."""
AS_FRONT: Final = sys.maxsize
"""As large a request as the front takes from anybody."""

ADMINISTRATIVE: Final = frozenset({"EncryptionAdmin", "RaftAdmin"})
"""Services whose every call is audited, reads too: some hand out every wrapped DEK."""

READS: Final = frozenset({
    "GetCapability", "GetSidecarState", "GetMemberStatus", "ResyncSidecar", "Status",
    "Configuration"})
"""Their methods that change nothing: an index in a response of one is not that of a change."""

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Unary:
    """One request of at most `max_message_bytes`, one response. A front parses a request in its
    turn, where there are `turns`."""

    call: Callable[[Any, float], Awaitable[Any]]
    parse: Callable[[bytes], Any]
    serialize: Callable[[Any], bytes]
    max_message_bytes: int = SMALL_MESSAGE_BYTES
    names_caller: bool = False  # the front sets `audit.caller` before the call
    turns: Turns | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of requests and a stream of responses, which ends when the caller has gone."""

    call: Callable[[AsyncIterator[Any]], AsyncGenerator[Any, None]]
    parse: Callable[[bytes], Any]
    serialize: Callable[[Any], bytes]


Methods = Mapping[str, Unary | Stream]
"""Methods of a service by name."""

Services = Mapping[str, Methods]
"""Methods by full service name."""


def wrapped(services: Services, wrap: Callable[[str, str, Unary], Unary]) -> Services:
    """The same services, with `wrap(service, name, method)` for every unary method. Streams last as
    long as their callers like and are left alone."""
    return {service: {name: wrap(service, name, method) if isinstance(method, Unary) else method
                      for name, method in methods.items()}
            for service, methods in services.items()}


def parse_request(parse: Callable[[bytes], Any], content: bytes) -> Any:
    """The request message. Raises `InvalidArgument` for bytes that are none."""
    try:
        return parse(content)
    except DecodeError:
        raise InvalidArgument("the request is not a message of this method",
                              remedy="generate the client from proto/ of this version") from None


def unary(call: Callable[[Request, float], Awaitable[Response]], request_type: Any,
          response_type: Any, *, max_message_bytes: int = SMALL_MESSAGE_BYTES,
          turns: Turns | None = None) -> Unary:
    """A `Unary` of generated message classes."""
    return Unary(call, request_type.FromString, response_type.SerializeToString,
                 max_message_bytes, turns=turns)


def too_large(size: int, max_message_bytes: int) -> str:
    """The detail of RESOURCE_EXHAUSTED for such a request: gRPC's own words, by which clients tell
    it from an overload."""
    return f"message larger than max ({size} vs. {max_message_bytes})"


def time_for_call(remaining_s: float | None) -> float:
    """Seconds that a call may take, given the caller's deadline: a little less, so that a typed
    error still reaches the caller before its own clock runs out, and never more than
    `MAX_TIMEOUT_S`."""
    if remaining_s is None:
        return DEFAULT_TIMEOUT_S
    return min(remaining_s - min(_MAX_MARGIN_S, remaining_s * _MARGIN_SHARE), MAX_TIMEOUT_S)
