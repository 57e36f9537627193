"""Evaluation: the child's figures are those of a loop by hand, and bad input is one sentence with exit code 2."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from foedus_common.adapters import Tensors, save_adapter
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.tasks.encoder import encoder_spec
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.release.evaluate import HeldOut, main
from foedus_server.release.evaluation import Score, evaluate, parse_score
from foedus_server.release.held_out import held_out_rows
from tiny_model import LABELS, rows, tiny_agreed, write_tiny_model

ROWS = rows(30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def agreed(model: Path) -> AgreedPlan:
    return tiny_agreed(model)


def _adapters(model: Path, agreed: AgreedPlan) -> list[Tensors]:
    """Two with the same factors and other heads, and one with other factors."""
    spec, random = encoder_spec(model, agreed.plan), np.random.default_rng(1)
    first, third = (
        {tensor.name: random.normal(size=tensor.shape).astype(np.float32) for tensor in spec.tensors} for _ in range(2)
    )
    return [first, {**first, "head.weight": -first["head.weight"]}, third]


def _write(path: Path, data: list[tuple[str, str]], header: tuple[str, str] = ("note", "chapter")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *data])
    return path


def test_the_child_gives_what_a_loop_gives(model: Path, agreed: AgreedPlan, tmp_path: Path) -> None:
    spec, adapters = encoder_spec(model, agreed.plan), _adapters(model, agreed)
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, adapter in zip(files, adapters, strict=True):
        file.write_bytes(save_adapter(adapter, spec))
    told: list[Score] = []
    data = _write(tmp_path / "rows.csv", ROWS)
    scores = evaluate(model, agreed, files, data, text="note", label="chapter", on_score=told.append)

    assert told == scores
    assert [score.adapter for score in scores] == list(map(str, files))
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    for score, adapter in zip(scores, adapters, strict=True):
        # One row at a time: nothing is cached, nothing is padded.
        predicted = [LABELS[classifier.predict(adapter, classifier.encode([(text, None)]))[0]] for text, _ in ROWS]
        assert score.rows == 30
        assert score.right == sum(said == true for said, (_, true) in zip(predicted, ROWS, strict=True))
        assert sum(of.right for of in score.classes.values()) == score.right
        assert {label: of.rows for label, of in score.classes.items()} == dict.fromkeys(LABELS, 10)
        assert [(e.text, e.label, e.predicted) for e in score.examples] == [
            (*ROWS[number], predicted[number]) for number in range(3)
        ]
        assert all(1 / 3 <= example.probability <= 1 for example in score.examples)
    assert len({score.right for score in scores}) > 1


def test_features_are_computed_once_for_equal_factors(
    model: Path, agreed: AgreedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    compute = TextClassifier.load_factors
    monkeypatch.setattr(
        TextClassifier, "load_factors", lambda self, adapter: (computed.append(1), compute(self, adapter))
    )
    held_out = HeldOut(TextClassifier.load(model, agreed.plan, dtype="float32"), agreed, ROWS)
    first, second, third = _adapters(model, agreed)
    for number, adapter in enumerate((first, second, first, third)):
        held_out.score(str(number), adapter)
    assert len(computed) == 2


def test_a_score_survives_its_line_and_knows_its_error() -> None:
    score = parse_score(
        '{"adapter": "a", "rows": 100, "right": 20, "classes": {"Eye": {"rows": 100, "right": 20}}, "examples": '
        '[{"text": "t", "label": "Eye", "predicted": "Ear", "probability": 0.5}]}'
    )
    assert parse_score(score.to_json()) == score
    assert score.accuracy == 0.2
    assert score.standard_error == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as CSV: No such file"),
        ("", "has no column 'note'; it is empty."),
        ("note,chapter\n", "has no rows below its header"),
        ("notes,chapter\na,Eye\n", "has no column 'note'; did you mean 'notes'?"),
        ("x,chapter\na,Eye\n", "has no column 'note'; its first line names 2 other columns."),
        ("note,chapter\na,Eye\n,Ear\n", "Row 2 of "),
        ("note,chapter\na\n", "has an empty 'note' or 'chapter'"),
        (b"note,chapter\n\xff\xfe,Eye\n", "cannot be read as CSV"),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LocalError) as refused:
        held_out_rows(path, "note", "chapter")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfnote,chapter\na,Eye\n")
    assert held_out_rows(tmp_path / "rows.csv", "note", "chapter") == [("a", "Eye")]


def test_bad_input_is_one_sentence_and_exit_code_2(
    model: Path, agreed: AgreedPlan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_bytes(agreed.canonical())
    (tmp_path / "other.json").write_bytes(
        tiny_agreed(model, adapter__rank=1).canonical().replace(b'"rank":1', b'"rank":2')
    )
    (tmp_path / "short.safetensors").write_bytes(b"short")
    good = _write(tmp_path / "rows.csv", ROWS)
    unknown = _write(tmp_path / "unknown.csv", [("a", "Heart")])

    def said(plan: str, data: Path, adapter: str) -> str:
        arguments = ["--model", str(model), "--plan", str(tmp_path / plan), "--data", str(data)]
        assert main([*arguments, "--text", "note", "--label", "chapter", str(tmp_path / adapter)]) == 2
        output = capfd.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
        return output.err

    assert "No such file" in said("absent.json", good, "short.safetensors")
    assert "does not give the adapter" in said("other.json", good, "short.safetensors")
    assert "a label that the plan does not list" in said("plan.json", unknown, "short.safetensors")
    assert "The adapter is 5 bytes long" in said("plan.json", good, "short.safetensors")
    assert "absent.safetensors cannot be read" in said("plan.json", good, "absent.safetensors")


def test_the_childs_sentence_and_its_death_reach_the_parent(
    model: Path, agreed: AgreedPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _write(tmp_path / "rows.csv", ROWS)
    with pytest.raises(LocalError, match=r"^The adapter .*absent.safetensors cannot be read: No such file"):
        evaluate(model, agreed, [tmp_path / "absent.safetensors"], data, text="note", label="chapter")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(LocalError, match=r"^The evaluation's process ended with status 1: it said nothing$"):
        evaluate(model, agreed, [tmp_path / "absent.safetensors"], data, text="note", label="chapter")
