"""What an operator can do with models, plans and runs: each action once, for whichever interface asks.

Membership is in `registry`. Everything that can be checked is checked here, before any site is asked. torch runs in
child processes only.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_common.adapters import AdapterSpec, adapter_bytes, load_adapter, parse_spec
from foedus_common.clock import Clock
from foedus_common.errors import LocalError
from foedus_common.identity import SignedPlan, SignedRoster, parse_roster
from foedus_common.model_folder import manifest_sha256, verify
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import AgreedPlan, RunPlan, read_plan, schedule
from foedus_common.privacy.accounting import View, calibrate, epsilons, event_of_phase
from foedus_common.privacy.statement import about_epsilons
from foedus_common.randomness import RandomBytes
from foedus_common.terms import field_layout
from foedus_server.cohorts import outlook
from foedus_server.config import Home
from foedus_server.release.evaluation import Score, evaluate
from foedus_server.release.export import Facts, export
from foedus_server.store import Evaluation, Model, Run, Store

PREPARE_SECONDS = 600

Prepare = Callable[[Path, Path, Path], Mapping[str, Any]]
"""prepare(model folder, plan file, folder to write into): see `foedus_server.prepare.prepare`."""


def prepare_in_child(model: Path, plan: Path, out: Path) -> dict[str, Any]:
    """In a process of its own, so that this one need not load torch. Raises LocalError."""
    told: dict[str, Any] = json.loads(run_child("foedus_server.prepare", [str(model), str(plan), str(out)]))
    return told


@dataclass(frozen=True)
class Prepared:
    """A plan with everything that was solved for it, not yet signed. `first_adapter`: safetensors bytes."""

    agreed: AgreedPlan
    spec: AdapterSpec
    first_adapter: bytes


@dataclass(frozen=True)
class RoundScore:
    """What the adapter reached after `round` rounds (counted from 1; 0 is what the run starts from)."""

    round: int
    score: Score

    @property
    def rows(self) -> int:
        return self.score.rows

    @property
    def accuracy(self) -> float:
        return self.score.accuracy

    @property
    def standard_error(self) -> float:
        return self.score.standard_error

    def as_json(self) -> dict[str, Any]:
        facts = {"round": self.round, "accuracy": self.accuracy, "standard_error": self.standard_error}
        return {**facts, **dataclasses.asdict(self.score)}


class Operator:
    """The operator's actions on one home."""

    def __init__(self, home: Home, clock: Clock, random: RandomBytes, make_adapter: Prepare = prepare_in_child) -> None:
        """make_adapter: how a plan's adapter is made from the model."""
        self.home = home
        self.store: Store = home.store(clock)
        self.objects = ObjectStore(home.objects)
        self._clock = clock
        self._random = random
        self._make_adapter = make_adapter

    # --- Models ---

    def add_model(self, folder: Path, name: str | None = None) -> Model:
        """Reads and hashes a model folder. Raises LocalError when it holds anything but safetensors and JSON."""
        return self.store.runs.add_model(name or folder.resolve().name, manifest_sha256(folder), folder.resolve())

    def _model_folder(self, plan: RunPlan) -> Path:
        """The plan's model on this machine, hashed again. Raises LocalError when it is not here or has changed."""
        for model in self.store.runs.models():
            if model.manifest_sha256 == plan.model.sha256:
                verify(Path(model.path), model.manifest_sha256)
                return Path(model.path)
        raise LocalError(
            f"No model with the manifest {plan.model.sha256[:12]}… was added here; `foedus model add FOLDER` adds it, "
            "and `foedus model list` prints the hash that belongs into [model] sha256."
        )

    # --- Plans ---

    def prepare(self, path: Path) -> Prepared:
        """Checks a plan whole: its numbers, its model, what it trains, how much noise its epsilon takes.

        Raises LocalError with the first thing that cannot be.
        """
        plan = read_plan(path)
        with tempfile.TemporaryDirectory(dir=self.home.path, prefix=".prepare-") as folder:
            made = self._make_adapter(self._model_folder(plan), path, Path(folder))
            spec = parse_spec((Path(folder) / "spec.json").read_bytes())
            first_adapter = (Path(folder) / "first_adapter.safetensors").read_bytes()
        sizes = [spec.size(phase.train) for phase in plan.phase]
        agreed = AgreedPlan(
            run_id=int.from_bytes(self._random(8), "big") >> 1 or 1,
            plan=plan,
            noise_multipliers=calibrate(plan, sizes) if plan.privacy.on else (),
            trained=tuple(spec.parts(phase.train) for phase in plan.phase),
            spec_sha256=spec.digest().hex(),
            first_adapter_sha256=ObjectRef(made["first_adapter_sha256"], len(first_adapter)).sha256,
        )
        load_adapter(first_adapter, spec)
        return Prepared(agreed, spec, first_adapter)

    def submit(self, path: Path) -> Run:
        """Checks the plan, signs it and puts it before the sites as soon as the coordinator is up.

        Raises LocalError for a plan that cannot be, or while there is no roster to take part.
        """
        if self.store.members.roster() is None:
            raise LocalError("There is no roster yet; approve the sites and run `foedus roster sign`.")
        prepared = self.prepare(path)
        agreed, runs = prepared.agreed, self.store.runs
        self.objects.put(prepared.first_adapter)
        signed = SignedPlan.sign(agreed, self.home.plan_key())
        runs.submit(agreed.run_id, agreed.plan.run.name, path.read_text(encoding="utf-8"), agreed.plan.rounds)
        runs.agree(agreed.run_id, signed.to_bytes(), agreed.digest(), prepared.spec.canonical())
        return runs.move(agreed.run_id, ["submitted"], "inviting")

    def outlook(self, agreed: AgreedPlan) -> str:
        """What a round of the plan needs if every site of the newest roster takes part; "" where there is none yet."""
        newest = self.store.members.roster()
        return "" if newest is None else outlook(agreed, parse_roster(SignedRoster.from_bytes(newest[1]).canonical))

    # --- Runs ---

    def stop(self, run: Run) -> Run:
        """The run ends after the message under way. Raises LocalError when it has ended already."""
        return self.store.runs.move(run.run_id, ["inviting", "running"], "stopping", "stopped by the operator")

    def resume(self, run: Run) -> Run:
        """A stopped or failed run goes on after its last committed round, with the sites that agree to it once more.

        Raises LocalError when it is neither.
        """
        return self.store.runs.move(run.run_id, ["stopped", "failed"], "inviting")

    def agreed(self, run: Run) -> AgreedPlan:
        """The run's agreed plan, its signature checked against the home's own key."""
        assert run.signed_plan is not None  # `submit` agrees before anything else can see the run
        public = self.home.plan_key().public_key().public_bytes_raw()
        return SignedPlan.from_bytes(run.signed_plan).verify(public)

    def spec(self, run: Run) -> AdapterSpec:
        assert run.spec is not None
        return parse_spec(run.spec)

    def adapters(self, run: Run) -> list[ObjectRef]:
        """The adapter after each committed round; before the first, the one it starts from."""
        return [adapter for _, adapter in self._adapters(run)]

    def _adapters(self, run: Run) -> list[tuple[int, ObjectRef]]:
        """The same, each after the number of rounds that led to it."""
        attempts = self.store.runs.committed(run.run_id)
        committed = [(attempt.round + 1, attempt.adapter) for attempt in attempts if attempt.adapter]
        return committed or [(0, ObjectRef(self.agreed(run).first_adapter_sha256, adapter_bytes(self.spec(run))))]

    def export(self, run: Run, folder: Path) -> None:
        """Writes the newest adapter as a folder. Raises LocalError when the folder is not empty."""
        agreed, spec = self.agreed(run), self.spec(run)
        adapter = load_adapter(self.objects.read(self.adapters(run)[-1]), spec)
        committed = self.store.runs.committed(run.run_id)
        sites = sorted({site for attempt in committed for site in attempt.survivors})
        export(folder, agreed, spec, adapter, Facts(tuple(sites), run.rounds_done, epsilons(agreed)))

    def evaluate(self, run: Run, data: Path, text: str, label: str, every_round: bool) -> list[RoundScore]:
        """Accuracy of the newest adapter, or of each round's, on held-out rows; in a child process, and kept.

        Raises LocalError when the rows do not fit the plan, or the model is not here.
        """
        agreed, chosen = self.agreed(run), self._adapters(run)[None if every_round else -1 :]
        files = [self.objects.path(adapter) for _, adapter in chosen]
        scores = evaluate(self._model_folder(agreed.plan), agreed, files, data, text=text, label=label)
        results = [RoundScore(number, score) for (number, _), score in zip(chosen, scores, strict=True)]
        for result in results:
            self.store.runs.add_evaluation(
                Evaluation(run.run_id, result.round, str(data), result.rows, result.accuracy, self._clock.now())
            )
        return results


def describe(agreed: AgreedPlan) -> dict[str, Any]:
    """What a plan means in numbers, for `plan check` and for whoever decides on it."""
    plan = agreed.plan
    rounds = schedule(plan)
    phases = [
        {
            "train": phase.train,
            "rounds": phase.rounds,
            "parameters": agreed.size(number),
            "noise_multiplier": agreed.noise_multipliers[number] if agreed.noise_multipliers else None,
            "release": _release(agreed, number),
            "bytes_up_per_round": field_layout(agreed, next(r for r in rounds if r.phase == number)).size,
        }
        for number, phase in enumerate(plan.phase)
    ]
    spent = epsilons(agreed)
    return {
        "name": plan.run.name,
        "digest": agreed.digest().hex(),
        "privacy_unit": plan.privacy.unit,
        "epsilon_local": spent and spent.local,
        "epsilon_central": spent and spent.central,
        "about_epsilons": about_epsilons(agreed),
        "delta": plan.privacy.delta,
        "rounds": plan.rounds,
        "phases": phases,
    }


def _release(agreed: AgreedPlan, phase: int) -> dict[str, dict[str, float]] | None:
    """What one release of a phase costs in the plan's unit of privacy, by view."""
    if not agreed.plan.privacy.on:
        return None
    views: tuple[View, ...] = ("local", "central")
    return {view: dataclasses.asdict(event_of_phase(agreed, phase, view)) for view in views}


def as_facts(run: Run, operator: Operator) -> dict[str, Any]:
    """A run as JSON: what `run show` prints."""
    attempts = operator.store.runs.attempts(run.run_id)
    return {
        "run": str(run.run_id),
        "name": run.name,
        "state": run.state,
        "reason": run.reason,
        "rounds": run.rounds,
        "rounds_done": run.rounds_done,
        "plan": describe(operator.agreed(run)),
        "attempts": [
            {key: value for key, value in dataclasses.asdict(attempt).items() if key not in ("adapter", "optimizer")}
            for attempt in attempts
        ],
        "evaluations": operator.store.runs.evaluations(run.run_id),
    }


def run_child(module: str, arguments: Sequence[str]) -> str:
    """Runs a module of ours in a child process; its standard output.

    Raises LocalError with the child's own sentence, or with how it ended.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PREPARE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise LocalError(f"{module} took more than {PREPARE_SECONDS} seconds and was ended.") from None
    if child.returncode == 0:
        return child.stdout
    last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise LocalError(last if child.returncode == 2 else f"{module} failed ({child.returncode}): {last}")
