"""Sites, their enrolment tokens, their certificates, and the rosters that the root signed. Each function is one
transaction. Who may join, and what is shown to whom, is decided in `registry`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from foedus_common.errors import LocalError
from foedus_server.store.database import Database
from foedus_server.store.rows import Certificate, Site, TokenUse
from foedus_server.store.schema import certificates, rosters, sites, tokens

_NO_WAITING_KEY = {"waiting_key": None, "waiting_request": None}


class Members:
    """Who is, was or may become a member."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def sites(self) -> list[Site]:
        """Sorted by name."""
        with self._database.reading() as connection:
            found = [Site(**row._mapping) for row in connection.execute(select(sites))]
        return sorted(found, key=lambda site: site.name)  # here: each database has an order of its own for text

    def site(self, name: str) -> Site | None:
        with self._database.reading() as connection:
            return _site(connection, name)

    # --- From invitation to revocation ---

    def add_token(self, secret_hash: bytes, name: str, org: str, expires_at: float) -> None:
        """A new token for the site, which is made if it is not there; older tokens for it are void from now on.

        An approved site stays approved with the key it has until the new one is approved.
        """
        now = self._database.clock.now()
        with self._database.writing("invite the site") as connection:
            _void_tokens(connection, name, now)
            row = {"secret_hash": secret_hash, "name": name, "org": org, "expires_at": expires_at}
            connection.execute(insert(tokens).values(row))
            site = _site(connection, name)
            if site is None:
                connection.execute(insert(sites).values(name=name, org=org, state="invited", invited_at=now))
            elif site.state == "approved":
                _change_site(connection, name, **_NO_WAITING_KEY)
            else:
                _change_site(connection, name, org=org, state="invited", invited_at=now, **_NO_WAITING_KEY)
            self._database.log(connection, "site.invited", site=name, org=org, expires_at=expires_at)

    def token(self, secret_hash: bytes) -> TokenUse | None:
        with self._database.reading() as connection:
            return _token(connection, secret_hash)

    def use_token(self, secret_hash: bytes, public_key: bytes, certificate_request: bytes) -> TokenUse | None:
        """Bind the token to these keys if it is unused, not void and not expired; gives it as it is afterwards."""
        now = self._database.clock.now()
        usable = (tokens.c.used_at.is_(None), tokens.c.voided_at.is_(None), tokens.c.expires_at >= now)
        with self._database.writing("enrol the site") as connection:
            bound = connection.execute(
                update(tokens)
                .where(tokens.c.secret_hash == secret_hash, *usable)
                .values(used_at=now, public_key=public_key, certificate_request=certificate_request)
            )
            token = _token(connection, secret_hash)
            if token is not None and bound.rowcount:
                _change_site(connection, token.name, waiting_key=public_key, waiting_request=certificate_request)
                first = (sites.c.name == token.name, sites.c.state == "invited")
                connection.execute(update(sites).where(*first).values(state="waiting"))
                self._database.log(connection, "site.enrolled", site=token.name, public_key=public_key.hex())
            return token

    def approve(self, name: str, public_key: bytes) -> None:
        """Make the waiting key the site's own. Certificates for an earlier key end with the first for this one.

        Raises:
            LocalError: this key does not wait at that site.
        """
        now = self._database.clock.now()
        with self._database.writing("approve the site") as connection:
            site = _site(connection, name)
            if site is None or site.waiting_key != public_key:
                raise LocalError(f"The site {name!r} does not wait for approval with that key; see `foedus site list`.")
            _change_site(
                connection,
                name,
                state="approved",
                public_key=site.waiting_key,
                certificate_request=site.waiting_request,
                approved_at=now,
                revoked_at=None,
                **_NO_WAITING_KEY,
            )
            self._database.log(connection, "site.approved", site=name, public_key=public_key.hex())

    def revoke(self, name: str) -> None:
        """End the site's certificates, tokens and waiting key. Raises LocalError when there is no such site."""
        now = self._database.clock.now()
        with self._database.writing("revoke the site") as connection:
            if _site(connection, name) is None:
                raise LocalError(f"There is no site {name!r}; see `foedus site list`.")
            _change_site(connection, name, state="revoked", revoked_at=now, **_NO_WAITING_KEY)
            _void_tokens(connection, name, now)
            _retire_certificates(connection, name, now)
            self._database.log(connection, "site.revoked", site=name)

    # --- Certificates ---

    def add_certificate(self, certificate: Certificate, public_key: bytes, ending: Sequence[bytes] = ()) -> bool:
        """Accept it from now on; False where the site is not, or no longer, approved with that identity key.

        ending: SHA-256 of certificates that end with that.
        """
        now = self._database.clock.now()
        with self._database.writing("add a certificate") as connection:
            site = _site(connection, certificate.site)
            if site is None or (site.state, site.public_key) != ("approved", public_key):
                return False
            connection.execute(insert(certificates).values(dataclasses.asdict(certificate)))
            ended = update(certificates).where(certificates.c.sha256.in_(ending))
            connection.execute(ended.values(retired_at=now))
            digest = certificate.sha256.hex()
            self._database.log(connection, "certificate.issued", site=certificate.site, sha256=digest)
            return True

    def certificates(self) -> list[Certificate]:
        """Those that were not ended by a new approval or a revocation, the longest valid first."""
        columns = [certificates.c[column.name] for column in dataclasses.fields(Certificate)]
        query = select(*columns).where(certificates.c.retired_at.is_(None)).order_by(certificates.c.not_after.desc())
        with self._database.reading() as connection:
            return [Certificate(**row._mapping) for row in connection.execute(query)]

    def certificate_ends(self) -> dict[str, float]:
        """By site: when the last of its certificates ends, Unix seconds."""
        ends = select(certificates.c.site, func.max(certificates.c.not_after)).group_by(certificates.c.site)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(ends.where(certificates.c.retired_at.is_(None)))}

    # --- Rosters ---

    def add_roster(self, epoch: int, signed: bytes) -> None:
        """Raises LocalError unless the epoch is the one after the newest."""
        with self._database.writing("install the roster") as connection:
            newest = connection.execute(select(func.max(rosters.c.epoch))).scalar() or 0
            if epoch != newest + 1:
                raise LocalError(
                    f"The roster is of epoch {epoch}, but {newest + 1} comes next; draft and sign it anew."
                )
            connection.execute(insert(rosters).values(epoch=epoch, signed=signed))
            self._database.log(connection, "roster.installed", epoch=epoch)

    def roster(self) -> tuple[int, bytes] | None:
        """Epoch and signed bytes of the newest roster."""
        with self._database.reading() as connection:
            row = connection.execute(select(rosters).order_by(rosters.c.epoch.desc()).limit(1)).one_or_none()
        return None if row is None else (row.epoch, row.signed)


def _site(connection: Connection, name: str) -> Site | None:
    row = connection.execute(select(sites).where(sites.c.name == name)).one_or_none()
    return None if row is None else Site(**row._mapping)


def _token(connection: Connection, secret_hash: bytes) -> TokenUse | None:
    row = connection.execute(select(tokens).where(tokens.c.secret_hash == secret_hash)).one_or_none()
    return None if row is None else TokenUse(**row._mapping)


def _change_site(connection: Connection, name: str, **values: Any) -> None:
    connection.execute(update(sites).where(sites.c.name == name).values(values))


def _void_tokens(connection: Connection, name: str, now: float) -> None:
    connection.execute(update(tokens).where(tokens.c.name == name, tokens.c.voided_at.is_(None)).values(voided_at=now))


def _retire_certificates(connection: Connection, name: str, now: float) -> None:
    current = (certificates.c.site == name, certificates.c.retired_at.is_(None))
    connection.execute(update(certificates).where(*current).values(retired_at=now))
