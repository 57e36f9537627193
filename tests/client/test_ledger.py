"""The privacy ledger: nothing is trained unpaid, nothing released is refunded, and nothing in it can be altered unseen.

A failure means that a dataset could lose more privacy than its site's ledger says.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foedus_client.data import Survey, survey
from foedus_client.ledger.accounts import Budget
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError, PolicyRefusal
from foedus_common.journal import BrokenChain, Checkpoint
from foedus_common.objects import ObjectRef
from foedus_common.plan import AgreedPlan, schedule
from foedus_common.privacy import accounting
from foedus_common.protocol.messages import RoundTerms, VectorRef
from foedus_common.terms import round_terms
from plans import agreed_plan

BUDGET = Budget(20.0, 1e-5)
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def small_plan(run_id: int = 7, noise: tuple[float, float] = (20.0, 8.0), **changes: object) -> AgreedPlan:
    """Three head rounds and two adapter rounds, unsampled (so that accounting is quick), and two retries."""
    changes = {
        "phase__0__rounds": 3,
        "phase__1__rounds": 2,
        "phase__1__sampling_rate": 1.0,
        "data__name": "notes",
        **changes,
    }
    return replace(agreed_plan(**changes), run_id=run_id, noise_multipliers=noise)


def without_privacy(run_id: int = 9) -> AgreedPlan:
    phase = {"train": "head", "rounds": 3, "learning_rate": 1.0, "epochs": 1.0, "batch_size": 8}
    return replace(agreed_plan(privacy={"unit": "none"}, phase=[phase], data__name="notes"), run_id=run_id)


def terms(agreed: AgreedPlan, round_index: int) -> RoundTerms:
    return round_terms(agreed, schedule(agreed.plan)[round_index], ObjectRef("d" * 64, 400))


def vector(charge: int) -> VectorRef:
    return VectorRef(charge.to_bytes(32, "big"), 800)


def notes(folder: Path, texts: str = "abc") -> Survey:
    path = folder / f"{texts}.csv"
    path.write_text("text,label\n" + "".join(f"{text},Eye\n" for text in texts))
    return survey(path, "text", "label")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SiteStore]:
    store = SiteStore(tmp_path / "site.db", ManualClock())
    yield store
    store.close()


@pytest.fixture
def ledger(store: SiteStore, tmp_path: Path) -> Ledger:
    ledger = Ledger(store, ManualClock(), KEY.sign)
    ledger.add_dataset("notes", tmp_path / "abc.csv", "text", "label", notes(tmp_path))
    return ledger


def train(ledger: Ledger, agreed: AgreedPlan, round_index: int) -> int:
    """One round up to the outbox."""
    charge = ledger.reserve_round(agreed.run_id, round_index)
    ledger.release(charge, terms(agreed, round_index), vector(charge))
    return charge


def test_a_run_from_approval_to_its_end(ledger: Ledger, store: SiteStore) -> None:
    agreed = small_plan()
    approved = accounting.epsilon(accounting.events_of(agreed), BUDGET.delta)
    ledger.reserve_run(agreed, BUDGET)
    (line,) = ledger.lines(BUDGET)
    assert (line.spent, line.reserved, line.runs) == (0, approved, 1)

    for index in range(5):
        train(ledger, agreed, index)
        ledger.commit(agreed.run_id, index)
    (line,) = ledger.lines(BUDGET)
    assert 0 < line.spent < approved  # the two retries were not needed
    assert line.spent + line.reserved == pytest.approx(approved)

    ledger.close_run(agreed.run_id)
    (line,) = ledger.lines(BUDGET)
    head, adapter = (accounting.event_of_phase(agreed, phase) for phase in (0, 1))
    released = [accounting.repeated(head, 3), accounting.repeated(adapter, 2)]
    assert line.spent == accounting.epsilon(released, BUDGET.delta)
    assert (line.reserved, line.releases, line.releases_without_privacy) == (0, 5, 0)
    assert [entry.event["event"] for entry, _ in store.ledger_entries()] == [
        "add_dataset",
        "reserve_run",
        *["reserve_round", "release", "commit"] * 5,
        "close_run",
    ]


def test_only_what_was_never_released_returns(ledger: Ledger) -> None:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    train(ledger, agreed, 0)  # in doubt: stored for sending, never acknowledged
    ledger.reserve_round(agreed.run_id, 1)  # the site dies before the vector is stored
    ledger.close_run(agreed.run_id)
    (line,) = ledger.lines(BUDGET)
    assert line.spent == accounting.epsilon([accounting.event_of_phase(agreed, 0)], BUDGET.delta)
    assert (line.releases, line.reserved) == (1, 0)


def test_a_run_that_released_nothing_leaves_the_account_untouched(ledger: Ledger) -> None:
    ledger.reserve_run(small_plan(), BUDGET)
    ledger.close_run(7)
    (line,) = ledger.lines(BUDGET)
    assert (line.spent, line.reserved, line.left) == (0, 0, BUDGET.epsilon)


def test_a_charge_survives_the_death_of_the_process(ledger: Ledger, store: SiteStore) -> None:
    ledger.reserve_run(small_plan(), BUDGET)
    script = """
import os, signal, sys
from pathlib import Path
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common.clock import ManualClock

store = SiteStore(Path(sys.argv[1]), ManualClock())
Ledger(store, ManualClock(), lambda message: bytes(64)).reserve_round(7, 0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", script, str(store.path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert [charge.state for charge in ledger.run(7).charges] == ["reserved"]


def test_every_training_of_a_round_is_a_charge_and_a_retry(ledger: Ledger) -> None:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    charges = {ledger.reserve_round(7, 4) for _ in range(3)}
    assert len(charges) == 3
    assert ledger.run(7).retries == 2
    with pytest.raises(PolicyRefusal, match="2 retries of its plan are used up"):
        ledger.reserve_round(7, 4)
    ledger.reserve_round(7, 0)  # another round's first training is not a retry


def test_a_retry_that_costs_more_than_was_approved_is_refused(ledger: Ledger) -> None:
    """Few rows under little noise: the plan puts the retries on the head phase, but here they would cost more."""
    agreed = small_plan(noise=(12.0, 0.5), phase__1__sampling_rate=0.02)
    assert [agreed.releases(phase) for phase in (0, 1)] == [3 + 2, 2]
    ledger.reserve_run(agreed, BUDGET)
    train(ledger, agreed, 0)
    train(ledger, agreed, 0)
    train(ledger, agreed, 4)
    with pytest.raises(PolicyRefusal, match="more than was approved"):
        ledger.reserve_round(7, 4)
    train(ledger, agreed, 0)


def test_retries_do_not_gather_what_each_may_hide_behind_delta(ledger: Ledger) -> None:
    """Rows drawn twice in a billion, and then shown: three retries cost nothing at delta, and one does at a thousandth
    of it, where the plan was found good."""
    rare = {"phase__1__sampling_rate": 2e-9, "secure_aggregation__retries": 20}
    agreed = small_plan(noise=(20.0, 0.125), **rare)
    assert [agreed.releases(phase) for phase in (0, 1)] == [3 + 20, 2]
    ledger.reserve_run(agreed, BUDGET)
    ledger.reserve_round(7, 4)
    with pytest.raises(PolicyRefusal, match="more than was approved"):
        ledger.reserve_round(7, 4)
    ledger.reserve_round(7, 0)
    ledger.reserve_round(7, 0)


def test_a_retry_where_it_costs_less_than_was_approved_is_let_in(ledger: Ledger) -> None:
    agreed = small_plan()
    assert [agreed.releases(phase) for phase in (0, 1)] == [3, 2 + 2]
    ledger.reserve_run(agreed, BUDGET)
    for _ in range(3):
        train(ledger, agreed, 0)
    assert ledger.run(7).retries == 2


def test_what_is_not_reserved_cannot_be_spent(ledger: Ledger, store: SiteStore) -> None:
    agreed = small_plan()
    with pytest.raises(LocalError, match="no reservation"):
        ledger.reserve_round(7, 0)
    ledger.reserve_run(agreed, BUDGET)
    with pytest.raises(LocalError, match="no such round"):
        ledger.reserve_round(7, 5)
    charge = ledger.reserve_round(7, 1)
    for wrong_charge, wrong_terms in (
        (charge + 1, terms(agreed, 1)),
        (charge, terms(agreed, 2)),
        (charge, replace(terms(agreed, 1), plan_digest=bytes(32))),
    ):
        with pytest.raises(LocalError, match="does not pay"):
            ledger.release(wrong_charge, wrong_terms, vector(charge))
    ledger.release(charge, terms(agreed, 1), vector(charge))
    with pytest.raises(LocalError, match="does not pay"):
        ledger.release(charge, terms(agreed, 1), vector(charge))
    waiting = store.outbox(7, 1)
    assert waiting is not None
    assert (waiting.vector, waiting.charged) == (vector(charge), True)


def test_a_closed_run_spends_nothing_more(ledger: Ledger, store: SiteStore) -> None:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    late = ledger.reserve_round(7, 0)
    ledger.close_run(7)
    ledger.close_run(7)
    ledger.close_run(1234)  # never reserved: nothing to return
    with pytest.raises(LocalError, match="closed"):
        ledger.reserve_round(7, 1)
    with pytest.raises(LocalError, match="closed"):
        ledger.release(late, terms(agreed, 0), vector(late))
    assert store.outbox(7, 0) is None


def test_new_keys_take_over_where_the_old_ones_ended(store: SiteStore, tmp_path: Path) -> None:
    """After a rotation, or under another name in another federation, whoever knows the newest key can check it all."""
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(3)]
    ledgers = []
    for number, key in enumerate(keys):
        ledgers.append(Ledger(store, ManualClock(), key.sign, key.public_key().public_bytes_raw()))
        folder = tmp_path / str(number)
        folder.mkdir()
        ledgers[-1].add_dataset(f"d{number}", folder, "text", "label", notes(folder, "xyz"[number]))
    end = ledgers[-1].verify(keys[-1].public_key().public_bytes_raw())
    events = [entry.event["event"] for entry, _ in store.ledger_entries()]
    assert (end.number, events) == (5, ["add_dataset", "new_key", "add_dataset", "new_key", "add_dataset"])
    assert set(ledgers[-1].accounts()) == {"d0", "d1", "d2"}
    with pytest.raises(BrokenChain, match="entry 4: it is not signed by this site"):
        ledgers[-1].verify(keys[0].public_key().public_bytes_raw())
    with pytest.raises(LocalError, match="newer keys"):  # a daemon that was not started again
        ledgers[0].add_dataset("late", tmp_path, "text", "label", notes(tmp_path, "w"))


def test_a_run_that_is_opened_again_forgets_nothing(ledger: Ledger) -> None:
    """Stopped and taken up again: what it released stays spent, what it trained counts as a retry, and the rest of it
    has to fit once more beside what was reserved meanwhile."""
    agreed, other = small_plan(), small_plan(8)
    ledger.reserve_run(agreed, BUDGET)
    train(ledger, agreed, 0)
    ledger.reserve_round(7, 1)
    ledger.close_run(7)
    spent = ledger.lines(BUDGET)[0].spent

    ledger.reserve_run(agreed, BUDGET)
    (line,) = ledger.lines(BUDGET)
    whole = accounting.epsilon(accounting.events_of(agreed), BUDGET.delta)
    assert (line.spent, line.spent + line.reserved) == (spent, pytest.approx(whole))
    train(ledger, agreed, 1)
    assert ledger.run(7).retries == 1
    ledger.reserve_round(7, 0)
    with pytest.raises(PolicyRefusal, match="retries"):
        ledger.reserve_round(7, 0)

    ledger.close_run(7)
    one_and_a_half = Budget(1.5 * whole, BUDGET.delta)
    ledger.reserve_run(other, one_and_a_half)
    with pytest.raises(PolicyRefusal, match="could pass"):
        ledger.reserve_run(agreed, one_and_a_half)
    assert not ledger.run(7).open


def test_release_and_outbox_are_one(ledger: Ledger, store: SiteStore) -> None:
    """A vector that could not be stored for sending is not charged, and one that is not charged is not stored."""
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    charge = ledger.reserve_round(7, 0)
    store._db.execute("CREATE TRIGGER full BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(LocalError, match="disk full"):
        ledger.release(charge, terms(agreed, 0), vector(charge))
    assert [c.state for c in ledger.run(7).charges] == ["reserved"]
    store._db.execute("DROP TRIGGER full")
    ledger.release(charge, terms(agreed, 0), vector(charge))
    assert [c.state for c in ledger.run(7).charges] == ["released"]


def test_acknowledging_again_changes_nothing(ledger: Ledger, store: SiteStore) -> None:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    ledger.commit(7, 0)
    train(ledger, agreed, 0)
    ledger.commit(7, 0)
    before = store.ledger_end()
    ledger.commit(7, 0)
    assert store.ledger_end() == before
    assert [charge.state for charge in ledger.run(7).charges] == ["committed"]


def test_reserving_the_same_plan_again_changes_nothing_and_another_is_refused(ledger: Ledger, store: SiteStore) -> None:
    ledger.reserve_run(small_plan(), BUDGET)
    before = store.ledger_end()
    ledger.reserve_run(small_plan(), BUDGET)
    assert store.ledger_end() == before
    with pytest.raises(LocalError, match="another plan"):
        ledger.reserve_run(small_plan(noise=(21.0, 8.0)), BUDGET)
    with pytest.raises(LocalError, match="no dataset named 'other'"):
        ledger.reserve_run(small_plan(8, data__name="other"), BUDGET)


def test_a_run_beyond_the_budget_is_refused_with_the_numbers(ledger: Ledger, store: SiteStore) -> None:
    agreed = small_plan()
    needed = accounting.epsilon(accounting.events_of(agreed), BUDGET.delta)
    before = store.ledger_end()
    with pytest.raises(PolicyRefusal, match=f"epsilon {needed:.4g}.*max_epsilon_lifetime"):
        ledger.reserve_run(agreed, Budget(needed - 1e-6, BUDGET.delta))
    assert store.ledger_end() == before
    ledger.reserve_run(agreed, Budget(needed, BUDGET.delta))


def test_a_release_without_privacy_is_an_infinite_epsilon(ledger: Ledger) -> None:
    agreed = without_privacy()
    with pytest.raises(PolicyRefusal):
        ledger.reserve_run(agreed, BUDGET)
    ledger.reserve_run(agreed, BUDGET, capped=False)
    train(ledger, agreed, 0)
    first, second = ledger.reserve_round(9, 1), ledger.reserve_round(9, 1)  # nothing of round 1 was released
    ledger.release(second, terms(agreed, 1), vector(second))
    with pytest.raises(PolicyRefusal, match="their difference"):  # whichever of the two trainings ends first
        ledger.release(first, terms(agreed, 1), vector(first))
    with pytest.raises(PolicyRefusal, match="their difference"):
        ledger.reserve_round(9, 0)
    (line,) = ledger.lines(BUDGET)
    assert (line.spent, line.left, line.releases_without_privacy) == (math.inf, 0, 2)
    with pytest.raises(PolicyRefusal):
        ledger.reserve_run(small_plan(), BUDGET)


# --- Approvals ---


@pytest.fixture
def signed(store: SiteStore, ledger: Ledger) -> Ledger:
    """The ledger as the daemon opens it, with the run's plan approved by Ada for a day."""
    signed = Ledger(store, ManualClock(), KEY.sign, KEY.public_key().public_bytes_raw())
    signed.reserve_run(small_plan(), BUDGET)
    signed.approve(small_plan(), "ada", BUDGET.delta, epsilon_cap=50.0, expires_at=ManualClock().now() + 86_400)
    return signed


def test_an_approval_is_a_signed_record_of_who_what_how_much_and_until_when(signed: Ledger) -> None:
    agreed, now = small_plan(), ManualClock().now()
    consent = signed.check_approval(7, agreed.digest())
    assert consent == signed.run(7).consent
    assert (consent.by, consent.at, consent.expires_at) == ("ada", now, now + 86_400)
    assert (consent.dataset, consent.purpose) == ("notes", agreed.plan.run.purpose)
    assert (consent.plan_digest, consent.epsilon_cap, consent.delta) == (agreed.digest().hex(), 50.0, BUDGET.delta)
    signed.verify(KEY.public_key().public_bytes_raw())


def test_no_round_begins_without_an_approval_of_this_plan(signed: Ledger) -> None:
    with pytest.raises(PolicyRefusal, match="has no approval"):
        signed.check_approval(7, bytes(32))
    signed.reserve_run(small_plan(8), BUDGET)
    with pytest.raises(PolicyRefusal, match="has no approval"):
        signed.check_approval(8, small_plan(8).digest())
    with pytest.raises(LocalError, match="no reservation"):
        signed.approve(small_plan(9), "ada", BUDGET.delta, None, None)


def test_an_approval_ends_at_its_second_and_can_be_renewed(signed: Ledger) -> None:
    clock = signed._clock
    clock.advance(86_400)
    signed.check_approval(7, small_plan().digest())
    clock.advance(0.001)
    with pytest.raises(PolicyRefusal, match=r"by ada ended on .*; `foedus-site approve 7` renews it"):
        signed.check_approval(7, small_plan().digest())
    signed.approve(small_plan(), "bob", BUDGET.delta, None, None)
    assert signed.check_approval(7, small_plan().digest()).by == "bob"


@pytest.mark.parametrize("column", ["signature = zeroblob(64)", "body = replace(body, 'ada', 'eve')"])
def test_an_approval_that_the_site_did_not_sign_counts_for_nothing(
    signed: Ledger, store: SiteStore, column: str
) -> None:
    alter(store, f"UPDATE ledger SET {column} WHERE number = 3")
    with pytest.raises(BrokenChain) as caught:
        signed.check_approval(7, small_plan().digest())
    assert caught.value.number == 3


def test_an_approval_is_found_signed_after_the_keys_were_changed(signed: Ledger, store: SiteStore) -> None:
    new = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
    after = Ledger(store, ManualClock(), new.sign, new.public_key().public_bytes_raw())
    assert after.check_approval(7, small_plan().digest()).by == "ada"


def test_a_run_stops_where_its_approval_s_cap_is(signed: Ledger) -> None:
    """For each number of rounds: a cap of just what they cost lets them in, and the smallest step less does not."""
    agreed = small_plan()
    for trained in range(1, 4):
        cost = accounting.epsilon([accounting.repeated(accounting.event_of_phase(agreed, 0), trained)], BUDGET.delta)
        signed.approve(agreed, "ada", BUDGET.delta, cost * (1 - 1e-12), None)
        with pytest.raises(PolicyRefusal, match=f"to epsilon {cost:.4g}, and it was approved for"):
            signed.reserve_round(7, trained - 1)
        signed.approve(agreed, "ada", BUDGET.delta, cost, None)
        train(signed, agreed, trained - 1)
    assert signed.run(7).spent == (3, 0)


# --- A day ---


def per_day(epsilon: float) -> Budget:
    return replace(BUDGET, per_day=epsilon)


def test_a_day_lets_in_what_fits_and_the_next_day_begins_anew(ledger: Ledger) -> None:
    agreed, clock = small_plan(), ledger._clock
    two = accounting.epsilon([accounting.repeated(accounting.event_of_phase(agreed, 0), 2)], BUDGET.delta)
    ledger.reserve_run(agreed, BUDGET)
    train(ledger, agreed, 0)
    clock.advance(3600)
    with pytest.raises(PolicyRefusal, match=r"within 24 hours, and one more round could pass .* max_epsilon_per_day"):
        ledger.reserve_round(7, 1, per_day(two * (1 - 1e-12)))
    ledger.reserve_round(7, 1, per_day(two))  # in doubt: it may yet be released
    assert ledger.lines(per_day(two))[0].today == two
    with pytest.raises(PolicyRefusal):
        ledger.reserve_round(7, 2, per_day(two))
    clock.advance(82_800)  # the first is a day old now
    ledger.reserve_round(7, 2, per_day(two))
    with pytest.raises(PolicyRefusal):
        ledger.reserve_round(7, 3, per_day(two))


def test_a_day_counts_all_runs_of_a_dataset(ledger: Ledger) -> None:
    first, second = small_plan(), small_plan(8)
    ledger.reserve_run(first, BUDGET)
    ledger.reserve_run(second, BUDGET)
    train(ledger, first, 0)
    events = [accounting.repeated(accounting.event_of_phase(first, 0), 2)]
    with pytest.raises(PolicyRefusal):
        ledger.reserve_round(8, 0, per_day(accounting.epsilon(events, BUDGET.delta) * (1 - 1e-12)))
    ledger.reserve_round(8, 0, per_day(3.0 * accounting.epsilon(events, BUDGET.delta)))


def test_what_was_never_released_returns_to_the_day_and_what_was_lost_does_not(ledger: Ledger) -> None:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    ledger.reserve_round(7, 0)
    ledger.close_run(7)
    assert ledger.lines(BUDGET)[0].today == 0
    ledger.reserve_run(agreed, BUDGET)
    ledger.accept_loss("ada")
    assert ledger.lines(BUDGET)[0].today == accounting.epsilon(accounting.events_of(agreed), BUDGET.delta)


def test_without_privacy_a_day_has_no_cap_that_could_hold(ledger: Ledger) -> None:
    ledger.reserve_run(without_privacy(), BUDGET, capped=False)
    ledger.reserve_round(9, 0, per_day(0.1))
    assert ledger.lines(BUDGET)[0].today == 0


def test_the_history_begins_with_nothing_and_ends_with_what_is_spent(ledger: Ledger) -> None:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    for index in range(5):
        ledger._clock.advance(60)
        train(ledger, agreed, index)
    for points in (2, 4, 24):
        history = ledger.history(BUDGET, points)["notes"]
        assert len(history) == min(points, 6)
        assert history == sorted(history)
        assert (history[0][1], history[-1]) == (0.0, (ledger._clock.now(), ledger.lines(BUDGET)[0].spent))


# --- Datasets ---


def test_datasets_that_share_rows_share_an_account(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_dataset("more", tmp_path / "cde.csv", "text", "label", notes(tmp_path, "cde"))
    ledger.add_dataset("else", tmp_path / "xyz.csv", "text", "label", notes(tmp_path, "xyz"))
    assert ledger.account("more") == ledger.account("notes")
    assert ledger.account("more").datasets == ("notes", "more")
    assert ledger.account("else").name == "else"
    ledger.reserve_run(small_plan(), BUDGET)
    with pytest.raises(PolicyRefusal, match="has spent or reserved"):
        ledger.reserve_run(small_plan(8, data__name="more"), Budget(2.0, 1e-5))
    ledger.reserve_run(small_plan(8, data__name="else"), Budget(2.0, 1e-5))


def test_two_columns_of_one_file_share_an_account(ledger: Ledger, tmp_path: Path) -> None:
    """Every row of either is about the same person."""
    file = tmp_path / "visits.csv"
    file.write_text("history,finding,chapter\nfell,fracture,Bones\nslipped,bruise,Skin\n")
    for column in ("history", "finding"):
        ledger.add_dataset(column, file, column, "chapter", survey(file, column, "chapter"))
    assert ledger.account("finding") == ledger.account("history")


def test_the_same_rows_under_a_second_name_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    for texts in ("abc", "cba"):
        with pytest.raises(LocalError, match="already, as 'notes'"):
            ledger.add_dataset("second", tmp_path / "x.csv", "text", "label", notes(tmp_path, texts))
    with pytest.raises(LocalError, match="exists already"):
        ledger.add_dataset("notes", tmp_path / "x.csv", "text", "label", notes(tmp_path, "xyz"))


def test_a_file_that_would_join_two_accounts_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_dataset("else", tmp_path / "xyz.csv", "text", "label", notes(tmp_path, "xyz"))
    with pytest.raises(LocalError, match="several ledger lines \\(else, notes\\)"):
        ledger.add_dataset("both", tmp_path / "ax.csv", "text", "label", notes(tmp_path, "ax"))


# --- The chain ---


@pytest.fixture
def used(ledger: Ledger) -> Ledger:
    agreed = small_plan()
    ledger.reserve_run(agreed, BUDGET)
    train(ledger, agreed, 0)
    return ledger


def alter(store: SiteStore, statement: str) -> None:
    """What somebody with the file and SQLite could do."""
    store._db.execute("PRAGMA foreign_keys = OFF")
    for trigger in ("ledger_is_never_updated", "ledger_is_never_deleted"):
        store._db.execute(f"DROP TRIGGER {trigger}")
    store._db.execute(statement)


def test_an_untouched_chain_verifies(used: Ledger, store: SiteStore) -> None:
    public = KEY.public_key().public_bytes_raw()
    assert used.verify(public) == store.ledger_end()
    assert used.verify(public, [Checkpoint(4, store.ledger_entries()[3][0].head)]).number == 4


@pytest.mark.parametrize(
    ("statement", "number"),
    [
        ("UPDATE ledger SET body = replace(body, 'notes', 'other') WHERE number = 2", 2),
        ("DELETE FROM ledger WHERE number = 3", 3),
        ("UPDATE ledger SET signature = zeroblob(64) WHERE number = 4", 4),
        ("UPDATE ledger SET head = zeroblob(32) WHERE number = 1", 1),
    ],
)
def test_verify_names_the_first_bad_entry(used: Ledger, store: SiteStore, statement: str, number: int) -> None:
    alter(store, statement)
    with pytest.raises(BrokenChain) as caught:
        used.verify(KEY.public_key().public_bytes_raw())
    assert caught.value.number == number


def test_a_ledger_that_lost_its_end_differs_from_what_others_kept(used: Ledger, store: SiteStore) -> None:
    kept = store.ledger_end()
    alter(store, "DELETE FROM ledger WHERE number = 4")
    public = KEY.public_key().public_bytes_raw()
    assert used.verify(public).number == 3
    with pytest.raises(BrokenChain, match="missing"):
        used.verify(public, [kept])


def test_a_chain_under_another_key_is_not_this_site_s(used: Ledger) -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"s" * 32).public_key().public_bytes_raw()
    with pytest.raises(BrokenChain, match="not signed by this site"):
        used.verify(stranger)


# --- Whatever happens in whatever order ---


RUNS = (7, 8)


class AnyOrder(RuleBasedStateMachine):
    """Rounds, crashes, acknowledgements and two runs, in any order.

    A failure: what was released costs more than was approved, a release is refunded, what is spent decreases, or a cap
    of a run, of any 24 hours or of the lifetime is passed. Not a failure: a refusal, however early.
    """

    @initialize()
    def start(self) -> None:
        self.clock = ManualClock()
        self.folder = tempfile.TemporaryDirectory()
        self.store = SiteStore(Path(self.folder.name) / "site.db", self.clock)
        self.ledger = Ledger(self.store, self.clock, KEY.sign)
        rows = Survey("f" * 64, "r" * 64, b"k" * 16, 1, {"Eye": 1})
        self.ledger.add_dataset("notes", Path("/notes.csv"), "text", "label", rows)
        short = {"phase__0__rounds": 1, "phase__1__rounds": 1, "secure_aggregation__retries": 1}
        self.plans = {run_id: small_plan(run_id, **short) for run_id in RUNS}
        self.approved = accounting.epsilon(accounting.events_of(self.plans[7]), 1e-5)
        self.budget = Budget(1.1 * self.approved, 1e-5, per_day=0.8 * self.approved)
        self.spent = 0.0
        self.reserved_at: dict[int, float] = {}
        self.days: list[tuple[float, int, int]] = []
        self.waiting: list[tuple[int, int, int]] = []
        self.released: list[tuple[int, int]] = []

    @rule(run_id=st.sampled_from(RUNS))
    def approve(self, run_id: int) -> None:
        try:
            self.ledger.reserve_run(self.plans[run_id], self.budget)
        except (PolicyRefusal, LocalError):
            return

    @rule(run_id=st.sampled_from(RUNS), index=st.integers(0, 1))
    def open_data(self, run_id: int, index: int) -> None:
        try:
            self.waiting.append((run_id, index, self.ledger.reserve_round(run_id, index, self.budget)))
            self.reserved_at[self.waiting[-1][2]] = self.clock.now()
        except (PolicyRefusal, LocalError):
            return

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def store_vector(self, data: st.DataObject) -> None:
        run_id, index, charge = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        try:
            self.ledger.release(charge, terms(self.plans[run_id], index), vector(charge))
        except LocalError:
            return
        self.released.append((run_id, index))  # with one round a phase, the phase is the round
        self.days.append((self.reserved_at[charge], run_id, index))

    @rule(run_id=st.sampled_from(RUNS), index=st.integers(0, 1))
    def train(self, run_id: int, index: int) -> None:
        before = len(self.waiting)
        self.open_data(run_id, index)
        if len(self.waiting) > before:
            _, _, charge = self.waiting.pop()
            self.ledger.release(charge, terms(self.plans[run_id], index), vector(charge))
            self.released.append((run_id, index))
            self.days.append((self.reserved_at[charge], run_id, index))

    @rule(hours=st.sampled_from([1, 12, 24]))
    def time_passes(self, hours: int) -> None:
        self.clock.advance(3600 * hours)

    @rule()
    def crash(self) -> None:
        self.waiting.clear()
        self.ledger = Ledger(self.store, self.clock, KEY.sign)

    @rule(run_id=st.sampled_from(RUNS), index=st.integers(0, 1))
    def acknowledge(self, run_id: int, index: int) -> None:
        try:
            self.ledger.commit(run_id, index)
        except LocalError:
            return

    @rule(run_id=st.sampled_from(RUNS))
    def close(self, run_id: int) -> None:
        self.ledger.close_run(run_id)

    @invariant()
    def what_was_released_is_spent_and_within_the_cap(self) -> None:
        account = self.ledger.account("notes")
        events = []
        for run_id, agreed in self.plans.items():
            phases = [phase for run, phase in self.released if run == run_id]
            own = [accounting.event_of_phase(agreed, phase) for phase in phases]
            assert accounting.epsilon(own, self.budget.delta) <= self.approved
            events += own
        assert account.releases == len(self.released)
        assert accounting.epsilon(events, self.budget.delta) <= account.epsilon(self.budget.delta) + 1e-9
        assert account.epsilon(self.budget.delta) <= account.epsilon(self.budget.delta, held=True) + 1e-9
        assert accounting.epsilon(events, self.budget.delta) <= self.budget.epsilon
        assert account.epsilon(self.budget.delta) >= self.spent
        self.spent = account.epsilon(self.budget.delta)

    @invariant()
    def no_day_passes_its_cap(self) -> None:
        """Of any 24 hours, and so of those that begin with a training."""
        for begin, _, _ in self.days:
            late = [(run, phase) for at, run, phase in self.days if begin <= at < begin + 86_400]
            events = [accounting.event_of_phase(self.plans[run], phase) for run, phase in late]
            assert accounting.epsilon(events, self.budget.delta) <= self.budget.per_day + 1e-9

    @invariant()
    def the_chain_holds(self) -> None:
        self.ledger.verify(KEY.public_key().public_bytes_raw())

    def teardown(self) -> None:
        """A greedy coordinator takes whatever is still to be had."""
        if not hasattr(self, "store"):
            return
        for run_id in RUNS:
            self.approve(run_id)
            for index in (1, 1, 1, 0, 0, 0):
                self.train(run_id, index)
            self.what_was_released_is_spent_and_within_the_cap()
        self.store.close()
        self.folder.cleanup()


AnyOrder.TestCase.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
TestAnyOrder = AnyOrder.TestCase
