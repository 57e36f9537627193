"""The adapter folder: others can use it without us, and get what we get; its card says what it cost.

A failure is any prediction that differs by more than 1e-5, a file that needs our code, or a card that claims more
privacy than the plan gave. How good the predictions are is no matter here: the weights are random.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from foedus_common.adapters import AdapterSpec, Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.privacy.accounting import Epsilons
from foedus_common.tasks.encoder import encoder_spec
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.release.evaluate import HeldOut
from foedus_server.release.export import Facts, card, export, peft_config
from tiny_families import FAMILIES, write_family
from tiny_model import HIDDEN, LABELS, rows, tiny_agreed, without_dp, write_tiny_model

FACTS = Facts(("north", "lakeside", "st-mary"), 4, Epsilons(7.91, 7.91))
NAME = "base-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / NAME)


def _agreed(model: Path, pooling: str = "mean") -> AgreedPlan:
    """Some rows are longer than max_length, so that cutting them is tested as well."""
    targets = ["c_attn"] if pooling == "last" else ["query", "value"]
    return tiny_agreed(
        model,
        model__name=NAME,
        run__name=f"by-{pooling}",
        task__pooling=pooling,
        task__max_length=8,
        adapter__targets=targets,
    )


def _adapter(spec: AdapterSpec) -> Tensors:
    random = np.random.default_rng(0)
    return {tensor.name: random.normal(size=tensor.shape).astype(np.float32) for tensor in spec.tensors}


_OUTSIDER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("foedus"):
            raise ImportError(name + " may not be imported here")

sys.meta_path.insert(0, Blocker())
try:
    import foedus_common
except ImportError:
    pass
else:
    sys.exit("the blocker does not block")
results = []
for card in sys.argv[2:]:
    lines, names = open(card, encoding="utf-8").read().splitlines(), {}
    exec("\\n".join(lines[:2]), names)
    names["texts"] = json.load(open(sys.argv[1], encoding="utf-8"))
    exec("\\n".join(lines[2:]), names)
    scores = names["features"] @ names["head"]["weight"].T + names["head"]["bias"]
    results.append(names["torch"].softmax(scores, dim=1).tolist())
print(json.dumps(results))
"""


def _lines(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(code.splitlines()) == 9
    return code


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose tokenizer has no padding token, and whose linear layers are stored transposed."""
    (family,) = (family for family in FAMILIES if family.name == "gpt2")
    return write_family(family, tmp_path_factory.mktemp("decoder") / NAME)


def test_the_cards_own_lines_predict_what_we_predict(model: Path, decoder: Path, tmp_path: Path) -> None:
    data = rows(24)
    expected = []
    for pooling, base in (("mean", model), ("cls", model), ("last", decoder)):
        agreed = _agreed(base, pooling)
        spec = encoder_spec(base, agreed.plan)
        adapter = _adapter(spec)
        export(tmp_path / agreed.plan.run.name, agreed, spec, adapter, FACTS)
        text = (tmp_path / agreed.plan.run.name / "README.md").read_text(encoding="utf-8")
        lines = _lines(text).replace(f'"{NAME}"', f'"{base}"')
        (tmp_path / f"{pooling}.py").write_text(lines, encoding="utf-8")
        held_out = HeldOut(TextClassifier.load(base, agreed.plan, dtype="float32"), agreed, data)
        expected.append(held_out.probabilities(adapter).numpy())
    (tmp_path / "texts.json").write_text(json.dumps([row[0] for row in data]))
    done = subprocess.run(
        [sys.executable, "-I", "-c", _OUTSIDER, "texts.json", "mean.py", "cls.py", "last.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *said, scores = done.stdout.splitlines()
    np.testing.assert_allclose(np.array(json.loads(scores)), np.array(expected), atol=1e-5)
    for words, ours in zip(said, expected, strict=True):
        assert words == str([LABELS[best] for best in ours.argmax(axis=1)])
        assert len(set(ours.argmax(axis=1))) > 1  # else agreement would say little


def test_the_folder_holds_data_only(model: Path, tmp_path: Path) -> None:
    agreed = _agreed(model)
    spec = encoder_spec(model, agreed.plan)
    adapter = _adapter(spec)
    export(tmp_path / "adapter", agreed, spec, adapter, FACTS)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "labels.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert json.loads((tmp_path / "adapter" / "labels.json").read_text()) == LABELS
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(factors) == {tensor.name for tensor in spec.tensors if tensor.role != "head"}
    assert all(np.array_equal(factors[name], adapter[name]) for name in factors)
    head = load_file(tmp_path / "adapter" / "head.safetensors")
    assert {name: tensor.shape for name, tensor in head.items()} == {"weight": (3, HIDDEN), "bias": (3,)}


def test_every_adapted_module_is_named_in_full(model: Path) -> None:
    agreed = _agreed(model)
    assert peft_config(agreed, encoder_spec(model, agreed.plan))["target_modules"] == [
        f"encoder.layer.{layer}.attention.self.{part}" for layer in (0, 1) for part in ("query", "value")
    ]


def test_the_card_states_the_privacy_of_the_run(model: Path) -> None:
    agreed = _agreed(model)
    text = card(agreed, encoder_spec(model, agreed.plan), FACTS)
    for words in (
        "| privacy unit | one record |",
        "| epsilon_local | 7.910 (secure aggregation assumed broken",
        "| epsilon_central | 7.910 ",
        "| delta | 1e-05 |",
        "| secure aggregation | on, 21-bit fields; cohorts of 3 to 16 sites; 1 of their organisations may collude",
        "| sites | north, lakeside, st-mary |",
        "| rounds | 4 of 4 planned |",
        agreed.plan.model.sha256,
        agreed.digest().hex(),
    ):
        assert words in text, words


def test_the_card_says_why_an_epsilon_is_smaller(model: Path) -> None:
    plain = card(_agreed(model), encoder_spec(model, _agreed(model).plan), FACTS)
    assert "Both epsilons are the same" in plain
    one_step = tiny_agreed(model, phase__0__steps=1, phase__1__steps=1)
    facts = dataclasses.replace(FACTS, epsilons=Epsilons(7.91, 5.29))
    text = card(one_step, encoder_spec(model, one_step.plan), facts)
    assert "| epsilon_central | 5.290 " in text
    assert "epsilon_central is smaller because the coordinator sees only totals" in text


def test_a_run_without_privacy_is_labelled_so(model: Path) -> None:
    agreed = tiny_agreed(model, **without_dp())
    text = card(agreed, encoder_spec(model, agreed.plan), Facts(("a", "b", "c"), 2, None))
    assert "| differential privacy | **none** |" in text
    assert "may reveal rows" in text
    assert "epsilon" not in text


def test_a_private_run_without_its_epsilon_gets_no_card(model: Path) -> None:
    agreed = _agreed(model)
    with pytest.raises(ValueError, match="both epsilons"):
        card(agreed, encoder_spec(model, agreed.plan), Facts(("a", "b", "c"), 2, None))


def test_a_plans_words_cannot_break_out_of_the_card(model: Path) -> None:
    purpose = "# Not a heading <script>alert(1)</script> | ![](https://tracker)"
    agreed = tiny_agreed(model, run__purpose=purpose, model__name='x", "y"]; import os #')
    text = card(agreed, encoder_spec(model, agreed.plan), FACTS)
    assert r"Purpose: # Not a heading \<script\>alert(1)\</script\> \| !\[\](https://tracker)" in text
    assert 'base_model: "x\\", \\"y\\"]; import os #"' in text
    compile(_lines(text), "card", "exec")
    assert 'base, folder, texts = "x\\", \\"y\\"]; import os #", "icd-chapters", ' in text


def test_what_is_there_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    agreed = _agreed(model)
    spec = encoder_spec(model, agreed.plan)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(LocalError, match="exists already"):
        export(tmp_path / "full", agreed, spec, _adapter(spec), FACTS)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", agreed, spec, _adapter(spec), FACTS)
    assert (tmp_path / "empty" / "README.md").is_file()
