"""The privacy ledger: reserved before data is opened, never refunded once released.

A run is reserved whole when it is approved, and the approval itself is an entry: who, when, for what, how much, until
when. Each training of a round is a charge of its own: reserved (on disk) before data is opened, released in the same
transaction that puts the vector into the outbox, committed when the coordinator acknowledges it. Closing a run returns
what was never released; what may have been sent counts as spent. Entries are hash-chained and signed by the site. What
they amount to is for `accounts`; knows no SQL, and caps are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_client.data import Survey, share_rows
from foedus_client.ledger.accounts import (
    Account,
    Budget,
    Commitment,
    Consent,
    Run,
    approval,
    beyond,
    fold,
    rare_delta,
    reservation,
)
from foedus_client.store import OVER, Dataset, SiteStore
from foedus_common.canonical import digest, labelled
from foedus_common.clock import DAY, Clock, iso
from foedus_common.errors import LocalError, PolicyRefusal, RemoteError
from foedus_common.identity import verify as verify_signature
from foedus_common.journal import START, BrokenChain, Checkpoint, Entry, follows, next_entry
from foedus_common.journal import verify as verify_chain
from foedus_common.plan import AgreedPlan
from foedus_common.privacy import accounting
from foedus_common.protocol.messages import RoundTerms, VectorRef

KEY = "ledger_key"
"""Where the store keeps the public key that signs the ledger now, in hexadecimal digits."""


@dataclass(frozen=True)
class Line:
    """One line of `foedus-site ledger`. Epsilons at `delta`; decisions count `spent + reserved` against `cap`.

    left: epsilon of the largest further run that would be admitted (as one Gaussian). today: spent in the last 24
    hours, of `cap_per_day`.
    """

    account: str
    datasets: tuple[str, ...]
    delta: float
    cap: float
    spent: float
    reserved: float
    left: float
    today: float
    cap_per_day: float
    runs: int
    releases: int
    releases_without_privacy: int


class Ledger:
    """The accounts of a site, kept in its store. Every method that writes is one transaction, on disk on return."""

    def __init__(
        self, store: SiteStore, clock: Clock, sign: Callable[[bytes], bytes], public_key: bytes | None = None
    ) -> None:
        """sign: the site's Ed25519 signature (64 bytes) of a message. public_key: its other half (32 bytes); with it,
        a change of keys is entered into the ledger, and a ledger that has gone over to newer keys is not written."""
        self._store = store
        self._clock = clock
        self._sign = sign
        self._public_key = public_key
        if public_key is not None and store.meta(KEY) != public_key.hex():
            self._adopt(public_key)

    # --- Accounts ---

    def add_dataset(self, name: str, path: Path, text: str, label: str, survey: Survey) -> Dataset:
        """Keep a dataset that `data.survey` found good; open its account, or join the one it shares rows with.

        Raises LocalError when the name is taken, when the same rows are there under another name, or when the file
        shares rows with datasets of two accounts.
        """
        with self._store.transaction("add dataset"):
            dataset = Dataset(
                name=name,
                account=self._account_for(name, survey),
                path=path.absolute(),
                text_column=text,
                label_column=label,
                file_sha256=survey.file_sha256,
                rows_sha256=survey.rows_sha256,
                rows=survey.rows,
                label_counts=survey.label_counts,
                added_at=self._clock.now(),
            )
            self._store.add_dataset(dataset, survey.row_keys)
            self._append(
                "add_dataset",
                dataset=name,
                account=dataset.account,
                rows_sha256=survey.rows_sha256,
                blind=self._blind(survey.rows_sha256),
            )
            return dataset

    def accounts(self) -> dict[str, Account]:
        """Every account, by name."""
        return fold(entry for entry, _ in self._store.ledger_entries())

    def account(self, dataset: str) -> Account:
        """The account that pays for a dataset. Raises LocalError for a name that was never added."""
        for account in self.accounts().values():
            if dataset in account.datasets:
                return account
        raise LocalError(f"There is no dataset named {dataset!r} here; add it with `foedus-site data add`.")

    def lines(self, budget: Budget) -> list[Line]:
        """What `foedus-site ledger` shows, one line per account."""
        since = self._clock.now() - DAY
        return [_line(account, budget, since) for account in self.accounts().values()]

    def run(self, run_id: int) -> Run:
        """What a run has reserved and spent. Raises LocalError for a run that was never reserved."""
        for account in self.accounts().values():
            if run_id in account.runs:
                return account.runs[run_id]
        raise LocalError(f"Run {run_id} has no reservation in the ledger; approve its plan first.")

    # --- A run ---

    def reserve_run(self, agreed: AgreedPlan, budget: Budget, *, capped: bool = True) -> None:
        """Set aside all that the run may release; again for an open run changes nothing.

        A run that was closed is opened again: what it released stays spent, what it trained stays counted, and the
        whole of it has to fit once more. budget: of the dataset's life. capped=False only where site policy allows runs
        without privacy and no cap can hold. Raises PolicyRefusal when the budget does not admit the run, LocalError for
        an unknown dataset, or a run id that another plan has.
        """
        commitment = Commitment.of(agreed)
        with self._store.transaction("reserve run"):
            account = self.account(commitment.dataset)
            known = next(
                (a.runs[commitment.run_id] for a in self.accounts().values() if commitment.run_id in a.runs), None
            )
            if known and known.commitment != commitment:
                raise LocalError(f"Run {commitment.run_id} is in the ledger under another plan.")
            if known and known.lost:
                raise LocalError(
                    f"Run {commitment.run_id} counts as spent in full, for the ledger's newest entries about it were "
                    "lost; it cannot go on here."
                )
            if known and known.open:
                return
            if capped and not account.admits(commitment, budget):
                raise PolicyRefusal([beyond(account, commitment, budget)])
            if known:
                self._append("reopen_run", run_id=commitment.run_id, site_delta=budget.delta)
            else:
                self._append("reserve_run", **reservation(commitment, budget.delta))

    def approve(
        self, agreed: AgreedPlan, by: str, delta: float, epsilon_cap: float | None, expires_at: float | None
    ) -> None:
        """Enter somebody's yes to the plan of a reserved run; a later one counts in place of an earlier one.

        Arguments as in `Consent`. Raises LocalError when the run is not reserved or is closed.
        """
        with self._store.transaction("approve"):
            self._open_run(agreed.run_id)
            decided = {"by": by, "delta": delta, "epsilon_cap": epsilon_cap, "expires_at": expires_at}
            self._append("approve", **approval(agreed, **decided))

    def check_approval(self, run_id: int, plan_digest: bytes) -> Consent:
        """The approval by which a round of this plan may begin now, its signature checked.

        Raises PolicyRefusal when there is none, it is for another plan, or it has expired; BrokenChain when this site
        did not sign it.
        """
        consent = self.run(run_id).consent
        if consent is None or consent.plan_digest != plan_digest.hex():
            raise PolicyRefusal([f"Run {run_id} has no approval in the ledger; withdraw from it, or approve it anew."])
        self._check_signature(consent.number)
        if not consent.holds(self._clock.now()):
            raise PolicyRefusal(
                [
                    f"The approval of run {run_id} by {consent.by} ended on {iso(consent.expires_at or 0)}; "
                    f"`foedus-site approve {run_id}` renews it."
                ]
            )
        return consent

    def reserve_round(self, run_id: int, round_index: int, budget: Budget | None = None) -> int:
        """Charge one training of a round, before data is opened; gives the charge's number.

        Every call is a new charge: one that was trained before a crash and never reached the outbox stays reserved
        until the run is closed. budget: whose cap on a day is to hold. Raises PolicyRefusal when the plan's retries are
        used up, this one would cost more than was approved, or a day has seen enough; LocalError when the run is not
        reserved or is closed.
        """
        with self._store.transaction("reserve round"):
            run = self._open_run(run_id)
            phase = run.commitment.phase(round_index)
            if run.charges_of(round_index):
                _require_retry(run, round_index)
            _require_consent_covers(run, round_index)
            if budget is not None:
                self._require_day_allows(run, phase, budget)
            return self._append("reserve_round", run_id=run_id, round=round_index, phase=phase).number

    def release(self, charge: int, terms: RoundTerms, vector: VectorRef) -> None:
        """Spend a charge and put its vector into the outbox: from here on it may be sent and is never refunded.

        The vector's object has to be on disk. Raises LocalError unless the charge is reserved, for this plan and
        round, in an open run; PolicyRefusal for a second vector of a round without privacy.
        """
        with self._store.transaction("release"):
            run = self._open_run(terms.run_id)
            paid = {c.number for c in run.charges_of(terms.round) if c.state == "reserved"}
            if charge not in paid or terms.plan_digest.hex() != run.commitment.plan_digest:
                raise LocalError(f"Charge {charge} does not pay for round {terms.round} of run {terms.run_id}.")
            _require_first_without_privacy(run, terms.round)
            self._append("release", run_id=terms.run_id, charge=charge)
            self._store.put_vector(charge, terms, vector)

    def commit(self, run_id: int, round_index: int) -> None:
        """The coordinator acknowledged the round: mark what was released for it. Again changes nothing."""
        with self._store.transaction("commit"):
            for charge in self.run(run_id).charges_of(round_index):
                if charge.state == "released":
                    self._append("commit", run_id=run_id, charge=charge.number)
                    self._store.acknowledge(charge.number)

    def close_run(self, run_id: int) -> None:
        """The run is over: return what was never released. Again, or for a run never reserved, changes nothing."""
        with self._store.transaction("close run"):
            if any(run_id in a.runs and a.runs[run_id].open for a in self.accounts().values()):
                self._append("close_run", run_id=run_id)

    def accept_loss(self, by: str) -> list[int]:
        """The file is an older copy and there is no newer one: every run that could have gone on since counts as spent
        in full, and this site takes part in it no more. Gives those runs. by: who decided so."""
        with self._store.transaction("accept loss"):
            held = [run_id for account in self.accounts().values() for run_id in account.runs]
            plans = {run_id: self._store.plan_of_run(run_id) for run_id in held}
            lost = [run_id for run_id, plan in plans.items() if plan is None or plan.state not in OVER]
            self._append("accept_loss", checked=False, runs=lost, by=by)
            for run_id in lost:
                if (plan := plans[run_id]) and plan.state == "approved":
                    self._store.decide_plan(plan.digest, "withdrawn", by)
        self._store.accept_high_water()
        return lost

    # --- The chain ---

    def verify(self, public_key: bytes, checkpoints: Iterable[Checkpoint] = ()) -> Checkpoint:
        """Recompute the chain and check every signature; gives its end.

        public_key: the site's, 32 bytes; each change of keys names the key before. checkpoints: heads that others kept.
        Raises BrokenChain, which names the first entry that was altered, is missing or is not signed by this site, and
        LocalError when the whole is an older copy.
        """
        entries = self._store.ledger_entries()
        self._store.check_high_water()
        end = verify_chain((entry for entry, _ in entries), checkpoints, "ledger")
        for key, (entry, signature) in zip(_keys(entries, public_key), entries, strict=True):
            try:
                verify_signature(key, signature, _statement(entry), "the entry")
            except RemoteError:
                raise BrokenChain(entry.number, "it is not signed by this site", "ledger") from None
        return end

    def keys(self, public_key: bytes) -> set[bytes]:
        """All that this site ever signed with; public_key: the newest, 32 bytes."""
        return {public_key, *_keys(self._store.ledger_entries(), public_key)}

    def history(self, budget: Budget, points: int = 24) -> dict[str, list[tuple[float, float]]]:
        """By account: (Unix seconds, epsilon spent by then), from its first entry on, at most so many `points`."""
        entries = [entry for entry, _ in self._store.ledger_entries()]
        found: dict[str, list[tuple[float, float]]] = {}
        for name, account in fold(entries).items():
            moments = [entry for entry in entries if _changes(entry.event, account)]
            chosen = [moments[index * (len(moments) - 1) // max(1, points - 1)] for index in range(points)]
            numbers = sorted({entry.number: entry for entry in chosen}.items())
            found[name] = [
                (entry.event["at"], fold(entries[:number])[name].epsilon(budget.delta)) for number, entry in numbers
            ]
        return found

    # --- Plumbing ---

    def _append(self, event: str, checked: bool = True, **details: Any) -> Entry:
        if checked:
            self._store.check_high_water()
        if self._public_key is not None and self._store.meta(KEY) != self._public_key.hex():
            raise LocalError("This site has newer keys than the daemon started with; start it again.")
        entry = next_entry(self._store.ledger_end(), self._clock.now(), event, details)
        self._store.append_entry(entry, self._sign(_statement(entry)))
        return entry

    def _blind(self, rows_sha256: str) -> str:
        """64 hexadecimal digits that nobody without this site's key can foresee. The coordinator is shown heads of the
        chain: with them in the entry, a head confirms no guess of the rows."""
        return digest("ledger-blind", self._sign(labelled("ledger-blind", rows_sha256))).hex()

    def _adopt(self, public_key: bytes) -> None:
        """Entries are signed by another key from here on; the first of them vouches for the key before."""
        with self._store.transaction("adopt the key"):
            before = self._store.meta(KEY)
            self._store.set_meta(KEY, public_key.hex())
            if before is not None:
                self._append("new_key", previous=before)

    def _check_signature(self, number: int) -> None:
        """Raises BrokenChain unless this site signed the entry, and it is in its place."""
        if self._public_key is None:
            return
        entries = self._store.ledger_entries()
        entry, signature = entries[number - 1]
        before = Checkpoint(number - 1, entries[number - 2][0].head) if number > 1 else START
        if not follows(entry, before):
            raise BrokenChain(number, "its content does not match its hash")
        try:
            verify_signature(_keys(entries, self._public_key)[number - 1], signature, _statement(entry), "the entry")
        except RemoteError:
            raise BrokenChain(number, "it is not signed by this site") from None

    def _require_day_allows(self, run: Run, phase: int, budget: Budget) -> None:
        """Raises PolicyRefusal when one more training would pass what a day may spend of the dataset."""
        commitment, now = run.commitment, self._clock.now()
        account = self.account(commitment.dataset)
        if not account.admits_today(commitment.run_id, phase, budget, now):
            spent = account.spent_since(now - DAY, budget.delta)
            raise PolicyRefusal(
                [
                    f"Dataset {commitment.dataset!r} has spent epsilon {spent:.4g} within 24 hours, and one more round "
                    f"could pass the {budget.per_day:.4g} (at delta {budget.delta:g}) of [policy] max_epsilon_per_day."
                ]
            )

    def _open_run(self, run_id: int) -> Run:
        run = self.run(run_id)
        if not run.open:
            raise LocalError(f"Run {run_id} is closed in the ledger; it spends nothing more.")
        return run

    def _account_for(self, name: str, survey: Survey) -> str:
        """The account of a new dataset: its own, or the one that has some of its rows already."""
        accounts = set()
        for other in self._store.datasets():
            if other.rows_sha256 == survey.rows_sha256:
                raise LocalError(f"The same rows were added already, as {other.name!r}; use that dataset.")
            one_file = other.file_sha256 == survey.file_sha256  # another of its columns is about the same people
            if one_file or share_rows(self._store.row_keys(other.name), survey.row_keys):
                accounts.add(other.account)
        if len(accounts) > 1:
            raise LocalError(
                f"The file shares rows with datasets of several ledger lines ({', '.join(sorted(accounts))}); "
                "leave out the rows of all but one."
            )
        return accounts.pop() if accounts else name


def _require_retry(run: Run, round_index: int) -> None:
    """Raises PolicyRefusal unless the round, trained before, may be trained once more."""
    commitment = run.commitment
    again = f"Round {round_index} of run {commitment.run_id} was trained before"
    if run.retries >= commitment.retries:
        raise PolicyRefusal([f"{again}, and the {commitment.retries} retries of its plan are used up."])
    if not commitment.private:
        _require_first_without_privacy(run, round_index)
        return
    costs = commitment.cost(run.after_retry(commitment.phase(round_index)))
    deltas = {commitment.delta, run.delta, rare_delta(run.delta)}
    if any(accounting.epsilon(costs, delta) > commitment.epsilon(delta) for delta in deltas):
        raise PolicyRefusal([f"{again}, and a retry in this phase would cost more than was approved."])


def _require_first_without_privacy(run: Run, round_index: int) -> None:
    """Raises PolicyRefusal when a vector of the round was released and no noise tells it from the next."""
    if not run.commitment.private and any(charge.state != "reserved" for charge in run.charges_of(round_index)):
        raise PolicyRefusal(
            [
                f"Round {round_index} of run {run.commitment.run_id} was released before, and without privacy two sums "
                "of one round would show their difference."
            ]
        )


def _require_consent_covers(run: Run, round_index: int) -> None:
    """Raises PolicyRefusal unless one more training stays within the epsilon that was approved."""
    consent, commitment = run.consent, run.commitment
    if consent is None or consent.epsilon_cap is None or not commitment.private:
        return
    if commitment.epsilon(consent.delta) <= consent.epsilon_cap:
        return  # the whole run does, so whatever `_require_retry` lets through does as well
    counts = list(run.spent_since(-math.inf))
    counts[commitment.phase(round_index)] += 1
    cost = accounting.epsilon(commitment.cost(counts), consent.delta)
    if cost > consent.epsilon_cap:
        raise PolicyRefusal(
            [
                f"This round would bring run {commitment.run_id} to epsilon {cost:.4g}, and it was approved for "
                f"{consent.epsilon_cap:.4g}."
            ]
        )


def _changes(event: Mapping[str, Any], account: Account) -> bool:
    """Whether an entry may change what the account has spent."""
    if event["event"] == "add_dataset":
        return bool(event["account"] == account.name)
    if event["event"] == "accept_loss":
        return any(run_id in account.runs for run_id in event["runs"])
    return event["event"] == "release" and event["run_id"] in account.runs


def _line(account: Account, budget: Budget, since: float) -> Line:
    spent, held = account.epsilon(budget.delta), account.epsilon(budget.delta, held=True)
    return Line(
        account=account.name,
        datasets=account.datasets,
        delta=budget.delta,
        cap=budget.epsilon,
        spent=spent,
        reserved=held - spent if held > spent else 0.0,
        left=account.left(budget),
        today=account.spent_since(since, budget.delta),
        cap_per_day=budget.per_day,
        runs=len(account.runs),
        releases=account.releases,
        releases_without_privacy=account.releases_without_privacy,
    )


def _keys(entries: Sequence[tuple[Entry, bytes]], newest: bytes) -> list[bytes]:
    """Under which key each entry has to be signed; known from the end, for every new key names the one before it."""
    keys, key = [], newest
    for entry, _ in reversed(entries):
        keys.append(key)
        if entry.event["event"] == "new_key":
            key = bytes.fromhex(entry.event["previous"])
    return keys[::-1]


def _statement(entry: Entry) -> bytes:
    """What the site signs of an entry: its head stands for all before it."""
    return labelled("ledger", entry.number, entry.head)
