"""A forward proxy on loopback: answers CONNECT (RFC 9110, section 9.3.6), then carries bytes both ways and counts."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class ConnectProxy:
    """Listens until closed. `asked` holds the address and the Proxy-Authorization of every CONNECT."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listening]
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked: list[tuple[str, str]] = []
        self.refuses = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listening.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.append(client)
        with suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (received := client.recv(4096)):
                    return client.close()  # or this thread would ask on for as long as the tests run
                head += received
            request, *fields = head.decode().split("\r\n")
            method, target, _ = request.split()
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            self.asked.append((target, headers.get("proxy-authorization", "")))
            if method != "CONNECT" or self.refuses:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return client.close()
            host, _, port = target.rpartition(":")
            server = socket.create_connection((host, int(port)))
            self._open.append(server)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            threading.Thread(target=_carry, args=(client, server), daemon=True).start()
            _carry(server, client)


def _carry(source: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
