"""Runs and rounds over a grid without a network: real sites and ledgers, known updates, a clock that the test moves.

What is lost, refused, stopped or started again; and that whatever is committed is the exact mean of its survivors.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from foedus_client.app import client_app
from foedus_client.approval import Approval
from foedus_client.audit import verify as verify_site
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.round import MAX_ATTEMPTS, Site, SiteRounds
from foedus_client.store import SiteStore
from foedus_common.checkpoints import accept_losses
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError
from foedus_common.identity import Roster, SignedRoster, public_bytes
from foedus_common.journal import BrokenChain
from foedus_common.link.contents import body_of, context_of
from foedus_common.objects import ObjectStore
from foedus_common.plan import AgreedPlan, SecureAggregation
from foedus_common.privacy import accounting
from foedus_common.protocol.draw import MAX_DRAWS, RoundSize, withstood
from foedus_common.protocol.effects import Answered, AttemptSeen, VectorMasked
from foedus_common.protocol.messages import AttemptId, DrawnConfig
from foedus_common.protocol.wire import COORDINATOR, parse_envelope
from foedus_common.randomness import RandomBytes
from foedus_server import runs
from foedus_server.app import server_app
from foedus_server.audit import notary
from foedus_server.audit import verify as verify_coordinator
from foedus_server.config import Patience
from foedus_server.link.grid import LinkStopping
from foedus_server.members.registry import Registry
from foedus_server.runs import Coordinator
from foedus_simulations.grids import InProcessGrid
from foedus_simulations.parties import until
from known_sites import WITH_DP, KnownTrainer, assert_sums_are_exact, join_site, plan_of, submit
from operators import Operator
from seeded import seeded
from tiny_model import rows

STAGES = ("query.keys", "query.shares", "query.mask", "query.survivors", "query.unmask")
PATIENCE = Patience(stage_seconds=5, absent_seconds=20)
NAMES = ("north", "east", "south", "west")

Fault = Callable[[str, Message], None]
"""Told each message before its site gets it; raises Gone where the site is to be lost."""


class Gone(LocalError):
    """The site ended in the middle; nobody answers."""


class Grid(InProcessGrid):
    """The simulations' grid with faults: who is gone stays silent until it is back, and waiting moves the clock."""

    def __init__(self, run_id: int, objects: ObjectStore, clock: ManualClock) -> None:
        super().__init__(run_id, objects)
        self._clock = clock
        self._unanswered: dict[str, Message] = {}
        self.away: set[str] = set()
        self.fault: Fault = lambda site, message: None
        self.stops: Callable[[Message], bool] = lambda message: False
        self.on_wait: Callable[[], None] = lambda: None

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if self.site(node) not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        asked = list(messages)
        if any(map(self.stops, asked)):
            raise LinkStopping
        return super().push_messages(asked)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for reply in super().pull_messages(message_ids) if not reply.has_error()]

    def forget(self, message_ids: Iterable[str]) -> None:
        for each in (ids := list(message_ids)):
            self._unanswered.pop(each, None)
        super().forget(ids)

    def wait(self, timeout: float) -> None:
        self._clock.advance(timeout)
        self.on_wait()

    def reach(self, site: str, app: Any, objects: ObjectStore) -> None:
        """From now on `app` answers for the site."""

        def reached(message: Message, context: Context) -> Message:
            if site in self.away:
                raise Gone("away")
            self.fault(site, message)
            answer = app(message, context)
            assert isinstance(answer, Message)
            return answer

        self.connect(site, reached, objects)  # type: ignore[arg-type]
        self.away.discard(site)
        self.redeliver(site)

    def redeliver(self, site: str) -> None:
        """Ask the site again what it left unanswered, as the link does when it comes back."""
        for message_id, request in list(self._unanswered.items()):
            if self.site(request.metadata.dst_node_id) == site:
                self._replies[message_id] = self._answer(request)

    def _answer(self, request: Message) -> Message:
        reply = super()._answer(request)
        if reply.has_error():
            self._unanswered[request.metadata.message_id] = request
        return reply


class Consortium:
    """A coordinator and its sites, in one process and one thread."""

    def __init__(self, folder: Path, names: Sequence[str], **policy: Any) -> None:
        """names: those that begin with "chain" are of one organisation."""
        self.clock = ManualClock()
        self.operator = Operator(folder / "operator", self.clock)
        self.objects = ObjectStore(self.operator.home.objects)
        self.sites = {name: self._site(folder / name, name, policy) for name in names}
        self.homes = {name: folder / name for name in names}
        self.training: Callable[[str], RandomBytes] = lambda name: self.sites[name]["random"]
        self.agreed: AgreedPlan
        self.grid: Grid

    def _site(self, home: Path, name: str, policy: dict[str, Any]) -> dict[str, Any]:
        member = join_site(
            self.operator, home, name, self.clock, rows(), "The chain" if name.startswith("chain") else ""
        )
        store = SiteStore(home / "site.db", self.clock)
        return {
            "member": member,
            "policy": SitePolicy(
                **{"require_approval": False, "max_epsilon_per_day": 40.0, "max_epsilon_lifetime": 40.0, **policy}
            ),
            "store": store,
            "ledger": Ledger(store, self.clock, sign=member.key.sign),
            "objects": ObjectStore(home / "objects"),
            "clock": self.clock,
            "random": seeded(f"site {name}"),
        }

    def submit(self, plan: Any, run_id: int = 7) -> AgreedPlan:
        _, self.agreed = submit(self.operator.home, self.operator.store, plan, run_id)
        self.connect(Grid(run_id, self.objects, self.clock))
        return self.agreed

    def connect(self, grid: Grid) -> None:
        self.grid = grid
        for name in self.sites:
            self.start_site(name)

    def start_site(self, name: str) -> None:
        """Its program starts, or starts again after it was gone: what was only in memory is lost."""
        facts = self.sites[name]
        trainer = KnownTrainer(self.homes[name], self.agreed, self.training(name))
        site = Site(courier=self.grid.courier(name), open_trainer=lambda agreed: trainer, **facts)
        self.grid.reach(name, client_app(SiteRounds(site)), site.objects)

    def conduct(self) -> str:
        """Conducts the run until it ends or the coordinator stops; its state then."""
        store, ours = self.operator.store, notary(self.operator.home, self.operator.store)
        coordinator = Coordinator(store, self.objects, self.clock, PATIENCE, self._roster, ours)
        with suppress(LocalError):  # the sentence is the run's reason
            server_app(coordinator)(grid=self.grid, context=context_of(self.agreed.run_id))
        return str(self.run.state)

    def _roster(self) -> tuple[SignedRoster, Roster]:
        signed = self.operator.registry.roster()
        assert signed is not None
        root = public_bytes(self.operator.home.root_key())
        return signed, signed.verify(root, now=self.clock.now(), highest_epoch=0)

    @property
    def run(self) -> Any:
        return self.operator.store.runs.run(self.agreed.run_id)

    @property
    def attempts(self) -> list[tuple[int, int, str]]:
        return [(a.round, a.attempt, a.state) for a in self.operator.store.runs.attempts(self.agreed.run_id)]

    @property
    def survivors(self) -> list[tuple[str, ...]]:
        return [a.survivors for a in self.operator.store.runs.committed(self.agreed.run_id)]

    def charges(self, name: str) -> list[tuple[int, str]]:
        """(round, state) of each charge in the site's own ledger."""
        return [(charge.round, charge.state) for charge in self.sites[name]["ledger"].run(self.agreed.run_id).charges]

    def assert_sums_are_exact(self) -> None:
        assert_sums_are_exact(self.operator, self.homes, self.agreed)


Make = Callable[..., Consortium]


@pytest.fixture
def consortium() -> Iterator[Make]:
    made: list[Consortium] = []

    def make(names: Sequence[str] = NAMES, **policy: Any) -> Consortium:
        made.append(Consortium(Path(folder), names, **policy))
        return made[-1]

    with tempfile.TemporaryDirectory() as folder:
        yield make
        for each in made:
            each.operator.close()
            for site in each.sites.values():
                site["store"].close()


def once(site: str, message_type: str, act: Callable[[], None] = lambda: None) -> Fault:
    """The site is lost when this message reaches it, the first time."""
    done = []

    def fault(name: str, message: Message) -> None:
        if (name, message.metadata.message_type) == (site, message_type) and not done:
            done.append(True)
            act()
            raise Gone("killed")

    return fault


def silent(site: str, message_type: str) -> Fault:
    """The site never answers this message."""

    def fault(name: str, message: Message) -> None:
        if (name, message.metadata.message_type) == (site, message_type):
            raise Gone("silent")

    return fault


# --- Commit ---


def test_a_run_ends_with_every_round_committed_and_every_budget_settled(consortium: Make) -> None:
    four = consortium()
    four.submit(plan_of(rounds=3))
    assert four.conduct() == "finished"
    assert four.attempts == [(0, 0, "committed"), (1, 0, "committed"), (2, 0, "committed")]
    assert four.survivors == [tuple(sorted(NAMES))] * 3
    four.assert_sums_are_exact()
    for name, site in four.sites.items():
        assert four.charges(name) == [(0, "committed"), (1, "committed"), (2, "committed")]
        assert not site["ledger"].run(7).open
        assert site["store"].plan_of_run(7).state == "finished"
    assert four.operator.events()[-2:] == ["round.committed", "run.finished"]


def test_after_a_run_each_side_has_the_other_s_signature_over_its_journal(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    assert three.conduct() == "finished"
    operator, journal = three.operator, three.operator.store.journal
    verified = verify_coordinator(operator.home, operator.store)
    assert verified.witnessed == dict.fromkeys(sorted(NAMES[:3]), journal.journal_end().number)
    for name, site in three.sites.items():
        member = site["member"]
        told = verify_site(site["store"], site["ledger"], name, member.public_key)
        assert told.journal.witnessed == {COORDINATOR: site["store"].journal_end().number}
        assert told.coordinator == len(journal.heads(COORDINATOR)) == 3  # after each round, and at the end
        events = [entry.event["event"] for entry in site["store"].journal_entries()]
        assert [events.count(event) for event in ("vector.masked", "survivors.signed", "unmasking.answered")] == [2] * 3


class LateHeads(Grid):
    """Answers about journals are here after the next wait and not before."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._late: set[str] = set()
        self.forgotten: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(asked := list(messages))
        of = dict(zip(ids, asked, strict=True))
        self._late |= {each for each in ids if of[each].metadata.message_type == "query.journal"}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return super().pull_messages([each for each in message_ids if each not in self._late])

    def forget(self, message_ids: Iterable[str]) -> None:
        ids = list(message_ids)
        self.forgotten += [each for each in ids if each in self._late]
        super().forget(ids)

    def wait(self, timeout: float) -> None:
        self._late.clear()
        super().wait(timeout)


class Candid(Grid):
    """A site whose program fails says so, as over the link."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return InProcessGrid.pull_messages(self, message_ids)


@pytest.mark.parametrize(("failures", "takes_part"), [(5, True), (6, False)])
def test_a_site_whose_program_fails_on_the_proposal_is_asked_again_for_a_while(
    consortium: Make, failures: int, takes_part: bool
) -> None:
    """Its disk is full for a minute, or for longer."""
    four, asked = consortium(), []
    four.submit(plan_of(rounds=1))
    four.connect(Candid(7, four.objects, four.clock))

    def fail(site: str, message: Message) -> None:
        if (site, message.metadata.message_type) == ("west", "query.propose"):
            asked.append(four.clock.monotonic())
            if len(asked) <= failures:
                raise LocalError("The disk is full.")

    four.grid.fault = fail
    assert four.conduct() == "finished"
    assert four.survivors == [tuple(sorted(NAMES if takes_part else NAMES[:3]))]
    assert len(asked) == 6
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert all(longer > 1.5 * pause for pause, longer in pairwise(pauses))


def test_failures_on_an_earlier_roster_are_forgotten_with_a_new_one(consortium: Make) -> None:
    """Whose disk was full for half a minute when the run began has all its tries again a week later."""
    four, failing, asked = consortium(), [True] * 5 + [False, True, False], []
    four.submit(plan_of(rounds=4))
    four.connect(Candid(7, four.objects, four.clock))

    def fail(site: str, message: Message) -> None:
        if (site, message.metadata.message_type) == ("west", "query.propose"):
            asked.append(site)
            if failing[len(asked) - 1]:
                raise LocalError("The disk is full.")
        if (site, message.metadata.message_type) == ("north", "query.unmask"):
            four.clock.advance(PATIENCE.retry_seconds)
            if len(asked) == 6:
                four.operator.registry.sign_roster(four.operator.home.root_key())

    four.grid.fault = fail
    assert four.conduct() == "finished"
    assert len(asked) == 8
    assert "west" in four.survivors[-1]


def test_heads_that_come_late_are_awaited(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    grid = LateHeads(7, three.objects, three.clock)
    three.connect(grid)
    assert three.conduct() == "finished"
    assert grid.forgotten == []  # or the link would note replies that nobody awaits
    witnessed = verify_coordinator(three.operator.home, three.operator.store).witnessed
    assert witnessed == dict.fromkeys(sorted(NAMES[:3]), three.operator.store.journal.journal_end().number)


def test_a_coordinator_that_was_rolled_back_learns_it_at_its_next_run(consortium: Make, tmp_path: Path) -> None:
    three = consortium(NAMES[:3])
    operator, older = three.operator, tmp_path / "older.db"
    three.submit(plan_of(rounds=1), run_id=7)
    operator.store.database.copy_to(older)
    assert three.conduct() == "finished"
    lost = operator.store.journal.journal_end().number

    operator.store.close()
    (operator.home.path / "foedus.db").write_bytes(older.read_bytes())
    operator.store = operator.home.store(three.clock)
    operator.registry = Registry(operator.home, operator.store, three.clock, operator.random)
    three.submit(plan_of(rounds=1), run_id=8)
    assert three.conduct() == "finished"  # the sites take no harm
    behind = [e.event for e in operator.store.database.entries() if e.event["event"] == "journal.behind"]
    assert {event["number"] for event in behind} == {lost - 1, lost}  # those shown after the round, and at the end
    with pytest.raises(BrokenChain):
        verify_coordinator(operator.home, operator.store)
    accept_losses(operator.store.journal, operator.store.journal.entries(), COORDINATOR, "anna")
    assert {mark.number for mark in verify_coordinator(operator.home, operator.store).losses} == {lost - 1, lost}
    for name, site in three.sites.items():
        verify_site(site["store"], site["ledger"], name, site["member"].public_key)


def test_momentum_and_averaging_are_those_of_a_run_that_was_never_interrupted(consortium: Make) -> None:
    """The optimiser's memory crosses a restart: adapters equal those of an uninterrupted run."""
    changes: dict[str, Any] = {"aggregation": {"optimizer": "fedavgm", "momentum": 0.5, "average_last": 2}}
    three = consortium(NAMES[:3])
    three.training = lambda name: seeded(f"training at {name}")  # the same in both runs

    three.submit(plan_of(rounds=3, **changes), run_id=7)
    assert three.conduct() == "finished"
    whole = [attempt.adapter for attempt in three.operator.store.runs.committed(7)]

    three.submit(plan_of(rounds=3, **changes), run_id=8)
    three.grid.stops = at(three, "train.invite", rounds_done=1)
    assert three.conduct() == "running"
    three.grid.stops = lambda message: False
    assert three.conduct() == "finished"
    assert [attempt.adapter for attempt in three.operator.store.runs.committed(8)] == whole


def at(made: Consortium, message_type: str, rounds_done: int) -> Callable[[Message], bool]:
    """The coordinator is told to stop as it is about to send this message in this round."""
    return lambda message: made.run.rounds_done == rounds_done and message.metadata.message_type == message_type


# --- Drop ---


@pytest.mark.parametrize("stage", STAGES)
def test_one_of_four_is_lost_and_the_round_completes_without_it(consortium: Make, stage: str) -> None:
    four = consortium()
    four.submit(plan_of(rounds=2))
    four.grid.fault = once("west", stage, lambda: four.grid.away.add("west"))
    four.grid.on_wait = lambda: four.start_site("west") if four.run.rounds_done else None
    assert four.conduct() == "finished"
    assert four.attempts == [(0, 0, "committed"), (1, 0, "committed")]
    delivered = stage in ("query.survivors", "query.unmask")  # its vector was there before it was lost
    assert four.survivors[0] == tuple(sorted(NAMES if delivered else NAMES[:3]))
    assert four.survivors[1] == tuple(sorted(NAMES))  # back in time for the second round
    four.assert_sums_are_exact()
    acknowledged = stage == "query.unmask"  # before, it may be in doubt: that counts as spent
    assert four.charges("west") == [(0, "committed" if acknowledged else "released"), (1, "committed")]


def test_a_site_that_is_long_gone_holds_up_one_round_and_no_more(consortium: Make) -> None:
    four = consortium()
    four.submit(plan_of(rounds=4))
    four.grid.fault = once("west", "query.keys", lambda: four.grid.away.add("west"))
    began = four.clock.monotonic()
    assert four.conduct() == "finished"
    waited = four.clock.monotonic() - began
    to_say_goodbye = PATIENCE.absent_seconds
    assert PATIENCE.absent_seconds <= waited - to_say_goodbye < 2 * PATIENCE.absent_seconds
    assert four.survivors == [tuple(sorted(NAMES[:3]))] * 4


def test_a_site_that_comes_back_takes_part_again(consortium: Make) -> None:
    four = consortium()
    four.submit(plan_of(rounds=4))

    def fault(site: str, message: Message) -> None:
        if message.metadata.message_type == "train.invite":
            if four.run.rounds_done == 1 and site == "north":
                four.grid.away.add("west")
            if four.run.rounds_done == 3 and site == "north":
                four.start_site("west")

    four.grid.fault = fault
    assert four.conduct() == "finished"
    assert [len(sites) for sites in four.survivors] == [4, 3, 3, 4]
    four.assert_sums_are_exact()


def test_a_site_that_cannot_load_the_model_misses_the_round_and_is_charged_nothing(
    consortium: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = consortium()
    without_gpu = four.homes["west"]

    def open_trainer(self: KnownTrainer) -> None:
        if self.home == without_gpu and four.run.rounds_done == 0:
            raise LocalError("There is no device cuda:7.")

    monkeypatch.setattr(KnownTrainer, "open", open_trainer)
    four.submit(plan_of(rounds=2))
    assert four.conduct() == "finished"
    assert four.survivors == [tuple(sorted(NAMES[:3])), tuple(sorted(NAMES))]
    assert four.charges("west") == [(1, "committed")]


def test_a_site_whose_policy_refuses_the_plan_is_left_out(consortium: Make) -> None:
    four = consortium()
    four.sites["west"]["policy"] = SitePolicy(require_approval=False, max_epsilon_per_run=0.5)
    four.submit(plan_of(rounds=1))
    assert four.conduct() == "finished"
    assert four.survivors == [tuple(sorted(NAMES[:3]))]
    assert four.sites["west"]["store"].plan_of_run(7).state == "declined"


def test_a_run_that_too_few_accept_fails_with_a_sentence(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.sites["south"]["policy"] = SitePolicy(require_approval=False, max_epsilon_per_run=0.5)
    three.submit(plan_of(rounds=1))
    assert three.conduct() == "failed"
    assert three.run.reason.startswith("2 sites take part in icd-chapters, and its plan needs 3;")
    assert not three.sites["north"]["ledger"].run(7).open  # what was set aside is returned


CHAIN = ("chain-1", "chain-2", "chain-3", "north", "south")
OTHERS_NOISE_COUNTS = {
    "phase": [{**WITH_DP, "rounds": 1, "steps": 1}],
    "secure_aggregation": {"min_sites": 5, "max_sites": 5, "colluding": 1, "field_bits": 32, "retries": 2},
}


def test_a_chain_counts_with_all_its_sites_and_the_round_still_opens(consortium: Make) -> None:
    five = consortium(CHAIN)
    five.submit(plan_of(rounds=1))
    assert five.conduct() == "finished"
    assert five.survivors == [CHAIN]
    five.assert_sums_are_exact()


def test_where_a_chain_has_most_sites_no_other_may_drop_out(consortium: Make) -> None:
    """Two of five that are not the chain's are the fewest that may be in a sum."""
    five = consortium(CHAIN)
    five.submit(plan_of(rounds=1))
    five.grid.fault = once("south", "query.shares")
    assert five.conduct() == "finished"
    first, second = five.operator.store.runs.attempts(7)
    assert (first.state, second.survivors) == ("aborted", CHAIN)
    assert first.reason == "TOO_FEW_SITES: 4 sites are left at A2, and 5 are needed"


@pytest.mark.parametrize(
    ("names", "changes", "sentence"),
    [
        (CHAIN[:4], {}, "4 sites take part in icd-chapters, and TOO_FEW_SITES: .* belong to 2 organisations, and 3"),
        (CHAIN, OTHERS_NOISE_COUNTS, "5 sites take part .* noise of 2 honest ones in a sum, and the plan counts 3;"),
    ],
    ids=["organisations", "noise"],
)
def test_nobody_trains_for_a_round_that_cannot_be(
    consortium: Make, names: Sequence[str], changes: dict[str, Any], sentence: str
) -> None:
    sites = consortium(names)
    sites.submit(plan_of(1, **changes))
    assert sites.conduct() == "failed"
    assert re.search(sentence, sites.run.reason)
    assert (sites.attempts, sites.charges("north")) == ([], [])


def test_a_round_waits_for_no_more_sites_than_its_own_phase_counts(consortium: Make) -> None:
    """Six of seven are enough where only a site's own noise counts, and too few for the one-step round that follows."""
    phases = [{**WITH_DP, "rounds": 2, "budget_share": 0.5}, {**WITH_DP, "rounds": 1, "steps": 1, "budget_share": 0.5}]
    secure = {"min_sites": 5, "max_sites": 7, "colluding": 1, "field_bits": 32, "retries": 2}
    seven = consortium((*CHAIN, "east", "west"))
    seven.submit(plan_of(1, phase=phases, secure_aggregation=secure))
    seven.grid.fault = once("south", "query.unmask", lambda: seven.grid.away.add("south"))

    def come_back() -> None:
        if seven.run.rounds_done == 2 and "south" in seven.grid.away:
            seven.start_site("south")

    seven.grid.on_wait = come_back
    assert seven.conduct() == "finished", seven.run.reason
    assert [len(survivors) for survivors in seven.survivors] == [7, 6, 7]


def test_a_site_whose_disk_is_full_when_its_vector_is_stored_misses_the_round(
    consortium: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was charged before it opened its data; nothing was released, and the next round is not its retry."""
    four = consortium()
    put_vector, failures = SiteStore.put_vector, []

    def full_once(self: SiteStore, *vector: Any) -> None:
        if self is four.sites["west"]["store"] and not failures:
            failures.append(True)
            raise LocalError("The disk is full.")
        put_vector(self, *vector)

    monkeypatch.setattr(SiteStore, "put_vector", full_once)
    four.submit(plan_of(rounds=2, secure_aggregation__retries=0))
    assert four.conduct() == "finished"
    assert four.survivors == [tuple(sorted(NAMES[:3])), tuple(sorted(NAMES))]
    assert four.charges("west") == [(0, "reserved"), (1, "committed")]


@pytest.mark.parametrize("record", [AttemptSeen, VectorMasked, Answered])
def test_an_answer_that_could_not_be_stored_is_never_given(
    consortium: Make, monkeypatch: pytest.MonkeyPatch, record: type
) -> None:
    """The disk is full for a moment, then the same request comes again: stored before sent holds all the same."""
    four = consortium()
    store = four.sites["west"]["store"]
    persist, failures = store.persist, []

    def full_once(records: Sequence[Any]) -> None:
        if isinstance(records[0], record) and not failures:
            failures.append(True)
            raise LocalError("The disk is full.")
        persist(records)

    monkeypatch.setattr(store, "persist", full_once)
    monkeypatch.setattr(store, "_forget_oldest", lambda: None)  # answers, once the run is over
    four.submit(plan_of(rounds=1))
    four.grid.on_wait = lambda: four.grid.redeliver("west")
    assert four.conduct() == "finished"
    assert failures
    assert ("west" in four.survivors[0]) == (store.outbox(7, 0).masked_in is not None)
    signed = store.answered(AttemptId(7, 0, 0))
    assert ("west" in four.survivors[0]) == (signed is not None)
    four.assert_sums_are_exact()


# --- Cohorts that are drawn ---

EIGHT = tuple(f"branch-{number}" for number in range(8))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four sites share a sum; what is 4 here is 128 in a release."""
    size = RoundSize(fewest=6, most=16, largest_cohort=4)
    monkeypatch.setattr(SecureAggregation, "size", property(lambda _: size))


@pytest.fixture
def eight(consortium: Make, drawn: None) -> Consortium:
    return consortium(EIGHT)


def opening_of(message: Message) -> DrawnConfig:
    opening = parse_envelope(body_of(message)).message
    assert isinstance(opening, DrawnConfig)
    return opening


def test_more_sites_than_share_a_sum_are_drawn_into_cohorts(eight: Consortium) -> None:
    drawn: list[set[tuple[str, ...]]] = [set(), set()]

    def note(site: str, message: Message) -> None:
        if message.metadata.message_type == "query.keys":
            config = opening_of(message).config
            drawn[config.terms.round].add(config.cohort)

    eight.submit(plan_of(rounds=2))
    eight.grid.fault = note
    assert eight.conduct() == "finished"
    assert eight.attempts == [(0, 0, "committed"), (1, 0, "committed")]
    assert eight.survivors == [EIGHT] * 2
    eight.assert_sums_are_exact()
    for cohorts in drawn:
        assert sorted(map(len, cohorts)) == [4, 4]
        assert sorted(site for cohort in cohorts for site in cohort) == list(EIGHT)
    for name in EIGHT:
        assert eight.charges(name) == [(0, "committed"), (1, "committed")]


@pytest.mark.parametrize("stage", STAGES)
def test_one_is_lost_and_both_cohorts_open(eight: Consortium, stage: str) -> None:
    eight.submit(plan_of(rounds=1))
    eight.grid.fault = once("branch-3", stage, lambda: eight.grid.away.add("branch-3"))
    assert eight.conduct() == "finished"
    delivered = stage in ("query.survivors", "query.unmask")
    assert eight.survivors == [tuple(name for name in EIGHT if delivered or name != "branch-3")]
    eight.assert_sums_are_exact()


def test_a_cohort_that_its_sites_would_not_join_is_missed(consortium: Make, drawn: None) -> None:
    """Five of eight are one organisation's: of two cohorts one has sites of three organisations, whoever draws."""
    eight = consortium((*CHAIN, "chain-4", "chain-5", "west"))
    eight.submit(plan_of(rounds=1))
    assert eight.conduct() == "finished"
    assert len(eight.survivors[0]) == 4
    assert len({site for site in eight.survivors[0] if not site.startswith("chain")}) >= 2
    eight.assert_sums_are_exact()


def test_a_cohort_that_opens_no_sum_is_missed_like_its_sites(eight: Consortium) -> None:
    """Two of four are lost: t is three. The other cohort's sum is the round's; the lost one's vectors are used up."""
    cohort: list[str] = []

    def fault(site: str, message: Message) -> None:
        if message.metadata.message_type == "query.keys" and not cohort:
            cohort.extend(opening_of(message).config.cohort)
        if message.metadata.message_type == "query.mask" and site in cohort[:2]:
            raise Gone("killed")

    eight.submit(plan_of(rounds=1))
    eight.grid.fault = fault
    assert eight.conduct() == "finished"
    assert eight.survivors == [tuple(name for name in EIGHT if name not in cohort)]
    eight.assert_sums_are_exact()


def test_a_site_that_keeps_its_seed_back_costs_one_attempt_and_is_left_out_of_the_next(eight: Consortium) -> None:
    eight.submit(plan_of(rounds=1))
    eight.grid.fault = silent("branch-3", "query.reveal")
    assert eight.conduct() == "finished"
    assert eight.attempts == [(0, 0, "aborted"), (0, 1, "committed")]
    assert eight.survivors == [tuple(name for name in EIGHT if name != "branch-3")]
    eight.assert_sums_are_exact()
    assert eight.charges("branch-0") == [(0, "committed")]  # nobody had masked: the same vectors served
    assert len(eight.sites["branch-0"]["store"].outbox(7, 0).attempts_seen) == 2


def keeping_back(spoilers: Callable[[int, int], Sequence[str]]) -> Fault:
    """spoilers: in each round and attempt, the sites that keep their seeds back."""

    def fault(site: str, message: Message) -> None:
        header = parse_envelope(body_of(message)).header
        if message.metadata.message_type == "query.reveal" and site in spoilers(header.round, header.attempt):
            raise Gone("silent")

    return fault


def test_sites_that_fall_silent_one_after_another_cost_a_draw_each_and_no_round(consortium: Make, drawn: None) -> None:
    """More of them than attempts that may fail; nobody pauses, and nobody trains again."""
    sites = tuple(f"branch-{number:02}" for number in range(14))
    many = consortium(sites)
    many.submit(plan_of(rounds=1))
    many.grid.fault = keeping_back(lambda round_, attempt: sites[attempt : attempt + 1] if attempt < 8 else ())
    began = many.clock.monotonic()
    assert many.conduct() == "finished"
    assert many.attempts == [*((0, number, "aborted") for number in range(8)), (0, 8, "committed")]
    assert many.survivors == [sites[8:]]
    assert many.charges(sites[-1]) == [(0, "committed")]
    assert many.clock.monotonic() - began < 9 * PATIENCE.stage_seconds
    many.assert_sums_are_exact()


def test_an_organisation_spoils_two_draws_however_many_sites_it_has(consortium: Make, drawn: None) -> None:
    chain = tuple(f"chain-{number}" for number in range(8))
    many = consortium((*EIGHT, *chain))
    many.submit(plan_of(rounds=1))
    many.grid.fault = keeping_back(lambda round_, attempt: chain[attempt : attempt + 1])
    assert many.conduct() == "finished"
    assert many.attempts == [(0, 0, "aborted"), (0, 1, "aborted"), (0, 2, "committed")]
    assert many.survivors == [EIGHT]


def test_who_keeps_a_seed_back_again_is_left_out_for_longer(
    eight: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    """branch-3 spoils every draw that it is part of: of five rounds the first, the second and the fourth."""
    eight.submit(plan_of(rounds=5))
    eight.grid.fault = keeping_back(lambda round_, attempt: ["branch-3"])
    assert eight.conduct() == "finished"
    spoilt = [index for index, _, state in eight.attempts if state == "aborted"]
    assert "round 3: left out, for seeds were kept back: branch-3" in caplog.text
    assert spoilt == [0, 1, 3]
    assert eight.survivors == [tuple(name for name in EIGHT if name != "branch-3")] * 5


def test_silent_sites_without_which_there_are_too_few_are_asked_again(eight: Consortium) -> None:
    """A line that is down for a moment takes three of eight along, and the plan needs six."""
    eight.submit(plan_of(rounds=1, secure_aggregation__min_sites=6))
    eight.grid.fault = keeping_back(lambda round_, attempt: EIGHT[:3] if attempt == 0 else ())
    assert eight.conduct() == "finished"
    assert eight.attempts == [(0, 0, "aborted"), (0, 1, "committed")]
    assert eight.survivors == [EIGHT]


def test_silent_sites_without_which_there_are_too_few_end_the_run_in_the_end(eight: Consortium) -> None:
    eight.submit(plan_of(rounds=1, secure_aggregation__min_sites=6))
    eight.grid.fault = keeping_back(lambda round_, attempt: EIGHT[:3])
    assert eight.conduct() == "failed"
    assert [attempt for _, attempt, _ in eight.attempts] == list(range(6))
    assert eight.run.reason.startswith("Round 1 was given up after 6 attempts: ")
    assert "committed to a seed and did not reveal it" in eight.run.reason


def test_sites_bear_more_draws_than_the_colluders_of_a_large_round_can_spoil() -> None:
    colluders = withstood(40, size=RoundSize(1000, 1000), rounds=100)
    assert colluders + runs.ATTEMPTS <= MAX_DRAWS < MAX_ATTEMPTS


def test_draws_are_not_repeated_beyond_what_sites_bear(eight: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_DRAWS", 2)
    eight.submit(plan_of(rounds=1))
    eight.grid.fault = keeping_back(lambda round_, attempt: EIGHT[attempt : attempt + 1])
    assert eight.conduct() == "failed"
    assert eight.run.reason.startswith("Round 1 was given up after 2 attempts: ")


def test_a_site_that_does_not_commit_is_missed_and_no_more(eight: Consortium) -> None:
    eight.submit(plan_of(rounds=1))
    eight.grid.fault = silent("branch-3", "query.commit")
    assert eight.conduct() == "finished"
    assert eight.attempts == [(0, 0, "committed")]
    assert eight.survivors == [tuple(name for name in EIGHT if name != "branch-3")]


@pytest.mark.parametrize("stage", ["query.reveal", "query.keys"])
def test_a_site_that_restarts_in_a_draw_has_lost_its_seed(eight: Consortium, stage: str) -> None:
    """What was begun is on disk: the attempt is not begun anew with another seed."""
    eight.submit(plan_of(rounds=1))
    eight.grid.fault = once("branch-3", stage, lambda: eight.start_site("branch-3"))
    eight.grid.on_wait = lambda: eight.grid.redeliver("branch-3")
    assert eight.conduct() == "finished"
    assert [state for _, _, state in eight.attempts] == ["aborted", "committed"][stage == "query.keys" :]
    assert "branch-3" not in eight.survivors[0]
    eight.assert_sums_are_exact()


def test_more_sites_than_the_plan_has_room_for_are_too_many(consortium: Make) -> None:
    four = consortium()
    four.submit(plan_of(rounds=1, secure_aggregation__max_sites=3))
    assert four.conduct() == "failed"
    assert "Sites ready for the round: 4; the plan has room for 3." in four.run.reason


# --- Abort and retry ---


@pytest.mark.parametrize("stage", STAGES)
def test_one_of_three_is_lost_and_the_round_is_tried_again(consortium: Make, stage: str) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    three.grid.fault = once("south", stage, lambda: three.grid.away.add("south"))
    three.grid.on_wait = lambda: three.start_site("south") if three.attempts == [(0, 0, "aborted")] else None
    assert three.conduct() == "finished"
    assert three.attempts == [(0, 0, "aborted"), (0, 1, "committed"), (1, 0, "committed")]
    three.assert_sums_are_exact()
    masked = STAGES.index(stage) >= STAGES.index("query.mask")  # whoever masked a vector has to make another one
    again = [(0, "released"), (0, "released"), (1, "released")] if masked else [(0, "released"), (1, "released")]
    assert [(index, "released") for index, _ in three.charges("north")] == again
    lost = STAGES.index(stage) > STAGES.index("query.mask")
    assert len(three.charges("south")) == (3 if lost else 2)


def test_without_privacy_a_second_sum_of_one_round_is_refused(consortium: Make) -> None:
    three = consortium(NAMES[:3], allow_without_privacy=True)
    three.submit(plan_of(rounds=2, private=False))
    three.grid.fault = once("south", "query.mask")
    assert three.conduct() == "failed"
    assert three.run.reason.startswith("Round 1 was given up after 6 attempts: ")
    assert three.charges("north") == [(0, "released")]
    assert not three.sites["north"]["ledger"].run(7).open


def test_a_round_is_tried_again_only_while_the_plans_retries_last(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2, secure_aggregation__retries=1))

    def fault(site: str, message: Message) -> None:
        if (site, message.metadata.message_type) == ("south", "query.survivors"):
            three.start_site("south")
            raise Gone("killed at the same place each time")

    three.grid.fault = fault
    assert three.conduct() == "failed"
    assert three.charges("north") == [(0, "committed"), (0, "committed")]  # north had signed the survivors both times
    assert three.survivors == []


# --- Waiting, stopping, starting again ---


def test_a_run_waits_until_enough_sites_are_connected(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    three.grid.fault = once("south", "query.keys", lambda: three.grid.away.add("south"))
    began = three.clock.monotonic()

    def come_back() -> None:
        if three.clock.monotonic() - began > 50 and "south" in three.grid.away:
            three.start_site("south")

    three.grid.on_wait = come_back
    assert three.conduct() == "finished"
    assert three.attempts == [(0, 0, "aborted"), (0, 1, "committed"), (1, 0, "committed")]  # not one a second


def test_a_run_is_given_up_when_nobody_comes_back(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    three.grid.fault = once("south", "query.keys", lambda: three.grid.away.add("south"))
    assert three.conduct() == "failed"
    assert three.run.reason == (
        "For 1 minutes too few of the sites that take part were connected: 2 are now, and its plan needs 3."
    )


@pytest.mark.parametrize("stage", ["train.invite", *STAGES])
def test_a_restarted_coordinator_goes_on_from_the_last_committed_round(consortium: Make, stage: str) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    three.grid.stops = at(three, stage, rounds_done=1)
    assert three.conduct() == "running"
    first = three.operator.store.runs.committed(7)
    assert [attempt.round for attempt in first] == [0]
    three.grid.stops = lambda message: False
    assert three.conduct() == "finished"
    assert three.attempts == [(0, 0, "committed"), (1, 0, "aborted"), (1, 1, "committed")]
    assert three.operator.store.runs.committed(7)[:1] == first
    three.assert_sums_are_exact()
    assert "round.interrupted" in three.operator.events()


def test_a_site_that_was_fetching_the_adapter_gets_it_from_a_restarted_coordinator(consortium: Make) -> None:
    """It answers nothing else before it has the adapter, so the coordinator would wait for it in vain."""
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    three.grid.stops = at(three, "train.invite", rounds_done=1)
    assert three.conduct() == "running"
    adapter = three.operator.store.runs.committed(7)[0].adapter
    assert adapter is not None
    three.connect(Grid(7, three.objects, three.clock))  # a new process knows nothing of the old one's permissions

    def fault(site: str, message: Message) -> None:
        if message.metadata.message_type == "query.propose":
            assert three.grid.fetch(site, adapter).exists()

    three.grid.fault = fault
    assert three.conduct() == "finished"


def test_a_restarted_coordinator_waits_for_its_sites_to_come_back(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=2))
    three.grid.stops = at(three, "train.invite", rounds_done=1)
    assert three.conduct() == "running"
    three.grid.stops = lambda message: False
    three.grid.away.add("south")
    began = three.clock.monotonic()

    def come_back() -> None:
        if three.clock.monotonic() - began > 2 * PATIENCE.absent_seconds:
            three.start_site("south")

    three.grid.on_wait = come_back
    assert three.conduct() == "finished"


def test_a_stopped_run_leaves_no_attempt_open_and_no_budget_reserved(consortium: Make) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=3))

    def stop(site: str, message: Message) -> None:
        invited = message.metadata.message_type == "train.invite"
        if invited and three.run.rounds_done == 1 and three.run.state == "running":
            three.operator.store.runs.move(7, ["running"], "stopping", "stopped by the operator")

    three.grid.fault = stop
    assert three.conduct() == "stopped"
    assert three.attempts == [(0, 0, "committed"), (1, 0, "aborted")]
    for site in three.sites.values():
        assert not site["ledger"].run(7).open
        assert site["store"].plan_of_run(7).state == "stopped"


@pytest.mark.parametrize("answer", ["approve", "decline"])
def test_a_resumed_run_goes_on_with_the_sites_that_agree_once_more(consortium: Make, answer: str) -> None:
    """Where a person decides, the run waits for that person again; what was released stays counted."""
    four = consortium()
    agreed = four.submit(plan_of(rounds=3))
    four.grid.fault = stop_at(four, "query.keys", rounds_done=1)
    assert four.conduct() == "stopped"
    before = four.charges("west")
    west = four.sites["west"]
    west["policy"] = replace(west["policy"], require_approval=True)  # from now on with a person's approval
    four.start_site("west")

    def decide() -> None:
        until(lambda: west["store"].plan_of_run(7).state == "pending", 60, "the plan's coming back")
        getattr(approval(four, "west"), answer)(agreed.digest(), by="ada")

    person = threading.Thread(target=decide)
    person.start()
    resume(four)
    assert four.conduct() == "finished"
    person.join()
    taking_part = NAMES if answer == "approve" else NAMES[:3]
    assert four.attempts == [(0, 0, "committed"), (1, 0, "aborted"), (1, 1, "committed"), (2, 0, "committed")]
    assert four.survivors == [tuple(sorted(NAMES)), *[tuple(sorted(taking_part))] * 2]
    four.assert_sums_are_exact()
    for name in taking_part:  # nobody had masked the second round's vector, so it served: no charge was lost
        assert four.charges(name) == [(0, "committed"), (1, "committed"), (2, "committed")]
        assert four.sites[name]["store"].plan_of_run(7).state == "finished"
    if answer == "decline":
        assert four.charges("west") == before
        assert not west["ledger"].run(7).open


def test_a_site_takes_part_in_a_resumed_run_only_if_its_ledger_has_room(consortium: Make) -> None:
    four = consortium()
    four.submit(plan_of(rounds=2))
    four.grid.fault = stop_at(four, "query.keys", rounds_done=1)
    assert four.conduct() == "stopped"
    four.sites["west"]["policy"] = SitePolicy(require_approval=False, max_epsilon_lifetime=1.0)
    four.start_site("west")
    resume(four)
    assert four.conduct() == "finished"
    assert four.survivors == [tuple(sorted(NAMES)), tuple(sorted(NAMES[:3]))]
    assert four.sites["west"]["store"].plan_of_run(7).state == "declined"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_wastes_no_masked_vector(consortium: Make, stage: str) -> None:
    three = consortium(NAMES[:3], allow_without_privacy=True)
    three.submit(plan_of(rounds=2, private=False))  # in which a masked vector cannot be replaced
    three.grid.fault = stop_at(three, stage, rounds_done=0)
    assert three.conduct() == "stopped"
    resume(three)
    assert three.conduct() == "finished"
    three.assert_sums_are_exact()


def test_a_site_that_withdraws_is_left_out_from_the_next_round_on(consortium: Make) -> None:
    four = consortium()
    agreed = four.submit(plan_of(rounds=3))

    def fault(site: str, message: Message) -> None:
        if four.run.rounds_done == 1 and (site, message.metadata.message_type) == ("west", "train.invite"):
            approval(four, "west").withdraw(agreed.digest(), by="ada")

    four.grid.fault = fault
    assert four.conduct() == "finished"
    assert [len(sites) for sites in four.survivors] == [4, 3, 3]
    run = four.sites["west"]["ledger"].run(7)
    assert (run.open, run.spent) == (False, (1,))
    assert four.sites["west"]["store"].plan_of_run(7).state == "withdrawn"


@pytest.mark.parametrize("reason", ["its approval ended", "its approval's cap is reached", "its day has spent enough"])
def test_a_site_declines_the_rounds_that_it_may_not_train_and_the_run_goes_on(consortium: Make, reason: str) -> None:
    """The coordinator is told the same bare word, whatever the reason."""
    four = consortium()
    agreed, west = four.submit(plan_of(rounds=3)), four.sites["west"]
    a_round = accounting.epsilon([accounting.event_of_phase(agreed, 0)], west["policy"].delta)
    if reason == "its day has spent enough":
        west["policy"] = replace(west["policy"], max_epsilon_per_day=a_round)
        four.start_site("west")

    def fault(site: str, message: Message) -> None:
        if (site, message.metadata.message_type) != ("west", "train.invite"):
            return
        if reason == "its approval's cap is reached":
            approval(four, "west").approve(agreed.digest(), by="ada", epsilon_cap=a_round)
        if reason == "its approval ended" and four.run.rounds_done == 1:
            approval(four, "west").approve(agreed.digest(), by="ada", expires_at=four.clock.now() - 1)

    four.grid.fault = fault
    assert four.conduct() == "finished"
    assert [len(sites) for sites in four.survivors] == [4, 3, 3]
    assert four.charges("west") == [(0, "committed")]
    assert not [attempt for attempt in four.attempts if attempt[2] != "committed"]
    four.assert_sums_are_exact()


def test_a_site_that_withdraws_after_training_masks_nothing(consortium: Make) -> None:
    four = consortium()
    agreed = four.submit(plan_of(rounds=1))

    def fault(site: str, message: Message) -> None:
        if (site, message.metadata.message_type) == ("west", "query.keys"):
            approval(four, "west").withdraw(agreed.digest(), by="ada")

    four.grid.fault = fault
    assert four.conduct() == "finished"
    assert four.survivors == [tuple(sorted(NAMES[:3]))]
    assert four.sites["west"]["store"].outbox(7, 0).masked_in is None


def stop_at(made: Consortium, message_type: str, rounds_done: int) -> Fault:
    """The operator stops the run while this message of this round is under way."""

    def fault(site: str, message: Message) -> None:
        here = (made.run.rounds_done, message.metadata.message_type, made.run.state)
        if here == (rounds_done, message_type, "running"):
            made.operator.store.runs.move(7, ["running"], "stopping", "stopped by the operator")

    return fault


def resume(made: Consortium) -> None:
    made.grid.fault = lambda site, message: None
    made.operator.store.runs.move(7, ["stopped", "failed"], "inviting")


def approval(made: Consortium, name: str) -> Approval:
    site = made.sites[name]
    roster = site["member"].roster(made.clock.now())
    return Approval(name, roster, site["policy"], site["store"], site["ledger"])


def test_a_mistake_of_ours_ends_the_run_instead_of_repeating_it(
    consortium: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = consortium(NAMES[:3])
    three.submit(plan_of(rounds=1))
    monkeypatch.setattr("foedus_server.runs.ServerOptimizer.step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        three.conduct()
    assert (three.run.state, three.run.reason) == ("failed", "the coordinator's program failed; see its log")
    assert three.sites["north"]["store"].plan_of_run(7).state == "stopped"
