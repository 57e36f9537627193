"""An adapter as a folder that anyone can use without us: PEFT files, the head, the labels, and a card.

The card states what the adapter cost in privacy and holds the nine lines that load and use it with torch, safetensors,
transformers and peft alone; a test runs them. Writes files only: no torch, no store, no run is known here.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import numpy as safetensors_numpy

from foedus_common.adapters import AdapterSpec, Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, Task
from foedus_common.privacy.accounting import Epsilons
from foedus_common.privacy.statement import about_epsilons
from foedus_common.tasks.head import head_as_linear

_FACTOR = ".lora_A.weight"
_PREFIX = "base_model.model."  # peft's, before every module's own name


@dataclass(frozen=True)
class Facts:
    """What happened, for the card.

    epsilons: of all releases of the run at any one site, at the plan's delta; None for a run without DP.
    """

    sites: tuple[str, ...]
    rounds: int
    epsilons: Epsilons | None


def export(folder: Path, agreed: AgreedPlan, spec: AdapterSpec, adapter: Tensors, facts: Facts) -> None:
    """Write the adapter folder; it appears complete or not at all.

    Raises LocalError when the folder is there and not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LocalError(f"{folder} exists already and is not an empty folder; give another name.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
            complete = Path(scratch) / "adapter"
            complete.mkdir()
            _write(complete, agreed, spec, adapter, facts)
            if folder.exists():
                folder.rmdir()
            complete.rename(folder)
    except OSError as error:
        raise LocalError(f"The adapter cannot be written to {folder}: {error.strerror}.") from None


def _write(folder: Path, agreed: AgreedPlan, spec: AdapterSpec, adapter: Tensors, facts: Facts) -> None:
    factors = {tensor.name: adapter[tensor.name] for tensor in spec.tensors if tensor.role != "head"}
    weight, bias = head_as_linear(adapter)
    safetensors_numpy.save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    safetensors_numpy.save_file({"weight": weight, "bias": bias}, folder / "head.safetensors", {"format": "pt"})
    _write_json(folder / "adapter_config.json", peft_config(agreed, spec))
    _write_json(folder / "labels.json", list(agreed.plan.task.labels))
    (folder / "README.md").write_text(card(agreed, spec, facts), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def peft_config(agreed: AgreedPlan, spec: AdapterSpec) -> dict[str, Any]:
    """`adapter_config.json`. The adapted modules are named one by one, as the spec does, so that nothing else of the
    base model (its pooler, say) can match the plan's shorter names."""
    modules = [
        tensor.name.removeprefix(_PREFIX).removesuffix(_FACTOR)
        for tensor in spec.tensors
        if tensor.name.endswith(_FACTOR)
    ]
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": agreed.plan.model.name,
        "inference_mode": True,
        "r": agreed.plan.adapter.rank,
        "lora_alpha": agreed.plan.adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }


# The card


def card(agreed: AgreedPlan, spec: AdapterSpec, facts: Facts) -> str:
    """`README.md`: what the adapter is, its privacy statement, and how to use it."""
    plan = agreed.plan
    front = {"library_name": "peft", "base_model": plan.model.name, "tags": ["lora", "federated-learning"]}
    trained = spec.size("adapter") if any(phase.train == "adapter" for phase in plan.phase) else spec.size("head")
    return f"""---
{chr(10).join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())}
---

# {_line(plan.run.name)}

Purpose: {_line(plan.run.purpose)}

A LoRA adapter and a classification head for {_line(plan.model.name)}: texts into {len(plan.task.labels)} labels
(`labels.json`), {trained:,} trained numbers. {len(facts.sites)} sites trained it together with Foedus; no row of
their data left them.

## Privacy statement

{_table(_privacy(agreed, facts))}

{_meaning(agreed)}

## Use

With torch, safetensors, transformers and peft alone. `base` is the base model's folder (or its name on a hub), `folder`
is this one:

```python
{usage(plan.run.name, plan.model.name, plan.task)}
```
"""


def usage(folder: str, base: str, task: Task) -> str:
    """The nine lines. The mean's divisor drops out, because the features are scaled to unit norm."""
    hidden = "encoder(**batch).last_hidden_state"
    pooled = {
        "mean": f'({hidden} * batch["attention_mask"][..., None]).sum(1)',
        "cls": f"{hidden}[:, 0]",
        "last": f'{hidden}[torch.arange(len(texts)), batch["attention_mask"].sum(1) - 1]',
    }
    return f"""\
import json, safetensors.torch, torch, transformers, peft
base, folder, texts = {json.dumps(base)}, {json.dumps(folder)}, ["a text", "another text"]
tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
encoder = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), folder).eval()
head, labels = safetensors.torch.load_file(f"{{folder}}/head.safetensors"), json.load(open(f"{{folder}}/labels.json"))
batch = tokenizer(texts, padding=True, truncation=True, max_length={task.max_length}, return_tensors="pt")
features = torch.nn.functional.normalize({pooled[task.pooling]})
print([labels[best] for best in (features @ head["weight"].T + head["bias"]).argmax(1)])"""


def _privacy(agreed: AgreedPlan, facts: Facts) -> Mapping[str, str]:
    plan = agreed.plan
    secure, size = plan.secure_aggregation, plan.secure_aggregation.size
    sums = (
        f"on, {secure.field_bits}-bit fields; cohorts of {size.smallest_sum} to {size.largest_sum} sites; "
        f"{secure.colluding} of their organisations may collude with the coordinator, each with all its sites"
    )
    return {
        **_guarantee(agreed, facts),
        "secure aggregation": sums,
        "sites": ", ".join(facts.sites),
        "rounds": f"{facts.rounds} of {plan.rounds} planned",
        "base model": f"{_line(plan.model.name)}, manifest SHA-256 `{plan.model.sha256}`",
        "plan": f"{_line(plan.run.name)}, digest `{agreed.digest().hex()}`",
        "trainer": _line(agreed.trainer_version),
    }


def _guarantee(agreed: AgreedPlan, facts: Facts) -> Mapping[str, str]:
    privacy = agreed.plan.privacy
    if not privacy.on:
        return {"differential privacy": "**none**"}
    if facts.epsilons is None:
        raise ValueError("a run with differential privacy has both epsilons")
    local, central = facts.epsilons.local, facts.epsilons.central
    return {
        "privacy unit": f"one {privacy.unit}",
        "epsilon_local": f"{local:.3f} (secure aggregation assumed broken: one site's own noise only)",
        "epsilon_central": f"{central:.3f} (secure aggregation holds)",
        "delta": f"{privacy.delta:g}",
        "adjacency": "adding or removing one record" if privacy.unit == "record" else "zeroing one site's updates",
    }


def _meaning(agreed: AgreedPlan) -> str:
    if not agreed.plan.privacy.on:
        return (
            "This run had no differential privacy: its updates were only summed before they were seen, and the adapter "
            "itself may reveal rows that it was trained on."
        )
    return (
        f"{about_epsilons(agreed)}\n\n"
        "The epsilons are upper bounds over all releases of this run, failed attempts included, and cover the training "
        "rows of each site. They do not cover what else was computed from the same rows in other runs; each site's own "
        "ledger adds those up."
    )


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {words} |" for name, words in facts.items())])


def _line(words: str) -> str:
    """Text of the plan's author on one line, with nothing left that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(words.split()))
