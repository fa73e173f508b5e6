"""Connections to the members: one channel per endpoint, and which one to ask next."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from elastickv.client.failures import NotReached, unparsed
from elastickv.client.rpcs import RAFT_STATUS, RequestT, ResponseT, Rpc
from elastickv.config import TlsFiles, parse_address
from elastickv.errors import ConfigError, ForkedProcess, Unreachable, WireError

MAX_LEARNED_ENDPOINTS = 16
PROBE_TIMEOUT_S = 0.2

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.use_local_subchannel_pool", 1),  # endpoints fail and recover apart
    # What may be retried is decided here. The transport repeats only what it knows that the member
    # did not begin (beyond the last stream of a GOAWAY): more takes a policy, and none is taken.
    ("grpc.enable_retries", 1),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.per_rpc_retry_buffer_size", (1 << 31) - 1),  # it repeats nothing larger
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that counts, where gRPC knows it
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)

_grpc_process_id = 0


def is_forked() -> bool:
    """Whether this process was forked off one that used gRPC, which hangs or crashes here."""
    return _grpc_process_id not in (0, os.getpid())


def claim_process() -> None:
    """Note that this process uses gRPC. Raises `ForkedProcess`."""
    global _grpc_process_id
    if is_forked():
        raise ForkedProcess("a client was made before this process was forked off",
                            remedy="fork before the first client is made, or start the process anew"
                                   " (multiprocessing: method \"spawn\")")
    _grpc_process_id = os.getpid()


def credentials_of(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Mutual TLS from PEM files. Raises `ConfigError` that says what is wrong with them."""
    try:
        # gRPC accepts anything here and fails later without a reason.
        check = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        check.load_cert_chain(tls.cert, tls.key, partial(_refuse_encrypted, tls.key))
        check.load_verify_locations(tls.ca)
        return grpc.ssl_channel_credentials(
            tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes())
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or str(error)
        raise ConfigError(f"the TLS files {tls.ca}, {tls.cert}, {tls.key} cannot be used: {reason}",
                          remedy="make them with `elastickv certs client`") from None


def _refuse_encrypted(key: Path) -> NoReturn:
    """In the place of the question for a password, which would wait for a terminal: gRPC takes
    none."""
    raise ConfigError(f"the private key {key} is encrypted",
                      remedy="give one that is not; `elastickv certs client` makes such keys")


class Endpoint:
    """One member's client address and the channel to it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        self._channel = (grpc.aio.insecure_channel(address, options=OPTIONS)
                         if credentials is None
                         else grpc.aio.secure_channel(address, credentials, options=OPTIONS))
        self._methods: dict[str, Any] = {}

    async def connect(self, timeout_s: float) -> None:
        """Return once connected. Raises `Unreachable`: then certainly nothing was sent."""
        state = self._channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise NotReached(f"{self.address}: cannot connect")
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise NotReached(f"{self.address}: no connection within {timeout_s:.2f} s") from None

    async def call(self, rpc: Rpc[RequestT, ResponseT], request: bytes,
                   timeout_s: float) -> ResponseT:
        """One attempt. Raises `grpc.aio.AioRpcError`, and `OutcomeUnknown` or `WireError` for an
        answer that does not parse."""
        method = self._methods.get(rpc.path)
        if method is None:
            # Bytes both ways: where a function of ours fails, gRPC sends or returns nothing.
            method = self._methods[rpc.path] = self._channel.unary_unary(
                rpc.path, request_serializer=None, response_deserializer=None)
        content = await method(request, timeout=timeout_s)
        try:
            return rpc.parse(content)
        except DecodeError:
            raise unparsed(self.address, write=rpc.write) from None

    async def why_unreachable(self) -> str:
        """The transport's reason (refused, wrong certificate), asked for with a harmless read."""
        try:
            await self.call(RAFT_STATUS, RAFT_STATUS.request().SerializeToString(),
                            PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return f"{self.address}: {error.details()}"
        except WireError as error:
            return str(error)
        return f"{self.address}: answers again"

    async def close(self) -> None:
        """Cancel what is under way and disconnect."""
        await self._channel.close(None)


class Pool:
    """The endpoints, and the one that is asked first: the last that answered."""

    def __init__(self, addresses: Sequence[str], tls: TlsFiles | None) -> None:
        unique = list(dict.fromkeys(addresses))
        if not unique:
            raise ConfigError("no endpoint is given",
                              remedy="give at least one host:port of a member")
        for address in unique:
            parse_address(address, "endpoints")
        claim_process()
        self._credentials = credentials_of(tls) if tls is not None else None
        self._endpoints = [Endpoint(address, self._credentials) for address in unique]
        self._learned: dict[str, Endpoint] = {}
        self._current = 0

    def __len__(self) -> int:
        return len(self._endpoints)

    def current(self) -> Endpoint:
        """The endpoint to ask now. Raises `ForkedProcess`."""
        claim_process()
        return self._endpoints[self._current]

    def advance(self, failed: Endpoint, *, unreachable: bool) -> None:
        """Ask the one after `failed` next, unless a concurrent call has moved on already.

        An unreachable one leaves the rotation if it was learned and not given.
        """
        current = self.current()
        if unreachable and failed in self._endpoints and failed.address in self._learned:
            self._current = self._endpoints.index(failed)
            self._endpoints.remove(failed)
            if current is not failed:
                self._current = self._endpoints.index(current)
            self._current %= len(self._endpoints)
        elif current is failed:
            self._current = (self._current + 1) % len(self._endpoints)

    def prefer(self, address: str) -> bool:
        """Ask `address`, the leader, next; False when it cannot be used.

        A leader outside the given list joins the rotation, so that a partial list is enough.
        """
        for index, endpoint in enumerate(self._endpoints):
            if endpoint.address == address:
                self._current = index
                return True
        learned = self._learned.get(address) or self._learn(address)
        if learned is None:
            return False
        self._endpoints.append(learned)
        self._current = len(self._endpoints) - 1
        return True

    def _learn(self, address: str) -> Endpoint | None:
        try:
            parse_address(address, "leader hint")
        except ConfigError:
            return None
        if len(self._learned) >= MAX_LEARNED_ENDPOINTS:
            return None
        self._learned[address] = Endpoint(address, self._credentials)
        return self._learned[address]

    async def unreachable(self) -> Unreachable:
        """The error that says why no endpoint could be reached, after `PROBE_TIMEOUT_S` at most."""
        reasons = await asyncio.gather(*(endpoint.why_unreachable()
                                         for endpoint in self._endpoints))
        return Unreachable("no member could be reached: " + "; ".join(reasons),
                           remedy="check the endpoints, that nodes run there, and the certificates")

    async def close(self) -> None:
        """Close every channel."""
        every = {*self._endpoints, *self._learned.values()}
        await asyncio.gather(*(endpoint.close() for endpoint in every))
