"""The plan of a run: every number that coordinator and sites agree on. TOML in, canonical bytes and digest out.

`RunPlan` is what the operator writes. `AgreedPlan` adds what the coordinator solved and prepared for it (run id, noise
multipliers, the layout of the trained vector, the first adapter) and is what is signed, checked by every site's policy
and named by its digest from then on. A plan is data: nothing in it is ever executed or imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foedus_common.canonical import canonical_json, digest
from foedus_common.errors import LocalError
from foedus_common.protocol.draw import MAX_SITES, RoundSize
from foedus_common.tables import parse, read_toml

TRAINER_VERSION = "foedus-trainer/3"
"""Names the arithmetic of local training; sites of another version are not in the same round. What a site decides for
itself (device, precision, how the base is held) is no part of it: docs/decisions/0012."""

ROUNDED_AFTER_THE_NOISE = ("foedus-trainer/1", "foedus-trainer/2")
"""Trainers before rounds of one step were sent as they were noised: what is said of their runs stays what it was."""

MAX_PLAN_BYTES = 128 * 1024
MAX_PHASES = 8
"""In which of them a retry costs most is found out within seconds; it takes the square of their number."""
MAX_ROUNDS = 10_000
MAX_STEPS = 1_000_000
"""More are not accounted for within seconds."""
MAX_EPOCHS = 1000
"""Of a round, which lists its batches before it begins."""
MAX_COORDINATES = 1 << 30
"""Numbers in a trained vector: 8 GiB in the trainer."""
LEAST, MOST = 1e-30, 1e30
"""Of every factor and bound that training multiplies with: neither they nor their squares leave what float64 holds. A
smaller clip would let gradients through unclipped, for their squared norms would be zero (docs/decisions/0032)."""
MAX_DIVISOR = 1 << 36
"""Rows; a sum of clipped gradients of so many still fits the noise's grid."""
LEAST_DELTA = 1e-11
"""That accounting can tell from nothing; whoever is to judge a plan must get an epsilon for it."""
MAX_TEXT = 1000
"""Characters of a text that people read: a purpose, a name, a label."""

Group = Literal["head", "adapter"]
"""A named part of the trained vector that has a learning rate and a scale of its own."""


@dataclass(frozen=True)
class Run:
    """What the run is called and what it is for: the words that a site's administrator reads before approving."""

    name: str
    purpose: str
    deadline_minutes: float = 30.0  # how long a site may take to train one round
    approval_hours: float = 72.0  # how long the sites' administrators have to decide


@dataclass(frozen=True)
class Model:
    name: str
    sha256: str  # of the model folder's manifest


@dataclass(frozen=True)
class Data:
    name: str  # the dataset's name at every site


@dataclass(frozen=True)
class Task:
    kind: Literal["text-classification"]
    labels: tuple[str, ...]
    max_length: int = 128  # tokens
    pooling: Literal["mean", "cls", "last"] = "mean"  # of the tokens' hidden states; "last" for decoders


@dataclass(frozen=True)
class Adapter:
    method: Literal["ffa-lora", "fedit"] = "ffa-lora"
    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = ("query", "value")  # names of linear layers, or patterns such as "*_proj"
    layers: str = "all"  # "all", numbers such as "0-2,5", or "last-4"
    seed: int = 0  # public: the frozen factors A derive from it


@dataclass(frozen=True)
class Phase:
    """Some rounds that train the same part of the vector.

    By the unit of privacy: "record" takes `steps` Poisson-sampled steps a round at `sampling_rate`; "none" takes
    `epochs` over the rows a round, and a step of `optimizer` for every `batch_size` rows, on their mean gradient,
    however few of them a site's memory holds at once; "site" takes `steps` of the latter kind. `learning_rate` is for
    the adapter (in a head phase: for the head); `head_learning_rate` and `head_scale` are the head's own in an adapter
    phase. A scale multiplies what is clipped, a group's gradients or its update.
    """

    train: Literal["head", "adapter"]
    rounds: int
    learning_rate: float
    steps: int | None = None
    sampling_rate: float | None = None
    budget_share: float | None = None
    epochs: float | None = None
    batch_size: int | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None  # L2 bound on the gradient of a whole step
    warmup: float | None = None  # share of the phase in which the rates rise from 0
    decay: Literal["none", "linear", "cosine"] = "none"  # of the rates, over the rest of the phase
    head_learning_rate: float | None = None
    head_scale: float = 1.0
    update_bound: float | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return ("head",) if self.train == "head" else ("head", "adapter")


@dataclass(frozen=True)
class Aggregation:
    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.0
    average_last: int = 1  # the adapter that ends a phase is the mean of its last so many rounds


@dataclass(frozen=True)
class SecureAggregation:
    min_sites: int = 3
    max_sites: int = 16
    colluding: int = 1  # organisations that may help the coordinator, each with all its sites
    field_bits: int = 21
    retries: int = 2

    @property
    def size(self) -> RoundSize:
        """Of a round. What shares a sum is a cohort of it, of `size.smallest_sum` to `size.largest_sum` sites."""
        return RoundSize(self.min_sites, self.max_sites)


@dataclass(frozen=True)
class Privacy:
    unit: Literal["record", "site", "none"] = "record"  # what one neighbouring federation lacks
    epsilon: float | None = None  # with unit "site", while secure aggregation holds
    delta: float | None = None
    clip: float = 1.0  # L2 bound on one row's gradient, or on one site's update, after the groups' scales
    divisor: int | None = None  # rows; public, the same for every site; of unit "record"

    @property
    def on(self) -> bool:
        return self.unit != "none"


@dataclass(frozen=True)
class RunPlan:
    """What the operator wrote. Raises LocalError on construction when the numbers contradict one another."""

    run: Run
    model: Model
    data: Data
    task: Task
    phase: tuple[Phase, ...]
    privacy: Privacy
    adapter: Adapter = dataclasses.field(default_factory=Adapter)
    aggregation: Aggregation = dataclasses.field(default_factory=Aggregation)
    secure_aggregation: SecureAggregation = dataclasses.field(default_factory=SecureAggregation)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise LocalError(f"The plan {self.run.name!r} {problem}")

    @property
    def rounds(self) -> int:
        return sum(phase.rounds for phase in self.phase)


def read_plan(path: Path) -> RunPlan:
    """The plan in a TOML file. Raises LocalError with one sentence for the first mistake found."""
    return parse(RunPlan, read_toml(path), f"the plan {path.name}")


def _problems(plan: RunPlan) -> Iterator[str]:
    """Sentences that finish "The plan NAME ...": what cannot be, where, and what to do."""
    secure, privacy = plan.secure_aggregation, plan.privacy
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", plan.run.name):
        yield "must be named with small letters, digits and dashes in [run] name (at most 64)."
    for where, text in _texts(plan):
        if not (0 < len(text) <= MAX_TEXT and text.isprintable()):
            yield f"must have 1 to {MAX_TEXT} printable characters in {where}."
    if not re.fullmatch(r"[0-9a-f]{64}", plan.model.sha256):
        yield "needs 64 hexadecimal digits in [model] sha256; `foedus model add` prints them."
    if len(plan.task.labels) < 2 or len(set(plan.task.labels)) != len(plan.task.labels):
        yield "needs at least two different labels in [task] labels."
    if not 1 <= plan.task.max_length <= 8192:
        yield "must have [task] max_length between 1 and 8192 tokens."
    if not 1 <= plan.adapter.rank <= 1024 or not LEAST <= plan.adapter.alpha <= MOST:
        yield f"must have [adapter] rank between 1 and 1024 and alpha between {_MODERATE}."
    if not plan.adapter.targets:
        yield "needs at least one name or pattern in [adapter] targets."
    if not plan.phase:
        yield "has no [[phase]]; add at least one."
    if len(plan.phase) > MAX_PHASES:
        yield f"must have at most {MAX_PHASES} phases, not {len(plan.phase)}."
    if plan.rounds > MAX_ROUNDS:
        yield f"must have at most {MAX_ROUNDS} rounds over all phases."
    if not 3 <= secure.min_sites <= secure.max_sites <= MAX_SITES:
        yield (
            f"must have 3 <= min_sites <= max_sites <= {MAX_SITES} in [secure_aggregation]; "
            "the sum of two reveals the other."
        )
    elif not 0 <= secure.colluding <= secure.size.smallest_sum - 2:
        yield (
            f"must have [secure_aggregation] colluding between 0 and {secure.size.smallest_sum - 2}: two "
            "organisations fewer than the smallest sum has sites."
        )
    if not 8 <= secure.field_bits <= 32:
        yield "must have [secure_aggregation] field_bits between 8 and 32."
    if not 0 <= secure.retries <= MAX_ROUNDS:
        yield f"must have [secure_aggregation] retries between 0 and {MAX_ROUNDS}."
    if sum((phase.rounds + secure.retries) * (phase.steps or 0) for phase in plan.phase) > MAX_STEPS:
        yield f"must have at most {MAX_STEPS} steps over all rounds and retries."
    if privacy.on:
        yield from _privacy_problems(privacy)
    elif privacy.epsilon is not None or privacy.delta is not None:
        yield 'turns privacy off with unit = "none" and yet gives epsilon or delta; remove them.'
    for number, phase in enumerate(plan.phase, start=1):
        yield from (f"{problem} (phase {number})" for problem in _phase_problems(phase, privacy.unit))
    if privacy.on and not math.isclose(sum(phase.budget_share or 0 for phase in plan.phase), 1.0, abs_tol=1e-6):
        yield "must have budget_share values that add up to 1 over its phases."
    if plan.aggregation.average_last < 1 or not 0 <= plan.aggregation.momentum < 1:
        yield "must have [aggregation] average_last of 1 or more and momentum in [0, 1)."


def _texts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """What people at the sites will read on their terminals, or in a page."""
    yield "[run] purpose", plan.run.purpose
    yield "[model] name", plan.model.name
    yield "[data] name", plan.data.name
    yield from (("each of [task] labels", label) for label in plan.task.labels)


def _privacy_problems(privacy: Privacy) -> Iterator[str]:
    if privacy.epsilon is None or not 0 < privacy.epsilon <= 100:
        yield "needs [privacy] epsilon above 0 and at most 100."
    if privacy.delta is None or not LEAST_DELTA <= privacy.delta <= 1e-3:
        yield f"needs [privacy] delta between {LEAST_DELTA:g} and 0.001."
    if privacy.unit == "record" and not 1 <= (privacy.divisor or 0) <= MAX_DIVISOR:
        yield f"needs [privacy] divisor: a public number of rows by which every site divides, 1 to {MAX_DIVISOR}."
    if privacy.unit == "site" and privacy.divisor is not None:
        yield 'gives [privacy] divisor, which unit = "site" does not have; remove it.'
    if not LEAST <= privacy.clip <= MOST:
        yield f"must have [privacy] clip between {_MODERATE}."


_MODERATE = f"{LEAST:g} and {MOST:g}"
_PLAIN_TRAINING = ("epochs", "batch_size", "optimizer", "weight_decay", "max_grad_norm", "warmup")


def _phase_problems(phase: Phase, unit: str) -> Iterator[str]:
    if phase.rounds < 1:
        yield "must have rounds of 1 or more."
    for name in ("learning_rate", "head_learning_rate", "head_scale", "max_grad_norm", "update_bound"):
        value = getattr(phase, name)
        if value is not None and not LEAST <= value <= MOST:
            yield f"must have {name} between {_MODERATE}."
    match unit:
        case "record":
            yield from _record_phase_problems(phase)
        case "site":
            if phase.epochs is not None or phase.sampling_rate is not None:
                yield 'gives epochs or sampling_rate; with unit = "site" give steps and batch_size.'
            if (phase.steps or 0) < 1 or (phase.batch_size or 0) < 1:
                yield "needs steps and batch_size of 1 or more."
        case _:
            if phase.steps is not None or phase.sampling_rate is not None or phase.budget_share is not None:
                yield "gives steps, sampling_rate or budget_share, which belong to DP; without it give epochs instead."
            if not 0 < (phase.epochs or 0) <= MAX_EPOCHS or (phase.batch_size or 0) < 1:
                yield f"needs epochs above 0 and at most {MAX_EPOCHS}, and batch_size of 1 or more."
    if unit != "none":
        if phase.budget_share is None or not 0 < phase.budget_share <= 1:
            yield "needs budget_share in (0, 1]."
        if phase.update_bound is not None:
            yield "gives update_bound, which follows from the noise under DP; remove it."
    if not 0 <= (phase.warmup or 0) < 1:
        yield "must have warmup in [0, 1): the share of the phase in which the rates rise."
    if not 0 <= (phase.weight_decay or 0) <= MOST:
        yield f"must have weight_decay between 0 and {MOST:g}."


def _record_phase_problems(phase: Phase) -> Iterator[str]:
    if given := [name for name in _PLAIN_TRAINING if getattr(phase, name) is not None]:
        yield f"gives {', '.join(given)}, which training under DP does not have; give steps and sampling_rate."
    if phase.decay == "cosine":
        yield 'decays by a cosine, whose last digit differs between machines; under DP write decay = "linear".'
    if (phase.steps or 0) < 1 or not 1e-9 <= (phase.sampling_rate or 0) <= 1:
        yield "needs steps of 1 or more and sampling_rate between 1e-9 and 1."


@dataclass(frozen=True)
class RoundPlan:
    """One round of the schedule: `index` counts from 0 over the whole run, `phase` is the phase's number from 0, `done`
    counts the phase's rounds before this one."""

    index: int
    phase: int
    settings: Phase
    done: int

    def learning_rate(self, group: Group, passed: float = 0.0) -> float:
        """The group's rate once a share `passed` of the round is over; under DP a round has the rate that it begins
        with."""
        settings = self.settings
        if group == "head" and settings.train == "adapter" and settings.head_learning_rate is not None:
            return settings.head_learning_rate * self._factor(passed)
        return settings.learning_rate * self._factor(passed)

    def scale(self, group: Group) -> float:
        """Factor on the group's gradients before the clip (public)."""
        return self.settings.head_scale if group == "head" and self.settings.train == "adapter" else 1.0

    def _factor(self, passed: float) -> float:
        """Of both rates, by how much of the phase is over, so that sites with few and many rows agree. In one round at
        one site it is that of transformers' `get_scheduler` at each step."""
        place, end = self.done + passed, self.settings.rounds
        warm = (self.settings.warmup or 0.0) * end
        if place < warm:
            return place / warm
        match self.settings.decay:
            case "linear":
                return (end - place) / (end - warm)
            case "cosine":
                return (1 + math.cos(math.pi * (place - warm) / (end - warm))) / 2
        return 1.0


def schedule(plan: RunPlan) -> tuple[RoundPlan, ...]:
    """Every round of the run in order."""
    rounds: list[RoundPlan] = []
    for number, phase in enumerate(plan.phase):
        rounds += [RoundPlan(len(rounds) + done, number, phase, done) for done in range(phase.rounds)]
    return tuple(rounds)


@dataclass(frozen=True)
class Part:
    """A run of `length` neighbouring coordinates of the trained vector that belong to one group."""

    group: Group
    length: int


@dataclass(frozen=True)
class AgreedPlan:
    """A plan with what the coordinator solved and prepared for it; this is what is signed and approved.

    noise_multipliers: one per phase, in units of the clipping bound; of one sum's noise, where the unit is the site of
    that in the sum of the fewest honest sites. Empty without DP.
    trained: per phase, the trained vector's layout, in order.
    spec_sha256: digest of the AdapterSpec; first_adapter_sha256: of the first adapter's safetensors bytes.
    """

    run_id: int
    plan: RunPlan
    noise_multipliers: tuple[float, ...]
    trained: tuple[tuple[Part, ...], ...]
    spec_sha256: str
    first_adapter_sha256: str
    trainer_version: str = TRAINER_VERSION

    def canonical(self) -> bytes:
        """The bytes that are signed: canonical JSON of every field."""
        return canonical_json(dataclasses.asdict(self))

    def digest(self) -> bytes:
        """32 bytes that name the plan: H(enc("plan", canonical))."""
        return digest("plan", self.canonical())

    def size(self, phase: int) -> int:
        """d: how many numbers are trained in a phase."""
        return sum(part.length for part in self.trained[phase])

    def linear(self, phase: int) -> bool:
        """Whether a round of the phase (number from 0) uploads one noised sum of gradients as it is, so that in a
        secure sum the noises of all sites add up (docs/decisions/0028)."""
        one_step = self.plan.privacy.unit == "record" and self.plan.phase[phase].steps == 1
        return one_step and self.trainer_version not in ROUNDED_AFTER_THE_NOISE

    def releases(self, phase: int) -> int:
        """Rounds of a phase, plus the retries if it is the phase whose release costs most (protocol.md section 2)."""
        retries = self.plan.secure_aggregation.retries
        costliest = max(range(len(self.plan.phase)), key=self._cost_of_one_release)
        return self.plan.phase[phase].rounds + (retries if phase == costliest else 0)

    def _cost_of_one_release(self, phase: int) -> float:
        settings = self.plan.phase[phase]
        if not self.noise_multipliers:
            return 0.0
        sums, rate = (1, 1.0) if self.plan.privacy.unit == "site" else (settings.steps, settings.sampling_rate)
        return (sums or 0) * ((rate or 0) / self.noise_multipliers[phase]) ** 2


def parse_agreed_plan(canonical: bytes) -> AgreedPlan:
    """An AgreedPlan from the canonical bytes that were signed.

    Raises LocalError when the bytes are too long, are not JSON of this schema, contradict themselves, or are not the
    canonical form of what they say (so that nobody signs one reading and another is used).
    """
    if len(canonical) > MAX_PLAN_BYTES:
        raise LocalError(f"The plan is {len(canonical)} bytes long; at most {MAX_PLAN_BYTES} are read.")
    try:
        table = _without_nulls(json.loads(canonical))
    except (ValueError, RecursionError):
        raise LocalError("The plan is not canonical JSON.") from None
    if not isinstance(table, dict):
        raise LocalError("The plan is not a JSON object.")
    agreed = parse(AgreedPlan, table, "the plan")
    try:
        well_formed = agreed.canonical() == canonical
    except ValueError:  # a number that is not finite, a text that is no Unicode
        well_formed = False
    if not well_formed:
        raise LocalError("The plan's bytes are not the canonical form of what they say.")
    if len(agreed.trained) != len(agreed.plan.phase) or not all(agreed.trained):
        raise LocalError("The plan does not give the trained vector's layout for each of its phases.")
    if len(agreed.noise_multipliers) != (len(agreed.plan.phase) if agreed.plan.privacy.on else 0):
        raise LocalError("The plan does not give one noise multiplier for each phase.")
    if not 0 < agreed.run_id < 1 << 63:
        raise LocalError("The plan's run has a number that no database holds.")
    for number, parts in enumerate(agreed.trained):
        if any(part.length < 1 for part in parts) or agreed.size(number) > MAX_COORDINATES:
            raise LocalError("The plan's trained vector has a part without a length, or is too long.")
    if any(not 0.01 <= z < 1e6 for z in agreed.noise_multipliers):
        raise LocalError("The plan has a noise multiplier that is not between 0.01 and 1000000.")
    return agreed


def _without_nulls(value: Any) -> Any:
    """JSON writes an absent optional value as null; the tables have no such key."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
