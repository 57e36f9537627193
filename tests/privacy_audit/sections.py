"""What `make privacy-audit` examines, section by section; each gives the lines of its part of the table.

Where a section needs a model it is either the tests' tiny one, which is quick enough for hundreds of runs, or the
demonstration's own (all-MiniLM-L6-v2 with LoRA of rank 4, on descriptions of ICD-10-CM codes).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from foedus_common.errors import LocalError
from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import RunPlan, read_plan
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from foedus_simulations.alone import agree, pairs
from foedus_simulations.corpora import Corpus, default_cache, icd10, minilm
from plans import run_plan
from privacy_audit import canary, federation, float_noise, inversion, membership, one_step, whole_site
from privacy_audit.faults import FAULTS
from privacy_audit.reference import Reals
from privacy_audit.residuals import Residuals, findings, residuals
from privacy_audit.specimens import Specimen, random_adapter, releases, tiny_plan_of_noise
from privacy_audit.verdicts import ALARM_RATE, Finding, Verdict, alarms, fault_found, summary, verdicts
from seeded import seeded
from tiny_model import rows

CLEAN_RUNS = 100
CANDIDATES, FACTOR_CANDIDATES, TARGETS = 1000, 200, 100
ONE_STEP_RELEASES = 2000


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the audit works: the tiny model's folder, a folder for what it writes, and the seed of all its chance."""

    tiny_model: Path
    scratch: Path
    seed: int

    def random(self, name: str) -> RandomBytes:
        """A stream of its own for every name."""
        return seeded(f"privacy audit {self.seed}, {name}")

    def tiny_specimen(self) -> Specimen:
        agreed = tiny_plan_of_noise(self.tiny_model)
        classifier = TextClassifier.load(self.tiny_model, agreed.plan, dtype="float32")
        return Specimen(LocalTrainer(classifier, agreed, rows(8)), agreed, random_adapter(classifier, self.seed))


Section = Callable[[Bench], list[Verdict]]


# --- The noise of releases ---


def code(bench: Bench) -> list[Verdict]:
    return float_noise.verdicts()


def noise_of_the_real_model(bench: Bench) -> list[Verdict]:
    """One run of the demonstration's model: every test a line of its own."""
    model, corpus = minilm(default_cache()), _corpus()
    plan = _plan(
        model,
        corpus,
        phase=[
            _phase("head", rounds=2, steps=2, sampling_rate=0.2),
            _phase("adapter", rounds=4, steps=2, sampling_rate=0.1) | {"head_scale": 2.0},
        ],
        privacy__clip=0.5,
        privacy__divisor=10,
    )
    classifier = TextClassifier.load(model, plan, dtype="float32")
    agreed = dataclasses.replace(agree(plan, classifier), noise_multipliers=(0.1, 0.1))
    trainer = LocalTrainer(classifier, agreed, pairs(corpus.train[:12]))
    specimen = Specimen(trainer, agreed, random_adapter(classifier, bench.seed))
    phases = residuals(specimen, releases(specimen, bench.random("the real model")))
    lines = verdicts(findings(phases))
    for name, changed in _slight_faults(phases).items():
        lines.append(fault_found(name, alarms(findings(changed))))
    for dtype in ("float32", "bfloat16"):
        classifier = TextClassifier.load(model, plan, dtype=dtype)
        apart = membership.rows_apart(classifier, agreed, specimen.adapter, pairs(corpus.train[:12]))
        lines.append(Verdict(f"no row moves another, {dtype}", f"{apart:.1g} clips", "<= 1e-06", apart <= 1e-6))
    return lines


def _slight_faults(phases: Sequence[Residuals]) -> dict[str, list[Residuals]]:
    """What so many numbers have to show: the same residuals, with a little taken from their noise or kept of it."""

    def changed(change: Callable[[Reals], Reals]) -> list[Residuals]:
        return [dataclasses.replace(phase, noise=change(phase.noise)) for phase in phases]

    return {
        "sigma 2 % too small": changed(lambda noise: 0.98 * noise),
        "5 % of the last step's noise kept": changed(
            lambda noise: math.sqrt(1 - 0.05**2) * noise + 0.05 * np.roll(noise, 1, axis=0)
        ),
    }


def noise_of_a_federation(bench: Bench) -> list[Verdict]:
    """The same tests on the adapters that three sites release together."""
    plan = bench.scratch / "plan.toml"
    plan.write_text(federation.plan_of_federation(manifest_sha256(bench.tiny_model), rounds=6))
    classifier = TextClassifier.load(bench.tiny_model, read_plan(plan), dtype="float32")

    def found() -> list[Finding]:
        outcome = federation.run(plan, bench.tiny_model, classifier, bench.seed)
        return findings(federation.residuals(outcome, classifier))

    lines = [summary("three sites' noises add up in the released adapter", found())]
    with federation.noise_shared_by_all():
        lines.append(fault_found("noise the same at every site", alarms(found())))
    return lines


def noise_of_a_whole_site(bench: Bench) -> list[Verdict]:
    """Where the site is the unit of privacy: its share of the noise, and faults of that path."""
    specimen = whole_site.tiny_specimen_of_site(bench.tiny_model, bench.seed)

    def found(name: str) -> list[Finding]:
        return findings(whole_site.residuals(specimen, bench.random(name)))

    lines = [summary("a clipped update, the site's noise and no more", found("whole site"))]
    lines.append(whole_site.shares_together(specimen.agreed))
    for name, fault in whole_site.SITE_FAULTS.items():
        with fault():
            lines.append(fault_found(name, alarms(found(name))))
    return lines


def rounds_of_one_step(bench: Bench) -> list[Verdict]:
    """What one site sends, and what the sum of the fewest honest sites shows: the central epsilon's own audit."""
    agreed = one_step.tiny_plan_of_one_step(bench.tiny_model)
    classifier = TextClassifier.load(bench.tiny_model, agreed.plan, dtype="float32")
    pair = membership.neighbours(classifier, agreed, random_adapter(classifier, bench.seed))
    honest = one_step.honest(pair)

    def found(sites: int, name: str) -> list[Finding]:
        return one_step.found(pair, sites, ONE_STEP_RELEASES, bench.random(f"one step, {sites} sites, {name}"))

    lines = [
        summary("one site: its sum, the stated noise and no more", found(1, "clean")),
        summary(f"the sum of {honest}: sqrt({honest}) times the noise", found(honest, "clean")),
    ]
    told = membership.distinguish(pair, 4000, bench.random("membership in a sum"), honest)
    lines += membership.verdicts(told, f"membership in the sum of {honest} honest sites")
    for name, fault in one_step.ONE_STEP_FAULTS.items():
        with fault():
            lines.append(fault_found(name, alarms([*found(1, name), *found(honest, name)])))
    return lines


def clean_runs(bench: Bench) -> list[Verdict]:
    """Alarms of correct noise, and whether the p-values are what p-values should be."""
    specimen = bench.tiny_specimen()
    runs = [_findings(specimen, bench.random(f"clean run {number}")) for number in range(CLEAN_RUNS)]
    raised = sum(bool(alarms(found)) for found in runs)
    smallest = min(found.p for run in runs for found in run)
    said = f"{raised}; smallest p of {CLEAN_RUNS * len(runs[0])}: {smallest:.1g}"
    on_empty = [found.p for run in runs for found in run if found.check == "sigma on empty batches"]  # one test, exact
    uniform = float(stats.kstest(on_empty, "uniform").pvalue)
    return [
        Verdict(f"false alarms in {CLEAN_RUNS} clean runs", said, f"0 (rate {ALARM_RATE:g} a run)", raised == 0),
        Verdict("their p-values are uniform", f"p = {uniform:.2g}", f"p >= {ALARM_RATE:g}", uniform >= ALARM_RATE),
    ]


def seeded_faults(bench: Bench) -> list[Verdict]:
    """Each fault with the tests that found it."""
    return list(_faults(bench))


def _faults(bench: Bench) -> Iterator[Verdict]:
    specimen, pair = bench.tiny_specimen(), _neighbours(bench)
    for name, fault in FAULTS.items():
        with fault():
            found = alarms(_findings(specimen, bench.random(name)))
            moved = membership.sensitivity([pair])
            told = _told(pair, bench.random(f"{name}, one record"))
        yield fault_found(name, found + ["sensitivity"] * (not moved.holds) + told)


def _told(pair: membership.Neighbours, random: RandomBytes) -> list[str]:
    """What membership shows of a fault. Noise off the grid is not released at all in a round of one step."""
    try:
        told = membership.distinguish(pair, 500, random)
    except LocalError:
        return ["the encoding refuses it"]
    return [f"mu >= {told.proved:.1f}"] * told.alarm


def _findings(specimen: Specimen, random: RandomBytes) -> list[Finding]:
    return findings(residuals(specimen, releases(specimen, random)))


# --- Attacks ---


def one_record(bench: Bench) -> list[Verdict]:
    pair = _neighbours(bench)
    every = [_neighbours(bench, record) for record in range(5, 12)]
    told = membership.distinguish(pair, 4000, bench.random("membership"))
    return [membership.sensitivity(every), *membership.verdicts(told)]


def _neighbours(bench: Bench, record: int = 5) -> membership.Neighbours:
    agreed = membership.tiny_plan_of_membership(bench.tiny_model)
    classifier = TextClassifier.load(bench.tiny_model, agreed.plan, dtype="float32")
    return membership.neighbours(classifier, agreed, random_adapter(classifier, bench.seed), record)


def canary_in_the_adapter(bench: Bench) -> list[Verdict]:
    return canary.verdicts(canary.study(target_epsilon=1.0), 1000, bench.random("canary"))


def gradient_inversion(bench: Bench) -> list[Verdict]:
    """At epsilon 1 for two releases, each one step on a single row: the least noise such a row would ever get."""
    model, corpus = minilm(default_cache()), _corpus()
    phase = partial(_phase, rounds=1, steps=1, sampling_rate=1.0)
    plan = _plan(model, corpus, phase=[phase("head"), phase("adapter")], privacy__epsilon=1.0, privacy__divisor=1)
    classifier = TextClassifier.load(model, plan, dtype="float32")
    adapter, texts = random_adapter(classifier, bench.seed), pairs(corpus.train[:CANDIDATES])
    whole = inversion.Setting(classifier, agree(plan, classifier), adapter, texts)
    fewer = dataclasses.replace(whole, candidates=texts[:FACTOR_CANDIDATES])  # an encoder's pass for each
    targets = range(TARGETS)
    return [
        *inversion.from_the_head(whole, targets, bench.random("inversion of heads")),
        *inversion.from_the_factors(fewer, targets, bench.random("inversion of factors")),
    ]


# --- The demonstration's model ---


def _corpus() -> Corpus:
    return icd10(default_cache(), seed=0, train_rows=CANDIDATES, validation_rows=100, held_out_rows=100)


def _phase(train: str, rounds: int, steps: int, sampling_rate: float) -> dict[str, object]:
    return {
        "train": train,
        "rounds": rounds,
        "steps": steps,
        "sampling_rate": sampling_rate,
        "learning_rate": 1.0,
        "budget_share": 0.5,
    }


def _plan(model: Path, corpus: Corpus, **changes: object) -> RunPlan:
    return run_plan(
        model__sha256=manifest_sha256(model),
        task__labels=list(corpus.labels),
        task__max_length=64,
        secure_aggregation__retries=0,
        **changes,
    )


SECTIONS: dict[str, Section] = {
    "The code of private training": code,
    "Noise of released vectors: MiniLM, LoRA of rank 4": noise_of_the_real_model,
    "Noise of released adapters: three sites, masked sums": noise_of_a_federation,
    "Noise of vectors that hide a whole site": noise_of_a_whole_site,
    "Rounds of one step: narrow fields, secure sums": rounds_of_one_step,
    "False alarms: 168 steps of a tiny model, 100 times": clean_runs,
    "Seeded faults in the same": seeded_faults,
    "Membership of one record, all others known": one_record,
    "Canary: 12 Poisson steps, epsilon 1": canary_in_the_adapter,
    "Gradient inversion: one row, epsilon 1": gradient_inversion,
}
