"""Sites as processes of their own, linked to a coordinator in this one over mTLS on loopback."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flwr.clientapp import ClientApp

from foedus_client.link.site_link import SiteLink
from foedus_common.link.contents import context_of
from foedus_common.link.transport import TlsIdentity
from foedus_common.objects import ObjectStore
from foedus_server.link.grid import LinkServer
from loopback import Federation, body, reply_with

__all__ = ["body", "connected_sites", "reply_with"]

MakeApp = Callable[[SiteLink, ObjectStore], ClientApp]


@contextmanager
def connected_sites(names: list[str], make_app: MakeApp) -> Iterator[tuple[Federation, LinkServer]]:
    """A coordinator and one process for each site, all connected; `make_app` is a module's function."""
    spawn = multiprocessing.get_context("spawn")  # never fork while gRPC is active
    over = spawn.Event()
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        server = federation.coordinator()
        grid = server.grid(1, 0)
        processes = [
            spawn.Process(
                target=_site,
                args=(name, server.address, federation.tls_of(name), Path(folder) / name, make_app, over),
            )
            for name in names
        ]
        try:
            for process in processes:
                process.start()
            while len(server.connected()) < len(names):
                grid.wait(1.0)
            yield federation, server
        finally:
            over.set()
            for process in processes:
                process.join()
            federation.close()


def _site(name: str, address: str, tls: TlsIdentity, folder: Path, make_app: MakeApp, over: Event) -> None:
    objects = ObjectStore(folder)
    link = SiteLink(site=name, address=address, tls=tls, objects=objects)
    link.start(make_app(link, objects), context_of)
    over.wait()
    link.stop()
