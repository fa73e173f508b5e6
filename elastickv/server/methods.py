"""A service method without a transport: both fronts serve the same tables of these.

A method gets the parsed request and the seconds that it may take, and raises `elastickv.errors`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from elastickv.errors import InvalidArgument

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Unary:
    """One request, one response."""

    call: Callable[[Any, float], Awaitable[Any]]
    parse: Callable[[bytes], Any]
    serialize: Callable[[Any], bytes]
    names_caller: bool = False  # the front sets `audit.caller` before the call


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


def parse_request(parse: Callable[[bytes], Any], content: bytes) -> Any:
    """The request message. Raises `InvalidArgument` for bytes that are none."""
    try:
        return parse(content)
    except DecodeError:
        raise InvalidArgument("the request is not a message of this method",
                              remedy="generate the client from proto/ of this version") from None


def unary(call: Callable[[Request, float], Awaitable[Response]], request_type: Any,
          response_type: Any) -> Unary:
    """A `Unary` of generated message classes."""
    return Unary(call, request_type.FromString, response_type.SerializeToString)
