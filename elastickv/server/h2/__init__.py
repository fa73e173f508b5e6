"""A gRPC front of its own: HTTP/2 over `asyncio.Protocol`, for what grpc.aio cannot reach.

`wire` writes frames and takes their payloads apart, `reading` cuts what arrives into frames, `head`
reads a request's headers, `messages` takes gRPC messages out of a stream, `sending` keeps the
peer's windows, `budget` is the patience with a peer, `connection` is the protocol, `front` the
listener. HPACK decoding is the `hpack` library's.
"""
