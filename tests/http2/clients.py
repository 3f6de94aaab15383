"""Tests a server with grpcio and h2. Fails with an error, or prints "all as expected". The messages are encoded by hand,
because only the transport is tested."""

import socket
import sys
import threading

import grpc
import h2.config
import h2.connection
import h2.events

address = sys.argv[1]


def field(number, value):
    """A protobuf field: bytes or a small number."""
    if isinstance(value, bytes):
        length, out = len(value), b""
        while length > 127:
            out, length = out + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + out + bytes([length]) + value
    return bytes([number << 3, value])


def raw(channel, kind, path):
    return getattr(channel, kind)(path, request_serializer=None, response_deserializer=None)


def check_grpcio(options):
    with grpc.insecure_channel(address, options=options) as channel:
        put = raw(channel, "unary_unary", "/etcdserverpb.KV/Put")
        get = raw(channel, "unary_unary", "/etcdserverpb.KV/Range")
        large = b"x" * 1_000_000
        put(field(1, b"key") + field(2, large))
        assert large in get(field(1, b"key"), timeout=5)

        calls = [get.future(field(1, b"key") + field(8, 1)) for _ in range(500)]  # keys_only
        assert all(b"key" in call.result() for call in calls)

        try:
            get(b"")
            raise AssertionError("an empty key was taken")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
            assert error.details() == "etcdserver: key is not provided", error

        try:
            raw(channel, "unary_unary", "/unknown.Service/Method")(b"")
            raise AssertionError("an unknown method was answered")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error

        health = raw(channel, "unary_unary", "/grpc.health.v1.Health/Check")
        assert health(b"") == field(1, 1)

        requests, done = [field(1, field(1, b"watched"))], threading.Event()
        watch = raw(channel, "stream_stream", "/etcdserverpb.Watch/Watch")
        answers = watch(iter_then_wait(requests, done))
        assert b"\x18\x01" in next(answers)  # created
        put(field(1, b"watched") + field(2, b"seen"))
        assert b"seen" in next(answers)
        done.set()
        answers.cancel()


def iter_then_wait(requests, until):
    yield from requests
    until.wait(30)


def check_h2():
    """h2 is a strict parser: it raises an exception if the server violates the protocol."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as stream:
        connection.initiate_connection()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", "/etcdserverpb.KV/Range"), (":authority", address)]
        headers += [("content-type", "application/grpc"), ("te", "trailers")]
        request = field(1, b"key") + field(8, 1)
        for nth in range(100):
            connection.send_headers(2 * nth + 1, headers)
            connection.send_data(2 * nth + 1, b"\0" + len(request).to_bytes(4, "big") + request, end_stream=True)
        stream.sendall(connection.data_to_send())
        ended, trailers = 0, 0
        while ended < 100:
            data = stream.recv(65536)
            assert data, "the server closed the connection"
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if isinstance(event, h2.events.TrailersReceived):
                    trailers += dict(event.headers)["grpc-status"] == "0"
                ended += isinstance(event, h2.events.StreamEnded)
            stream.sendall(connection.data_to_send())
        assert trailers == 100, trailers


check_grpcio([])
check_grpcio([("grpc.default_compression_algorithm", grpc.Compression.Gzip)])
check_h2()
print("all as expected")
