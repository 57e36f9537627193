"""Trust over the wire: a site joins through the enrolment port, gets onto the link with what it was given, and off it
when it is revoked. Real TLS, real home, real registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography.x509 import IPAddress

from foedus_client.config import SiteHome, SiteSettings
from foedus_client.enrol import join
from foedus_client.link import site_link as link_client
from foedus_client.link.site_link import LinkState, SiteLink
from foedus_common.clock import SystemClock
from foedus_common.enrolment import decode_token
from foedus_common.errors import LocalError
from foedus_common.link.contents import context_of
from foedus_common.link.transport import TlsIdentity
from foedus_common.objects import ObjectStore
from foedus_common.private_files import create_private
from foedus_server.config import Link
from foedus_server.link.grid import LinkServer
from foedus_server.members.registry import ApprovedSites
from loopback import Authority as LoopbackAuthority
from loopback import Federation, States, echo
from operators import Operator


class Coordinator:
    """An operator's home with its link up."""

    def __init__(self, folder: Path) -> None:
        self.operator = Operator(folder, SystemClock())
        self.objects = ObjectStore(self.operator.home.objects)
        self.server = LinkServer(
            address="127.0.0.1:0",
            enrol_address="127.0.0.1:0",
            tls=self.operator.home.tls(self.operator.random, self.operator.clock),
            directory=ApprovedSites(self.operator.store, self.operator.clock),
            objects=self.objects,
            uploads=folder / "uploads",
            enrol=self.operator.registry.enrol,
        )
        self.server.start()

    def call(self, authority: bytes) -> Callable[[bytes], bytes]:
        return lambda body: link_client.enrol(self.server.enrol_address, authority, body)

    def approve(self, public_key: bytes) -> None:
        self.operator.registry.approve("north", public_key)
        self.operator.sign_roster()

    def close(self) -> None:
        self.server.drain_and_stop(1.0)
        self.operator.close()


@pytest.fixture
def coordinator(tmp_path: Path):
    coordinator = Coordinator(tmp_path / "operator")
    yield coordinator
    coordinator.close()


def test_a_site_joins_connects_and_is_revoked(coordinator: Coordinator, tmp_path: Path) -> None:
    operator, home = coordinator.operator, tmp_path / "north"
    home.mkdir(mode=0o700)
    token = decode_token(operator.registry.invite("north", "Nordklinik").encode())
    call = coordinator.call(token.authority_pem)
    membership = join(home, token, call, coordinator.approve, random=operator.random, clock=operator.clock)

    states = States()
    site = SiteLink(
        site=membership.name,
        address=coordinator.server.address,
        tls=membership.tls(),
        objects=ObjectStore(home / "objects"),
        on_state=states,
    )
    site.start(echo(), context_of)
    try:
        states.wait_for(LinkState.CONNECTED)
        assert list(coordinator.server.connected()) == ["north"]
        operator.registry.revoke("north")
        states.wait_for(LinkState.REFUSED)
        assert list(coordinator.server.connected()) == []
    finally:
        site.stop()


@pytest.mark.parametrize("named", [True, False])
def test_a_certificate_of_somebody_else_s_authority_counts_where_the_site_names_it(tmp_path: Path, named: bool) -> None:
    """The coordinator shows a certificate of the company's own authority (docs/decisions/0016)."""
    operator, company = Operator(tmp_path / "operator", SystemClock()), LoopbackAuthority("company")
    shown = company.issue([IPAddress(ip_address("127.0.0.1"))], b"")
    for name, content in {"up.crt": shown.certificate, "up.key": shown.private_key}.items():
        create_private(tmp_path / name, content)
    link = Link(certificate=str(tmp_path / "up.crt"), certificate_key=str(tmp_path / "up.key"))
    home = replace(operator.home, settings=replace(operator.home.settings, link=link))
    federation = Federation(tmp_path)
    federation.server_tls = home.tls(operator.random, operator.clock)
    federation.coordinator()

    bundle = tmp_path / "company.pem"
    bundle.write_bytes(company.certificate)
    site = SiteHome.create(tmp_path / "north", SiteSettings(authorities=str(bundle) if named else ""))
    trusted = site.trusting(TlsIdentity(b"", b"", operator.registry.invite("north", "North").authority_pem)).authority
    try:
        if named:
            assert link_client.enrol(federation.enrol_address, trusted, b"body") == b"body"
        else:
            with pytest.raises(LocalError, match="that this site's authority did not sign"):
                link_client.enrol(federation.enrol_address, trusted, b"body")
    finally:
        federation.close()
        operator.close()


def test_a_site_does_not_enrol_with_a_coordinator_of_another_authority(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    stranger = Operator(tmp_path / "stranger", SystemClock())
    token = stranger.registry.invite("north", "Nordklinik")
    call = coordinator.call(token.authority_pem)
    with pytest.raises(LocalError, match="certificate"):
        join(tmp_path, token, call, coordinator.approve, random=stranger.random, clock=stranger.clock)
    assert coordinator.operator.events() == []
    stranger.close()
