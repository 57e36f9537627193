"""What a coordinator may send in place of a plan, a roster, an invitation or an adapter: each is declined without a
word, nothing is charged, no data is opened, and nothing of it stays or is executed.

The coordinator here holds its own keys and signs whatever it likes.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foedus_client import round as site_round
from foedus_client.approval import Approval
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.round import MAX_ATTEMPTS, ObjectVectors, Site, SiteRounds
from foedus_client.storage import sweep
from foedus_client.store import SiteStore
from foedus_common.adapters import save_adapter
from foedus_common.canonical import digest, labelled, sha256_hex
from foedus_common.checkpoints import statement
from foedus_common.clock import DAY, ManualClock
from foedus_common.errors import LocalError, Reason
from foedus_common.identity import MAX_ROSTER_BYTES, SignedRoster, generate_key
from foedus_common.journal import Checkpoint, next_entry
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import MAX_PLAN_BYTES, AgreedPlan, RoundPlan, schedule
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.effects import AttemptSeen, VectorMasked
from foedus_common.terms import round_terms
from foedus_server.audit import notary
from known_sites import FIRST, SPEC, join_site, plan_of, submit
from operators import Operator
from seeded import seeded
from tiny_model import LABELS, rows

RUN = 7


class Harm:
    """Unpickled, it leaves a file."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.at,)


class Coordinator:
    """Offers objects that need not be what their references say (`foedus_client.round.Courier`)."""

    def __init__(self, objects: ObjectStore) -> None:
        self.offered: dict[str, bytes] = {}
        self._objects = objects

    def offer(self, data: bytes, named: str = "", size: int = 0) -> m.VectorRef:
        sha256 = named or sha256_hex(data)
        self.offered[sha256] = data
        return m.VectorRef(bytes.fromhex(sha256), size or len(data))

    def fetch(self, run_id: int, ref: ObjectRef) -> Path:
        with self._objects.receive(ref) as partial:
            partial.append(self.offered[ref.sha256])
            return partial.finish()

    def push(self, run_id: int, ref: ObjectRef) -> None:
        raise AssertionError("nothing leaves")


class Untouched:
    """A trainer that must not be reached (`foedus_client.round.Trainer`)."""

    def open(self) -> None:
        raise AssertionError("the data was about to be opened")

    def train(self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan) -> NDArray[np.float64]:
        raise AssertionError("the data was opened")

    def stop(self) -> None:
        """Nothing runs."""


class World:
    """One site, a plan that its coordinator has agreed, and what the site has on disk."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.clock = folder, ManualClock()
        self.operator = Operator(folder / "operator", self.clock)
        home = folder / "north"
        member = join_site(self.operator, home, "north", self.clock, rows())
        _, self.agreed = submit(self.operator.home, self.operator.store, plan_of(rounds=2, **changes), RUN)
        self.objects = ObjectStore(home / "objects")
        self.coordinator = Coordinator(self.objects)
        self.store = SiteStore(home / "site.db", self.clock)
        self.ledger = Ledger(self.store, self.clock, member.key.sign, member.public_key)
        self.policy = SitePolicy(require_approval=False)
        self.site = Site(
            member=member,
            policy=self.policy,
            store=self.store,
            ledger=self.ledger,
            objects=self.objects,
            courier=self.coordinator,
            open_trainer=lambda agreed: Untouched(),
            clock=self.clock,
            random=seeded("site"),
        )
        self.rounds = SiteRounds(self.site)
        signed = self.operator.registry.roster()
        assert signed is not None
        self.roster = signed.to_bytes()
        self.harm = folder / "harm"

    def propose(self, canonical: bytes | None = None, **changes: Any) -> m.FromSite:
        """The site's answer to a proposal; right in all but `canonical` and the changed fields."""
        plan = self.agreed.canonical() if canonical is None else canonical
        signature = self.operator.home.plan_key().sign(labelled("signed-plan", plan))
        fields = {"plan": plan, "plan_signature": signature, **changes}
        fields.setdefault("roster", self.coordinator.offer(self.roster))
        return self._ask(self.rounds.propose, digest("plan", plan), m.Propose(**fields))

    def invite(self, round_index: int = 0, **changes: Any) -> m.FromSite:
        """The site's answer to an invitation to a round of the approved plan."""
        plan = self.agreed.canonical()
        fields = {
            "plan": plan,
            "plan_signature": self.operator.home.plan_key().sign(labelled("signed-plan", plan)),
            "base_model_hash": bytes.fromhex(self.agreed.plan.model.sha256),
            **changes,
        }
        fields.setdefault("adapter", self.coordinator.offer(save_adapter(FIRST, SPEC)))
        return self._ask(self.rounds.invite, self.agreed.digest(), m.Invite(**fields), round_index)

    def shown_head(self) -> m.JournalHead:
        """The head of its journal that the site shows."""
        at = Checkpoint(1, bytes(32))
        own = m.JournalHead(at.number, at.head, self.operator.home.plan_key().sign(statement(wire.COORDINATOR, at)))
        answer = self._ask(self.rounds.journal, self.agreed.digest(), m.JournalHeads(own, ()))
        assert isinstance(answer, m.JournalHeads)
        return answer.own

    def end(self, how: m.End, run_id: int = RUN) -> None:
        assert self._ask(self.rounds.end, self.agreed.digest(), m.RunEnded(how), run_id=run_id) == m.Ready()

    def propose_run(self, run_id: int) -> m.FromSite:
        """Another run of the same plan."""
        agreed = replace(self.agreed, run_id=run_id)
        plan = agreed.canonical()
        signature = self.operator.home.plan_key().sign(labelled("signed-plan", plan))
        message = m.Propose(plan, signature, self.coordinator.offer(self.roster))
        return self._ask(self.rounds.propose, agreed.digest(), message, run_id=run_id)

    def _ask(
        self,
        stage: Callable[[bytes], bytes],
        binding: bytes,
        message: m.ToSite,
        round_index: int = 0,
        run_id: int = RUN,
    ) -> m.FromSite:
        header = wire.Header(run_id, round_index, 0, binding, wire.COORDINATOR, "north", sequence=0)
        answer = wire.parse_envelope(stage(wire.build_envelope(header, message)))
        return answer.message  # type: ignore[return-value]

    def altered(self, *path: str, value: Any) -> bytes:
        """The agreed plan's canonical bytes with one value set."""
        table = json.loads(self.agreed.canonical())
        inner = table
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def approve(self) -> AgreedPlan:
        assert isinstance(self.propose(), m.Ready)
        return self.agreed

    def kept(self) -> set[str]:
        return {path.name for path in self.objects.path(ObjectRef("0" * 64, 1)).parent.rglob("*") if path.is_file()}

    def close(self) -> None:
        self.store.close()
        self.operator.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


Sent = Callable[[World], m.FromSite]

PLANS: dict[str, tuple[Sent, str]] = {
    "a pickle": (lambda w: w.propose(pickle.dumps(Harm(w.harm))), "not canonical JSON"),
    "code beside the task": (lambda w: w.propose(w.altered("plan", "task", "auto_map", value={})), "auto_map"),
    "code of the model": (lambda w: w.propose(w.altered("plan", "model", "trust_remote_code", value=True)), "unknown"),
    "an import as a task": (
        lambda w: w.propose(w.altered("plan", "task", "kind", value="os:system")),
        "must be one of",
    ),
    "a path as a hash": (lambda w: w.propose(w.altered("plan", "model", "sha256", value="../../model")), "64 hex"),
    "a path as a name": (lambda w: w.propose(w.altered("plan", "run", "name", value="../../run")), "must be named"),
    "a path as data": (lambda w: w.propose(w.altered("plan", "data", "name", value="../rows.csv")), "no dataset"),
    "a terminal's commands": (lambda w: w.propose(w.altered("plan", "run", "purpose", value="\x1b[2J")), "printable"),
    "no number": (lambda w: w.propose(w.altered("plan", "privacy", "clip", value=float("nan"))), "BAD_MESSAGE"),
    "infinity": (lambda w: w.propose(w.altered("plan", "privacy", "clip", value=float("inf"))), "BAD_MESSAGE"),
    "another trainer": (lambda w: w.propose(w.altered("trainer_version", value="theirs/1")), "asks for theirs/1"),
    "too long": (lambda w: w.propose(b" " * (MAX_PLAN_BYTES + 1)), "at most"),
    "too deep": (lambda w: w.propose(b"[" * MAX_PLAN_BYTES), "not canonical JSON"),
    "two readings": (lambda w: w.propose(w.agreed.canonical()[:-1] + b',"run_id":7}'), "not the canonical form"),
    "another plan than is named": (lambda w: w.propose(replace(w.agreed, run_id=8).canonical()), "names another plan"),
    "signed by somebody else": (lambda w: w.propose(plan_signature=bytes(64)), "BAD_SIGNATURE"),
    "a roster of another root": (
        lambda w: w.propose(roster=w.coordinator.offer(forged_roster(w))),
        "BAD_SIGNATURE",
    ),
    "a roster that is none": (lambda w: w.propose(roster=w.coordinator.offer(pickle.dumps(Harm(w.harm)))), "BAD_"),
    "a roster of other bytes": (
        lambda w: w.propose(roster=w.coordinator.offer(w.roster, named="a" * 64)),
        "do not match its size and SHA-256",
    ),
    "a roster of gigabytes": (
        lambda w: w.propose(roster=m.VectorRef(bytes(32), MAX_ROSTER_BYTES + 65)),
        "too long",
    ),
}


def forged_roster(world: World) -> bytes:
    return SignedRoster.sign(world.operator.registry.draft_roster(), generate_key(seeded("other root"))).to_bytes()


@pytest.mark.parametrize("case", PLANS)
def test_a_proposal_that_is_not_a_plan_is_declined(world: World, case: str, caplog: pytest.LogCaptureFixture) -> None:
    send, sentence = PLANS[case]
    before, kept = world.store.ledger_end(), world.kept()
    with caplog.at_level(logging.WARNING):
        assert send(world) == m.Declined()
    assert sentence in caplog.text
    assert world.store.ledger_end() == before
    assert all(plan.state in ("declined", "pending") for plan in world.store.plans())
    assert world.kept() - kept <= {sha256_hex(world.roster)}
    assert not world.harm.exists()


INVITATIONS: dict[str, tuple[Sent, str]] = {
    "another plan": (
        lambda w: w.invite(plan=replace(w.agreed, trainer_version="x/1").canonical()),
        "another plan than",
    ),
    "another model": (lambda w: w.invite(base_model_hash=bytes(32)), "another base model"),
    "a round too many": (lambda w: w.invite(round_index=2), "no such round"),
    "another first adapter": (lambda w: w.invite(adapter=w.coordinator.offer(b"other")), "the plan's first adapter"),
    "other bytes": (lambda w: w.invite(1, adapter=w.coordinator.offer(b"x" * 9, "a" * 64)), "do not match its size"),
    "more bytes than announced": (
        lambda w: w.invite(1, adapter=w.coordinator.offer(b"x" * 10_000, "a" * 64, size=9)),
        "longer than was announced",
    ),
}


@pytest.mark.parametrize("case", INVITATIONS)
def test_an_invitation_to_something_else_is_declined(world: World, case: str, caplog: pytest.LogCaptureFixture) -> None:
    send, sentence = INVITATIONS[case]
    world.approve()
    before, kept = world.store.ledger_end(), world.kept()
    with caplog.at_level(logging.WARNING):
        assert send(world) == m.Declined()
    assert sentence in caplog.text
    assert (world.store.ledger_end(), world.kept()) == (before, kept)


def test_an_approval_that_ended_declines_the_round_and_says_so_here_only(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    agreed, roster = world.approve(), world.site.member.roster(world.clock.now())
    approval = Approval("north", roster, world.policy, world.store, world.ledger)
    approval.approve(agreed.digest(), by="ada", expires_at=world.clock.now() + 60)
    world.clock.advance(61)
    before = world.store.ledger_end()
    with caplog.at_level(logging.WARNING):
        assert world.invite() == m.Declined()
    assert "The approval of run 7 by ada ended on" in caplog.text
    assert world.store.ledger_end() == before


def test_a_run_that_is_stopped_and_proposed_again_does_not_get_rid_of_what_a_person_said(world: World) -> None:
    """Policy would approve it without end or cap; a person has set both, so a person is asked."""
    agreed, roster = world.approve(), world.site.member.roster(world.clock.now())
    approval = Approval("north", roster, world.policy, world.store, world.ledger)
    approval.approve(agreed.digest(), by="ada", expires_at=world.clock.now() + 60, epsilon_cap=0.5)
    world.end(m.End.STOPPED)
    world.site.stopping.set()  # or the answer would wait for the person
    assert world.propose() == m.Declined()
    (plan,) = world.store.plans()
    assert plan.state == "pending"
    consent = world.ledger.run(RUN).consent
    assert consent is not None
    assert (consent.by, consent.epsilon_cap) == ("ada", 0.5)


def test_a_run_does_not_end_under_another_s_number(world: World) -> None:
    """Its plan would be over, and what it reserved would stay reserved for good."""
    agreed = world.approve()
    for run_id, state, held in ((RUN + 1, "approved", True), (RUN, "finished", False)):
        world.end(m.End.FINISHED, run_id)
        stored = world.store.plan(agreed.digest())
        assert stored is not None
        assert (stored.state, world.ledger.run(RUN).open) == (state, held)


def test_no_head_of_the_journal_confirms_a_guess_of_why_a_plan_was_declined(world: World) -> None:
    """The coordinator sees a head, has one plan declined, sees the next head, and tries out every reason and moment."""
    world.approve()
    before = world.shown_head()
    assert world.invite(5) == m.Declined()
    after, now = world.shown_head(), world.clock.now()
    said = {"run": str(RUN), "round": 5, "attempt": 0, "count": 1}
    kinds = [*(reason.value for reason in Reason), "LocalError", "PolicyRefusal"]
    guesses = {
        next_entry(Checkpoint(before.number, before.head), now, "round.refused", said | {"reason": kind}).head
        for kind in kinds
    }
    assert world.store.journal_head(before.number + 1) in guesses  # it is as easy as that
    assert after.head not in guesses
    assert world.shown_head() == after  # nothing new, no entry: asking does not make the journal grow


def test_adapters_that_cannot_be_trained_from_do_not_fill_the_disk(world: World) -> None:
    """A coordinator may invite to the same round again and again, each time with another adapter."""

    class Choosy(Untouched):
        def open(self) -> None:
            """The model is here."""

        def train(self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan) -> NDArray[np.float64]:
            raise ValueError("no adapter of this plan")  # as far as the disk goes, whatever goes wrong

    world.approve()
    rounds = SiteRounds(replace(world.site, open_trainer=lambda agreed: Choosy()))
    world.rounds, kept = rounds, world.kept()
    for attempt in range(5):
        try:
            assert world.invite(1, adapter=world.coordinator.offer(bytes([attempt]) * 1000)) == m.Declined()
        except ValueError:
            continue
    assert world.kept() == kept
    assert len(world.ledger.run(RUN).charges) == 3  # the round, and the plan's two retries


@pytest.mark.parametrize("labels", [LABELS, ["Eye", "Ear", "Nose"], ["Nose", "Mouth", "Chin"]])
def test_no_list_of_labels_finds_out_which_there_are(tmp_path: Path, labels: list[str]) -> None:
    """Where policy decides by itself, a plan is a free question: no row may change the answer."""
    world = World(tmp_path, task__labels=labels)
    assert world.propose() == m.Ready()
    world.close()


def test_the_right_plan_and_invitation_are_not_declined(world: World) -> None:
    """Or the tables above would show nothing."""
    world.approve()
    with pytest.raises(AssertionError, match="about to be opened"):
        world.invite()


# --- What a coordinator may make a site keep ---


def test_of_downloads_that_are_cut_a_run_keeps_one_and_none_when_it_is_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(run_id: int, ref: ObjectRef) -> Path:
        with world.objects.receive(ref) as partial:
            partial.append(b"x" * 100)
        raise LocalError("The coordinator stopped moving an object.")

    world.approve()
    kept = world.kept()
    monkeypatch.setattr(world.coordinator, "fetch", cut)
    for attempt in range(5):
        assert world.invite(1, adapter=world.coordinator.offer(bytes([attempt]) * 1000)) == m.Declined()
        assert len(world.kept() - kept) == 1
    world.end(m.End.STOPPED)
    assert world.kept() == kept


def test_a_run_that_is_over_leaves_no_adapter_and_no_vector(world: World) -> None:
    agreed = world.approve()
    rounds = schedule(agreed.plan)
    ref = ObjectRef(world.coordinator.offer(save_adapter(FIRST, SPEC)).digest.hex(), len(save_adapter(FIRST, SPEC)))
    adapter = world.coordinator.fetch(RUN, ref)
    vectors = ObjectVectors(world.objects)
    for index in range(2):
        terms = round_terms(agreed, rounds[index], ref)
        vector = vectors.store(np.full(terms.layout.words, index, np.uint64))
        world.ledger.release(world.ledger.reserve_round(RUN, index), terms, vector)
    masked = vectors.store(np.full(3, 7, np.uint64))
    world.store.persist([VectorMasked(m.AttemptId(RUN, 1, 0), vector, masked)])
    sweep(world.objects, world.store, world.clock)
    assert len(world.kept()) == 3  # adapter, the vector of round 1, the masked one of round 2: a run may need them
    world.clock.advance(40 * DAY)
    sweep(world.objects, world.store, world.clock)
    assert len(world.kept()) == 3
    world.end(m.End.FINISHED)
    assert (world.kept(), adapter.exists()) == (set(), False)


def test_what_a_stopped_run_left_is_kept_for_a_month(world: World) -> None:
    agreed = world.approve()
    ref = world.objects.put(save_adapter(FIRST, SPEC))
    terms = round_terms(agreed, schedule(agreed.plan)[0], ref)
    vector = ObjectVectors(world.objects).store(np.zeros(terms.layout.words, np.uint64))
    world.ledger.release(world.ledger.reserve_round(RUN, 0), terms, vector)
    world.end(m.End.STOPPED)
    for days, left in ((29, 2), (2, 0)):
        world.clock.advance(days * DAY)
        sweep(world.objects, world.store, world.clock)
        assert len(world.kept()) == left


def test_plans_are_declined_when_they_come_faster_than_anybody_decides(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def flood(numbers: Iterable[int]) -> int:
        for number in numbers:
            world.propose_run(number)
        return len(world.store.plans())

    with caplog.at_level(logging.WARNING):
        assert flood(range(100, 200)) == 64
        assert "QUOTA: plans are proposed faster" in caplog.text
        assert flood(range(100, 200)) == 64  # what is known costs nothing
        world.clock.advance(900)
        assert flood(range(200, 210)) == 65
    refused = [entry.event for entry in world.store.journal_entries() if entry.event["event"] == "plan.refused"]
    assert {"QUOTA", "PolicyRefusal"} == {event["reason"] for event in refused}


def test_plans_on_which_nobody_decided_lapse_and_may_come_again(world: World) -> None:
    world.site.stopping.set()  # nobody waits for the person here
    world.rounds = SiteRounds(replace(world.site, policy=SitePolicy(require_approval=True)))
    hours = world.agreed.plan.run.approval_hours
    world.propose()
    world.clock.advance(2 * hours * 3600 + 1)
    world.propose_run(8)
    assert [plan.state for plan in world.store.plans()] == ["stopped", "pending"]
    world.propose()
    assert [plan.state for plan in world.store.plans()] == ["pending", "pending"]


def test_attempts_at_one_sum_are_counted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    agreed = world.approve()
    terms = round_terms(agreed, schedule(agreed.plan)[0], world.objects.put(b"adapter"))
    vector = ObjectVectors(world.objects).store(np.zeros(terms.layout.words, np.uint64))
    world.ledger.release(world.ledger.reserve_round(RUN, 0), terms, vector)
    world.store.persist([AttemptSeen(m.AttemptId(RUN, 0, number)) for number in range(MAX_ATTEMPTS - 1)])
    for number, named in ((MAX_ATTEMPTS - 1, "WRONG_STAGE"), (MAX_ATTEMPTS, "QUOTA")):
        caplog.clear()
        header = wire.Header(RUN, 0, number, agreed.digest(), wire.COORDINATOR, "north", sequence=0)
        with caplog.at_level(logging.WARNING):
            answer = world.rounds.step(wire.build_envelope(header, m.PeerKeys(())))
        assert wire.parse_envelope(answer).message == m.Declined()
        assert named in caplog.text
        world.store.persist([AttemptSeen(m.AttemptId(RUN, 0, number))])


def test_heads_of_the_journal_are_not_taken_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(site_round, "HEADS", (3, 60.0))
    world.rounds = SiteRounds(world.site)
    world.approve()
    coordinator = notary(world.operator.home, world.operator.store)
    answers = []
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            world.operator.store.database.record("test")
            shown = coordinator.show("north", coordinator.sign_end())
            answers.append(type(world._ask(world.rounds.journal, world.agreed.digest(), shown)))
    assert answers == [m.JournalHeads] * 3 + [m.Declined] * 2
    assert len(world.store.heads(wire.COORDINATOR)) == 3
    assert "QUOTA: heads of the journal" in caplog.text
