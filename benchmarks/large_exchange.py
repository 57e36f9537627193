"""64 MiB down to and up from each of two sites at once, by reference, over mTLS on loopback.

`python benchmarks/large_exchange.py`: seconds, and by how much resident memory grows at its peak, at the coordinator
and at a site.
"""

from __future__ import annotations

import hashlib
import os
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from foedus_client.link.site_link import SiteLink
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_server.link.grid import body_of
from report import report
from resident import begin_anew, memory
from sites import body, connected_sites, reply_with

SIZE = 64 << 20
SITES = ["alpha", "beta"]
REPEATS = 5
RUN = 2


def exchanging(link: SiteLink, objects: ObjectStore) -> ClientApp:
    """An app that downloads what it is told to, and uploads as much of its own."""
    app = ClientApp()

    @app.query("prepare")
    def prepare(message: Message, context: Context) -> Message:
        return reply_with(objects.put(os.urandom(SIZE)).sha256.encode(), message)

    @app.query("exchange")
    def exchange(message: Message, context: Context) -> Message:
        down, up = body(message).decode().split()
        before = begin_anew()
        link.fetch(RUN, ObjectRef(down, SIZE))
        link.push(RUN, ObjectRef(up, SIZE))
        return reply_with(str(memory("VmHWM") - before).encode(), message)

    return app


def main() -> bool:
    seconds, growth, at_sites = [], [], []
    with connected_sites(SITES, exchanging) as (federation, server):
        grid = server.grid(RUN, SIZE)
        for _ in range(REPEATS):
            ref = random_object(federation.objects)
            grid.allow(ref, SITES)
            prepared = grid.send_and_receive([grid.message(site, "query.prepare", b"", ttl=60.0) for site in SITES])
            uploads = {grid.site(reply.metadata.src_node_id): body_of(reply).decode() for reply in prepared}
            before, start = begin_anew(), time.perf_counter()
            questions = [
                grid.message(site, "query.exchange", f"{ref.sha256} {up}".encode(), ttl=60.0)
                for site, up in uploads.items()
            ]
            replies = grid.send_and_receive(questions)
            seconds.append(time.perf_counter() - start)
            growth.append(memory("VmHWM") - before)
            assert not any(reply.has_error() for reply in replies)
            at_sites += [float(body_of(reply)) for reply in replies]
            assert all(grid.upload(site, ObjectRef(up, SIZE)).exists() for site, up in uploads.items())
            grid.clear_uploads()
    print("seconds", [round(value, 2) for value in seconds], "MB", [round(value) for value in growth], end=" ")
    print("at sites", [round(value) for value in at_sites])
    claim = "64 MiB down and up at each of 2 sites over mTLS"
    quick = report("large_exchange_seconds", f"{claim}, best of {REPEATS}", min(seconds), 1.5, "s", at_least=False)
    small = report(
        "large_exchange_memory", f"{claim}: growth of the coordinator, worst", max(growth), 150, "MB", at_least=False
    )
    modest = report(
        "large_exchange_site_memory", f"{claim}: growth of a site, worst", max(at_sites), 150, "MB", at_least=False
    )
    return quick and small and modest


def random_object(objects: ObjectStore) -> ObjectRef:
    """An object that was never whole in memory: what is freed before the measurement would hide growth in it."""
    chunk, digest = os.urandom(1 << 20), hashlib.sha256()
    for _ in range(SIZE >> 20):
        digest.update(chunk)
    ref = ObjectRef(digest.hexdigest(), SIZE)
    with objects.receive(ref) as partial:
        for _ in range(SIZE >> 20):
            partial.append(chunk)
        partial.finish()
    return ref


if __name__ == "__main__":
    raise SystemExit(not main())
