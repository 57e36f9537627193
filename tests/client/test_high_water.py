"""The high-water mark: a home that was restored from an older copy is noticed before anything more leaves the site.

A failure means that a site could forget what it released, or mask one vector twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_client.data import survey
from foedus_client.ledger.accounts import Budget
from foedus_client.ledger.high_water import HighWater, Mark, mark_name, state_folder
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError
from foedus_common.objects import ObjectRef
from foedus_common.plan import AgreedPlan, schedule
from foedus_common.protocol.effects import VectorMasked
from foedus_common.protocol.messages import AttemptId, VectorRef
from foedus_common.terms import round_terms
from plans import agreed_plan

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
BUDGET = Budget(40.0, 1e-5)
VECTOR = VectorRef(b"v" * 32, 800)


def plan(run_id: int = 7) -> AgreedPlan:
    changes = {"phase__0__rounds": 3, "phase__1__rounds": 2, "phase__1__sampling_rate": 1.0, "data__name": "notes"}
    return replace(agreed_plan(**changes), run_id=run_id, noise_multipliers=(20.0, 8.0))


class Machine:
    """A site's home and, outside of it, its mark."""

    def __init__(self, folder: Path) -> None:
        self.home, self.state = folder / "home", folder / "state"
        self.home.mkdir(mode=0o700)
        rows = folder / "rows.csv"
        rows.write_text("text,label\na,Eye\n")
        with closing(self.open()) as store:
            self.ledger(store).add_dataset("notes", rows, "text", "label", survey(rows, "text", "label"))
            approve(self.ledger(store), store, plan())

    @property
    def mark(self) -> HighWater:
        return HighWater(self.state, mark_name("north", bytes(32)))

    def open(self) -> SiteStore:
        return SiteStore(self.home / "site.db", ManualClock(), self.mark)

    def ledger(self, store: SiteStore) -> Ledger:
        return Ledger(store, ManualClock(), KEY.sign)

    def release(self, index: int) -> None:
        with closing(self.open()) as store:
            charge = self.ledger(store).reserve_round(7, index)
            terms = round_terms(plan(), schedule(plan().plan)[index], ObjectRef("d" * 64, 400))
            self.ledger(store).release(charge, terms, VECTOR)

    def mask(self, index: int) -> None:
        with closing(self.open()) as store:
            store.persist([VectorMasked(AttemptId(7, index, 0), VECTOR, VectorRef(b"m" * 32, 800))])

    def copy(self, name: str) -> Path:
        with closing(self.open()) as store:
            store.copy_to(self.home.parent / name)
        return self.home.parent / name

    def restore(self, copy: Path) -> None:
        for leftover in self.home.glob("site.db*"):
            leftover.unlink()
        shutil.copy(copy, self.home / "site.db")


def approve(ledger: Ledger, store: SiteStore, agreed: AgreedPlan) -> None:
    store.put_plan(agreed.digest(), agreed.run_id, agreed.canonical(), b"s" * 64)
    ledger.reserve_run(agreed, BUDGET)
    store.decide_plan(agreed.digest(), "approved", "ada")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def old(machine: Machine) -> Iterator[SiteStore]:
    """The file as it was before its second release, put in place of the newest one."""
    machine.release(0)
    copy = machine.copy("old.db")
    machine.release(1)
    machine.restore(copy)
    store = machine.open()
    yield store
    store.close()


def test_the_newest_copy_goes_on(machine: Machine) -> None:
    machine.release(0)
    machine.mask(0)
    machine.restore(machine.copy("new.db"))
    machine.release(1)


def test_an_older_copy_writes_nothing_more(machine: Machine, old: SiteStore) -> None:
    with pytest.raises(LocalError, match=r"it ends at entry 4, and this machine knows of 6 entries"):
        old.check_high_water()
    before = old.ledger_entries()
    for write in (
        lambda: machine.ledger(old).reserve_run(plan(8), BUDGET),
        lambda: machine.ledger(old).reserve_round(7, 2),
        lambda: machine.ledger(old).close_run(7),
        lambda: machine.ledger(old).verify(KEY.public_key().public_bytes_raw()),
    ):
        with pytest.raises(LocalError, match="older copy"):
            write()
    assert old.ledger_entries() == before


def test_a_copy_from_before_a_vector_was_masked_is_an_older_one(machine: Machine) -> None:
    """Its ledger is whole, and yet it would mask the same vector once more."""
    machine.release(0)
    copy = machine.copy("unmasked.db")
    machine.mask(0)
    machine.restore(copy)
    with closing(machine.open()) as store, pytest.raises(LocalError, match="1 vectors sent"):
        store.check_high_water()


def test_another_history_of_the_same_length_is_noticed(machine: Machine) -> None:
    copy = machine.copy("early.db")
    machine.release(0)
    machine.restore(copy)
    with closing(SiteStore(machine.home / "site.db", ManualClock())) as unmarked:
        ledger = machine.ledger(unmarked)
        for _ in range(3):
            ledger.reserve_round(7, 2)
    with closing(machine.open()) as store, pytest.raises(LocalError, match="older copy"):
        store.check_high_water()


def test_a_home_on_a_machine_that_never_saw_it_asks_first(machine: Machine) -> None:
    machine.mark.reset(Mark(0, bytes(32), 0))
    machine.mark.path.unlink()
    with closing(machine.open()) as store:
        store.check_high_water()  # nothing was ever released
    machine.release(0)
    machine.mark.path.unlink()
    with closing(machine.open()) as store, pytest.raises(LocalError, match="no high-water mark"):
        store.check_high_water()


def test_what_was_lost_counts_as_spent_in_full(machine: Machine, old: SiteStore) -> None:
    ledger = machine.ledger(old)
    whole = ledger.lines(BUDGET)[0].spent + ledger.lines(BUDGET)[0].reserved
    assert ledger.accept_loss(by="ada") == [7]
    (line,) = ledger.lines(BUDGET)
    assert (line.spent, line.reserved) == (pytest.approx(whole), 0)
    known = old.plan_of_run(7)
    assert known is not None
    assert known.state == "withdrawn"
    with pytest.raises(LocalError, match="counts as spent in full"):
        ledger.reserve_run(plan(), BUDGET)
    old.check_high_water()
    assert machine.mark.read() == Mark(5, old.ledger_end().head, 0)
    ledger.verify(KEY.public_key().public_bytes_raw())


def test_a_run_that_was_over_is_not_lost(machine: Machine) -> None:
    with closing(machine.open()) as store:
        store.decide_plan(plan().digest(), "finished", "coordinator")
        assert machine.ledger(store).accept_loss(by="ada") == []


def test_the_mark_never_moves_back(machine: Machine) -> None:
    mark = machine.mark
    for entries, masked in ((5, 1), (4, 1), (5, 0), (5, 1)):
        mark.advance(Mark(entries, bytes(32), masked))
    assert mark.read() == Mark(5, bytes(32), 1)
    mark.advance(Mark(5, bytes(32), 2))
    assert mark.read() == Mark(5, bytes(32), 2)


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps({"entries": "x", "head": "", "masked": 0})])
def test_a_damaged_mark_is_no_mark_at_all(machine: Machine, text: str) -> None:
    machine.release(0)
    machine.mark.path.write_text(text)
    with closing(machine.open()) as store, pytest.raises(LocalError, match="damaged"):
        store.check_high_water()


def test_sites_and_federations_have_marks_of_their_own() -> None:
    assert len({mark_name(site, root) for site in ("north", "east") for root in (b"a" * 32, b"b" * 32)}) == 4


def test_the_mark_lies_in_the_users_state() -> None:
    assert state_folder({"XDG_STATE_HOME": "/var/lib/state"}) == Path("/var/lib/state/foedus")
    assert state_folder({}) == Path.home() / ".local" / "state" / "foedus"
