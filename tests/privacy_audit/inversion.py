"""Gradient inversion: which text did the only record of a site have? Asked of raw gradients and of released vectors.

From the head's gradient (p - y) outer f of one record the label is read off, and then f itself: f's last number is the
constant 0.3, so one row of the matrix gives the rest by division (Zhao, Mopuri, Bilen: iDLG, 2020; Geiping et al.,
NeurIPS 2020, proposition 3.1). Against noise, and for the factors, the best an attacker can do is to compute every
candidate's own gradient, which the coordinator can, and to take the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.privacy.noise import accounted_multiplier
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import noise_grid
from foedus_common.tasks.head import CONSTANT
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.private_training import AdapterGradients, HeadGradients
from foedus_common.tasks.text_classification import TextClassifier
from privacy_audit.bounds import guess_at_most
from privacy_audit.faults import noise_off
from privacy_audit.reference import Reals, step_factors
from privacy_audit.specimens import as_sent
from privacy_audit.verdicts import ALARM_RATE, Verdict

RAW_SUCCESS = 0.95
"""How often an attack has to succeed on raw gradients to count as one."""

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Setting:
    """candidates: (text, label) rows that the attacker holds possible, one of which each site has; every round of the
    plan is one step on the full batch."""

    classifier: TextClassifier
    agreed: AgreedPlan
    adapter: Tensors
    candidates: Rows

    def round_of(self, train: str) -> RoundPlan:
        return next(each for each in schedule(self.agreed.plan) if each.settings.train == train)

    def released_sum(self, target: int, train: str, random: RandomBytes) -> Reals:
        """What the coordinator has of a site whose only row is the target: the noised sum, (d,)."""
        round_plan = self.round_of(train)
        trainer = LocalTrainer(self.classifier, self.agreed, [self.candidates[target]])
        update = trainer.train(self.adapter, round_plan, random)
        return -as_sent(self.agreed, round_plan, update, random) / step_factors(self.agreed, round_plan)

    def mu(self, train: str) -> float:
        """What one such release is accounted for."""
        phase = self.round_of(train).phase
        return 1 / accounted_multiplier(noise_grid(self.agreed, phase), self.agreed.size(phase))


@dataclass(frozen=True)
class Guesses:
    """How many of `trials` targets were found. chance: the rate of guessing without a release."""

    found: int
    trials: int
    chance: float

    def works(self, check: str) -> Verdict:
        """Whether the attack is one."""
        needed = math.ceil(RAW_SUCCESS * self.trials)
        return Verdict(check, f"{self.found} of {self.trials}", f">= {needed}", self.found >= needed)

    def fails(self, check: str, mu: float) -> Verdict:
        """Whether so many are found by the rate that a mu-GDP release allows, but for `ALARM_RATE`."""
        rate = guess_at_most(self.chance, mu)
        most = int(stats.binom.isf(ALARM_RATE, self.trials, rate))
        said = f"{self.found} of {self.trials} (chance {self.chance:.2%})"
        return Verdict(check, said, f"<= {most}, from {rate:.2%} by mu {mu:.3f}", self.found <= most)


# --- The attacks ---


def label_and_features(head_gradient: Reals) -> tuple[int, Reals]:
    """From one record's gradient (labels, width), at any scale: its label's index, and its features (width,)."""
    label = int(np.argmin(head_gradient[:, -1]))  # the only negative entry of p - y
    return label, head_gradient[label] / head_gradient[label, -1] * CONSTANT


def most_similar(vector: Reals, candidates: Reals) -> int:
    """The candidate (n, d) with the largest cosine."""
    return int(np.argmax(candidates @ vector / np.linalg.norm(candidates, axis=1)))


def likeliest(total: Reals, sums: Reals) -> int:
    """The candidate whose own sum (n, d) makes `total` likeliest under Gaussian noise."""
    return int(np.argmax(sums @ total - (sums**2).sum(axis=1) / 2))


def candidate_sums(setting: Setting, train: str) -> Reals:
    """What each candidate alone would contribute, (candidates, d)."""
    classifier, adapter, clip = setting.classifier, setting.adapter, setting.agreed.plan.privacy.clip
    encoded = classifier.encode(setting.candidates)
    vector = classifier.spec.vector(adapter, train).astype(np.float64)
    gradients: HeadGradients | AdapterGradients = (
        HeadGradients(classifier.features(adapter, encoded), encoded.labels, clip)
        if train == "head"
        else AdapterGradients(classifier, adapter, encoded, clip, setting.round_of(train))
    )
    return np.array([gradients(vector, np.array([row])) for row in range(len(encoded))])


# --- On raw gradients and on releases ---


def from_the_head(setting: Setting, targets: Sequence[int], random: RandomBytes) -> list[Verdict]:
    """A head phase. targets: indices of the candidates that are attacked."""
    classifier = setting.classifier
    encoded = classifier.encode(setting.candidates)
    features = classifier.features(setting.adapter, encoded).double().numpy()
    shape = classifier.spec.tensors[0].shape
    commonest = float(np.bincount(encoded.labels).max()) / len(encoded)
    sums, mu, chance = candidate_sums(setting, "head"), setting.mu("head"), 1 / len(encoded)

    def analytic(totals: Sequence[Reals]) -> tuple[Guesses, Guesses]:
        guesses = [label_and_features(total.reshape(shape)) for total in totals]
        labels = sum(label == int(encoded.labels[t]) for (label, _), t in zip(guesses, targets, strict=True))
        texts = sum(most_similar(found, features) == t for (_, found), t in zip(guesses, targets, strict=True))
        return Guesses(labels, len(targets), commonest), Guesses(texts, len(targets), chance)

    with noise_off():
        raw = [setting.released_sum(target, "head", random) for target in targets]
    noised = [setting.released_sum(target, "head", random) for target in targets]
    (raw_labels, raw_texts), (labels, texts) = analytic(raw), analytic(noised)
    likely = sum(likeliest(total, sums) == target for total, target in zip(noised, targets, strict=True))
    return [
        raw_labels.works("label, read off the raw head gradient"),
        labels.fails("... off the released vector", mu),
        raw_texts.works(f"which of {len(encoded)} texts, from the raw head gradient"),
        texts.fails("... from the released vector", mu),
        Guesses(likely, len(targets), chance).fails("... from the released vector, the likeliest", mu),
    ]


def from_the_factors(setting: Setting, targets: Sequence[int], random: RandomBytes) -> list[Verdict]:
    """An adapter phase, of which only the factors' part is used."""
    start = setting.classifier.spec.tensors[0].size
    sums, mu = candidate_sums(setting, "adapter")[:, start:], setting.mu("adapter")

    def guess() -> Guesses:
        totals = [setting.released_sum(target, "adapter", random)[start:] for target in targets]
        found = sum(likeliest(total, sums) == target for total, target in zip(totals, targets, strict=True))
        return Guesses(found, len(targets), 1 / len(sums))

    with noise_off():
        raw = guess()
    return [
        raw.works(f"which of {len(sums)} texts, from the factors' raw gradient"),
        guess().fails("... from the released vector", mu),
    ]
