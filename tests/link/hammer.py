"""`make hammer`: strangers shake hands with a coordinator as fast as they can while its certificate changes on and on.

With gRPC's dynamic credentials the process ended by a segmentation fault in most runs of ten seconds. Strangers are a
process of their own, so that they wait for no lock of the coordinator's. `--seconds N` for another length.
"""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import multiprocessing
import socket
import ssl
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from cryptography import x509

from loopback import Federation

THREADS = 8
APART_SECONDS = 0.001


def shake_hands(address: str, seconds: float, made: object) -> None:
    """As often as time allows; puts into `made` how often it went well, and how often the connection was reset."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    trusting.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    ends, counts = time.monotonic() + seconds, [0, 0]

    def repeat() -> None:
        while time.monotonic() < ends:
            counts[1] += 1
            with (
                suppress(OSError),
                socket.create_connection((host, int(port)), timeout=5) as plain,
                trusting.wrap_socket(plain),
            ):
                counts[0] += 1
                counts[1] -= 1

    threads = [threading.Thread(target=repeat) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.put(tuple(counts))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    apart = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        server, made = federation.coordinator(), apart.Queue()
        here = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        identities = itertools.cycle([federation.authority.issue(here, federation.authority.certificate) for _ in "ab"])
        strangers = apart.Process(target=shake_hands, args=(server.enrol_address, seconds, made))
        strangers.start()
        changes = 0
        while strangers.is_alive() and made.empty():
            server.show(next(identities))
            changes += 1
            time.sleep(APART_SECONDS)
        well, reset = made.get()
        strangers.join()
        federation.close()
    print(f"{well} handshakes, {changes} changes of the certificate, {reset} connections reset between two servers.")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
