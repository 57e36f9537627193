"""A federation of real sites over the real link, and a coordinator that holds every key of a coordinator and cheats.

The sites are `foedus_client.daemon.Daemon`s, composed as in production but for the trainer (`KnownTrainer`), and reach
the coordinator over gRPC and TLS on loopback. The coordinator can send anything to anybody at any stage and keeps all
it sees. Sites of one organisation, the moles, are its own: it plays them with their real identity keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from foedus_client.config import SiteHome, SiteSettings
from foedus_client.daemon import Daemon
from foedus_client.policy import SitePolicy
from foedus_common.adapters import save_adapter
from foedus_common.allowance import Allowance
from foedus_common.clock import SystemClock
from foedus_common.errors import Reason, RemoteError
from foedus_common.identity import SignedPlan
from foedus_common.link.contents import body_of
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import AgreedPlan, SecureAggregation, schedule
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession, CoordinatorState
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import Arrived, Deadline, Effects, Send
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Outbox, SiteState
from foedus_common.protocol.thresholds import PeerRule, thresholds
from foedus_common.terms import protocol_roster, round_terms
from foedus_server.config import Link, Settings
from foedus_server.link.grid import LinkServer, SiteGrid
from foedus_server.members.registry import ApprovedSites
from foedus_server.rounds import STAGE_TYPES
from foedus_simulations.parties import free_ports, until
from known_sites import FIRST, SPEC, KnownDaemon, join_site, plan_of, submit
from opening import Exchange, Opened, open_transcript
from operators import Operator
from tiny_model import rows

CLOCK = SystemClock()
SECONDS = 60.0
HONEST = ("alpha", "bravo", "charlie", "delta")
VICTIM = "alpha"
MOLE = "mole"
MOLES = (MOLE, "mole-2", "mole-3", "mole-4")
"""All of one organisation."""
POLICY = SitePolicy(max_epsilon_per_day=1e6, max_epsilon_lifetime=1e6, require_approval=False)
COHORT = (*HONEST, MOLE)
"""n = 5 and c = 1: t = 4 and m_min = 3."""
LARGEST_COHORT = 6
"""What 128 is in a release: rounds of more sites are drawn here. Nothing that a coordinator can say changes it."""


class Refusals(logging.Handler):
    """The errors that sites' own logs name, newest last."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: list[Exception] = []

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        self.errors += [value for value in arguments if isinstance(value, Exception)]


class Federation:
    """The consortium: its operator's home, the sites' homes, the link, and a cheating coordinator on it."""

    def __init__(
        self,
        folder: Path,
        daemon: type[Daemon] = KnownDaemon,
        policy: SitePolicy = POLICY,
        data: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    ) -> None:
        """daemon: what a site is. policy: of every honest site; the victim names a peer besides.
        data: rows by site, for those that are not to have the usual ones."""
        port, enrolment = free_ports(2)
        self._smaller = patch.object(SecureAggregation, "size", property(_small))
        self._smaller.start()
        self.folder = folder
        self._daemon = daemon
        settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment))
        self.operator = Operator(folder / "operator", CLOCK, settings)
        self.moles = {
            name: join_site(self.operator, folder / name, name, CLOCK, rows(10), org="Mole Inc") for name in MOLES
        }
        for number, name in enumerate(HONEST):
            include = ("Organisation of bravo",) if name == VICTIM else ()
            settings = SiteSettings(threads=1, policy=dataclasses.replace(policy, must_include=include))
            SiteHome.create(folder / name, settings)
            join_site(self.operator, folder / name, name, CLOCK, (data or {}).get(name) or rows(30 + 10 * number))
        self.first_roster = self.operator.registry.roster()
        self.roster = self.operator.sign_roster()
        self.refusals = Refusals()
        logging.getLogger("foedus_client").addHandler(self.refusals)
        self.link = self._listen()
        self.sites: dict[str, Daemon] = {}
        for name in HONEST:
            self.start(name)

    def _listen(self) -> LinkServer:
        home = self.operator.home
        link = LinkServer(
            address=home.settings.listen_address,
            enrol_address=home.settings.enrolment_listen_address,
            tls=home.tls(os.urandom, CLOCK),
            directory=ApprovedSites(self.operator.store, CLOCK),
            objects=ObjectStore(home.objects),
            uploads=home.path / "uploads",
            enrol=self.operator.registry.enrol,
        )
        link.start()
        return link

    def start(self, name: str) -> None:
        """Raises LocalError where a site would not start."""
        self.sites[name] = self._daemon(SiteHome.open(self.folder / name), self.folder / "state", CLOCK, os.urandom)
        self.sites[name]._store.check_high_water()
        self.sites[name]._rounds._proposals = Allowance(CLOCK, 10_000, 1.0)  # many attacks in a minute
        self.sites[name].start()
        until(lambda: name in self.link.connected(), SECONDS, f"{name} to connect")

    def stop(self, name: str) -> None:
        self.sites.pop(name).stop()
        until(lambda: name not in self.link.connected(), SECONDS, f"{name} to hang up")

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)

    def close(self) -> None:
        for site in self.sites.values():
            site.stop()
        self.link.drain_and_stop(1.0)
        self.operator.close()
        self._smaller.stop()
        logging.getLogger("foedus_client").removeHandler(self.refusals)

    def known(self, name: str, run_id: int, round_: int) -> NDArray[np.int64]:
        """What a site's newest vector of a round is, int64 (d,) steps: the secret."""
        steps: NDArray[np.int64] = np.load(self.folder / name / f"run-{run_id}-round-{round_}.npy")
        return steps


def _small(plan: SecureAggregation) -> RoundSize:
    return RoundSize(plan.min_sites, plan.max_sites, LARGEST_COHORT)


class Cheat:
    """One run of a coordinator that cheats. Everything it sees is kept, and `opening` makes the most of it."""

    def __init__(
        self,
        federation: Federation,
        run_id: int,
        prepared: tuple[AgreedPlan, bytes] | None = None,
        **changes: Any,
    ) -> None:
        """prepared: the plan, and the first adapter that it names; left out, the usual plan for `KnownTrainer` with
        these changes."""
        self.federation, self.run_id = federation, run_id
        operator = federation.operator
        self.agreed, first = prepared or (
            submit(operator.home, operator.store, plan_of(2, **changes), run_id)[1],
            save_adapter(FIRST, SPEC),
        )
        self.signed = SignedPlan.sign(self.agreed, operator.home.plan_key())
        self.objects = ObjectStore(operator.home.objects)
        self.adapter = self.objects.put(first)
        self.grid: SiteGrid = federation.link.grid(run_id, 1 << 20)
        self.exchanges: list[Exchange] = []
        self.vectors: dict[bytes, bytes] = {}
        self.private_keys: list[bytes] = []
        """X25519 keys that the coordinator has: its own, and whatever its moles drew."""
        self._moles: dict[tuple[str, m.AttemptId], tuple[SiteSession, SiteState]] = {}

    # --- Asking ---

    def send(self, site: str, message_type: str, body: bytes) -> bytes | None:
        """The answer's bytes; None when the site's program refused the bytes altogether."""
        request = self.grid.message(site, message_type, body, ttl=SECONDS)
        (reply,) = self.grid.send_and_receive([request], timeout=SECONDS)
        return None if reply.has_error() else body_of(reply)

    def header(self, site: str, round_: int = 0, attempt: int = 0) -> wire.Header:
        return wire.Header(self.run_id, round_, attempt, self.agreed.digest(), wire.COORDINATOR, site, 0)

    def propose(self, site: str, signed_roster: bytes | None = None, signed: SignedPlan | None = None) -> m.FromSite:
        newest = self.federation.operator.registry.roster()
        assert newest is not None
        roster = self.objects.put(signed_roster or newest.to_bytes())
        self.grid.allow(roster, [site])
        plan = signed or self.signed
        message = m.Propose(plan.canonical, plan.signature, m.VectorRef(bytes.fromhex(roster.sha256), roster.size))
        return self._tell(site, "query.propose", wire.build_envelope(self.header(site), message))

    def invite(self, site: str, round_: int = 0, attempt: int = 0, **changes: Any) -> m.FromSite:
        """changes: to the Invite, for a lie."""
        self.grid.allow(self.adapter, [site])
        honest = m.Invite(
            self.signed.canonical,
            self.signed.signature,
            bytes.fromhex(self.agreed.plan.model.sha256),
            m.VectorRef(bytes.fromhex(self.adapter.sha256), self.adapter.size),
        )
        message = dataclasses.replace(honest, **changes)
        return self._tell(site, "train.invite", wire.build_envelope(self.header(site, round_, attempt), message))

    def _tell(self, site: str, message_type: str, request: bytes) -> m.FromSite:
        answer = self.send(site, message_type, request)
        assert answer is not None
        message = wire.parse_envelope(answer).message
        assert isinstance(message, m.Ready | m.Declined)
        return message

    def begin(self, round_: int = 0) -> None:
        """Every honest site has approved the plan and trained the round."""
        for site in HONEST:
            assert self.propose(site) == m.Ready()
            assert self.invite(site, round_) == m.Ready()

    # --- The moles ---

    def mole(self, name: str, config: m.RoundConfig) -> None:
        """Takes part in this attempt: an honest session, whose every secret the coordinator sees."""

        def random(size: int) -> bytes:
            drawn = os.urandom(size)
            if size == 32:
                self.private_keys.append(drawn)
            return drawn

        nothing = np.zeros(config.terms.layout.dimension)
        session = SiteSession(
            site=name,
            sign=self.federation.moles[name].key.sign,
            roster=protocol_roster(self.federation.roster),
            rule=PeerRule(),
            size=self.agreed.plan.secure_aggregation.size,
            outbox=Outbox(config.terms, self.store(config.terms.layout.encode(nothing, os.urandom)), charged=True),
            vectors=self,
            random=random,
        )
        self._moles[name, config.attempt_id] = (session, session.begin())

    def load(self, ref: m.VectorRef) -> Any:
        return np.frombuffer(bytearray(self.vectors[ref.digest]), dtype="<u8")

    def store(self, words: Any) -> m.VectorRef:
        data = words.tobytes()
        self.vectors[hashlib.sha256(data).digest()] = data
        return m.VectorRef(hashlib.sha256(data).digest(), len(data))

    # --- One exchange of D1 to A5 ---

    def exchange(self, site: str, request: bytes, message_type: str) -> bytes | None:
        """Sends a stage's request; gives the answer's envelope and keeps what can be learnt from it."""
        answer = self._ask_mole(site, request) if site in MOLES else self.send(site, message_type, request)
        if answer is not None:
            self.exchanges.append(Exchange(site, request, answer))
            said = wire.parse_envelope(answer).message
            if isinstance(said, m.MaskedInput) and site not in MOLES:
                upload = self.grid.upload(site, ObjectRef(said.vector.digest.hex(), said.vector.size))
                self.vectors[said.vector.digest] = upload.read_bytes()
        return answer

    def _ask_mole(self, name: str, request: bytes) -> bytes | None:
        asked = wire.parse_envelope(request)
        key = (name, asked.header.attempt_id)
        if isinstance(asked.message, m.RoundConfig):
            self.mole(name, asked.message)
        session, state = self._moles[key]
        state, effects = session.step(state, request)
        self._moles[key] = (session, state)
        return next((effect.envelope for effect in effects if isinstance(effect, Send)), None)

    def config(
        self, cohort: Iterable[str] = COHORT, round_: int = 0, attempt: int = 0, **changes: Any
    ) -> m.RoundConfig:
        """What an honest coordinator would say at A0, if it asked such a cohort; changes: to it, for a lie."""
        names = tuple(sorted(cohort))
        roster, colluding = protocol_roster(self.federation.roster), self.agreed.plan.secure_aggregation.colluding
        together = roster.together(set(names) & set(roster.members), colluding)
        limits = thresholds(len(names), colluding, min(together, len(names) - 2))
        honest = m.RoundConfig(
            protocol_version=m.PROTOCOL_VERSION,
            terms=round_terms(self.agreed, schedule(self.agreed.plan)[round_], self.adapter),
            attempt=attempt,
            roster_epoch=roster.epoch,
            roster_digest=roster.digest,
            cohort=names,
            threshold=limits.threshold,
            minimum=limits.minimum,
        )
        return dataclasses.replace(honest, **changes)

    def attempt(self, config: m.RoundConfig | None = None) -> Attempt:
        return Attempt(self, config or self.config())

    # --- What it all comes to ---

    def open(self, *also: Exchange, private_keys: Iterable[bytes] = ()) -> Opened:
        """The opening attack on all that was seen, and on what a test adds. Recovered vectors are the true ones."""
        opened = open_transcript([*self.exchanges, *also], self.vectors, [*self.private_keys, *private_keys])
        opened.vectors = {key: steps for key, steps in opened.vectors.items() if key[0] not in MOLES}
        for (site, round_), steps in opened.vectors.items():
            np.testing.assert_array_equal(steps, self.federation.known(site, self.run_id, round_))
        return opened

    def stage(self, site: str) -> Any:
        """What the site's session holds now; None when it has none of this run."""
        known = self.federation.sites[site]._rounds._sessions.get(self.run_id)
        return None if known is None else known[2].stage

    def close(self) -> None:
        """Sites keep few plans open, so each attack ends its run."""
        ended = m.RunEnded(m.End.FAILED)
        for site in set(HONEST) & set(self.federation.link.connected()):
            self.send(site, "query.end", wire.build_envelope(self.header(site), ended))
        self.grid.close()


class Attempt:
    """One attempt, honest as far as a test lets it be: `reach` plays on, `ask` says anything to anybody."""

    def __init__(self, cheat: Cheat, config: m.RoundConfig) -> None:
        self.cheat, self.config = cheat, config
        self._session = CoordinatorSession(config, protocol_roster(cheat.federation.roster), cheat)
        self.state: CoordinatorState
        self.state, effects = self._session.begin()
        self.requests = _requests(effects)

    @property
    def ctx(self) -> bytes:
        return self._session.ctx

    def request(self, site: str, sequence: int, message: m.ToSite, **header: Any) -> bytes:
        binding = self.ctx if sequence else self.config.terms.plan_digest
        base = wire.Header(*self.config.attempt_id, binding, wire.COORDINATOR, site, sequence)
        return wire.build_envelope(dataclasses.replace(base, **header), message)

    def ask(self, site: str, sequence: int, message: m.ToSite, **header: Any) -> m.FromSite:
        """The site's answer to anything."""
        answer = self.cheat.exchange(
            site, self.request(site, sequence, message, **header), STAGE_TYPES[min(sequence, 4)]
        )
        assert answer is not None
        return wire.parse_envelope(answer).message

    def reach(
        self, sequence: int, silent: Iterable[str] = (), tamper: Callable[[str, bytes], bytes] | None = None
    ) -> Mapping[str, m.ToSite]:
        """Plays honestly until the requests of this sequence are due, and gives them. silent: sites that are left out
        from now on. tamper: changes answers on their way into the honest coordinator's hands."""
        left_out = set(silent)
        while isinstance(self.state, Awaiting) and self.state.sequence < sequence:
            stage = self.state.sequence
            for site, request in self.requests.items():
                if site in left_out:
                    continue
                answer = self.cheat.exchange(site, request, STAGE_TYPES[stage])
                assert answer is not None
                self._deliver(Arrived(site, tamper(site, answer) if tamper else answer))
            self._deliver(Deadline(stage))
        return {site: wire.parse_envelope(request).message for site, request in self.requests.items()}

    def _deliver(self, event: Arrived | Deadline) -> None:
        self.state, effects = self._session.step(self.state, event)
        self.requests = _requests(effects) or self.requests


def _requests(effects: Effects) -> dict[str, bytes]:
    return {effect.destination: effect.envelope for effect in effects if isinstance(effect, Send)}


def reason_of(error: Exception | None) -> Reason | type[Exception] | None:
    return error.reason if isinstance(error, RemoteError) else type(error) if error else None
