"""The trainer as a process: real children with the tiny model, and false ones that break the pipe's rules."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import pickle
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoTokenizer

from foedus_client.training import process as trainer_process
from foedus_client.training import trainer as trainer_module
from foedus_client.training.process import TrainerProcess, TrainerSettings, read_message, write_message
from foedus_client.training.trainer import Trainer, answering_errors
from foedus_common.adapters import AdapterSpec, save_adapter
from foedus_common.canonical import sha256_hex
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, schedule
from tiny_model import rows, tiny_agreed, write_tiny_model


class Site:
    """What a site's parent has at hand: the model, the dataset, an adapter file and the agreed plan."""

    def __init__(self, folder: Path) -> None:
        from foedus_common.tasks.encoder import encoder_spec

        self.model = write_tiny_model(folder / "model")
        self.agreed: AgreedPlan = tiny_agreed(self.model)
        self.spec: AdapterSpec = encoder_spec(self.model, self.agreed.plan)
        self.dataset = folder / "rows.csv"
        with self.dataset.open("w", newline="") as file:
            csv.writer(file).writerows([("note", "chapter"), *rows(30)])
        self.adapter = folder / "adapter.safetensors"
        zeros = {t.name: np.zeros(t.shape, np.float32) for t in self.spec.tensors}
        self.adapter.write_bytes(save_adapter(zeros, self.spec))
        self.sha256 = sha256_hex(self.adapter.read_bytes())

    def settings(self) -> TrainerSettings:
        return TrainerSettings(
            model_folder=str(self.model),
            dataset=str(self.dataset),
            dataset_sha256=hashlib.sha256(self.dataset.read_bytes()).hexdigest(),
            text="note",
            label="chapter",
            threads=1,
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def trainer(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """One real child for all tests, started beside a module that would end it; whoever finds it dead gets another."""
    folder = tmp_path_factory.mktemp("started-here")
    (folder / "queue.py").write_text("import os; os._exit(3)")
    process = TrainerProcess(site.settings(), site.agreed)
    with contextlib.chdir(folder):
        yield process
    process.stop()


def test_both_phases_are_trained_and_progress_is_told(site: Site, trainer: TrainerProcess) -> None:
    told: list[Any] = []
    for plan in (schedule(site.agreed.plan)[0], schedule(site.agreed.plan)[2]):
        update = trainer.train(site.adapter, site.sha256, plan, lambda *done: told.append(done))
        assert update.shape == (site.agreed.size(plan.phase),)
        assert np.isfinite(update).all()
        assert update.all()  # noise in every coordinate
        assert told[-1] == ("steps", 2, 2)


def test_noise_is_fresh(site: Site, trainer: TrainerProcess) -> None:
    plan = schedule(site.agreed.plan)[0]
    first, second = (trainer.train(site.adapter, site.sha256, plan) for _ in range(2))
    assert (first != second).all()


def test_an_adapter_of_other_bytes_is_refused_and_the_trainer_lives_on(site: Site, trainer: TrainerProcess) -> None:
    plan = schedule(site.agreed.plan)[0]
    with pytest.raises(LocalError, match="not those that the coordinator named"):
        trainer.train(site.adapter, "0" * 64, plan)
    with pytest.raises(LocalError, match="cannot be read"):
        trainer.train(site.adapter.with_name("absent"), site.sha256, plan)
    assert trainer.train(site.adapter, site.sha256, plan).size


@pytest.mark.parametrize("labels", [["Eye", "Nose", "Chin"], ["Nose", "Mouth", "Chin"]])
def test_rows_whose_label_the_plan_does_not_list_take_no_part(site: Site, labels: list[str]) -> None:
    """And if that leaves none, nobody learns it: their absence is a vector of noise."""
    agreed = tiny_agreed(site.model, task__labels=labels)
    answers = SimpleNamespace(progress=lambda *_: None)
    trainer = Trainer(site.settings(), agreed, answers)  # type: ignore[arg-type]
    trainer.train(site.adapter, site.sha256, 0)
    assert trainer._local is not None
    assert len(trainer._local.rows) == (10 if "Eye" in labels else 0)


def test_a_file_where_the_daemon_was_started_is_not_executed(trainer: TrainerProcess) -> None:
    """`python -m` looks for modules in the current folder first, which may be one that others write to."""
    assert Path("queue.py").exists()
    trainer.open()  # raises LocalError when the child ended


class Harm:
    """Unpickled, it leaves a file."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.at,)


@pytest.mark.parametrize("case", ["pickle", "archive", "header of a terabyte", "header that ends nowhere", "metadata"])
def test_an_adapter_that_is_something_else_is_refused_under_its_right_hash(
    site: Site, trainer: TrainerProcess, tmp_path: Path, case: str
) -> None:
    """As a coordinator could name it: the hash proves nothing about what the bytes are."""
    size, harm = site.adapter.stat().st_size, tmp_path / "harm"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("adapter/data.pkl", pickle.dumps(Harm(harm)))
    content = {
        "pickle": pickle.dumps(Harm(harm)),
        "archive": archive.getvalue(),
        "header of a terabyte": (1 << 40).to_bytes(8, "little"),
        "header that ends nowhere": (size - 8).to_bytes(8, "little") + b'{"head.weight":{',
        "metadata": (80).to_bytes(8, "little") + b'{"__metadata__":{"auto_map":"harm.py"}}'.ljust(80),
    }[case].ljust(size, b"\0")
    (tmp_path / "adapter").write_bytes(content)
    with pytest.raises(LocalError, match=r"[Tt]he adapter"):
        trainer.train(tmp_path / "adapter", sha256_hex(content), schedule(site.agreed.plan)[0])
    assert not harm.exists()
    assert trainer.train(site.adapter, site.sha256, schedule(site.agreed.plan)[0]).size


def test_a_child_whose_parent_is_gone_ends(trainer: TrainerProcess) -> None:
    trainer.open()
    trainer._child.stdin.close()  # all that a child sees of its parent's death
    assert trainer._child.wait(timeout=60) == 0


def test_model_rows_and_features_are_made_once_for_a_whole_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two head rounds, then two adapter rounds, with the trainer's own object in this process."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return inner(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    counted(AutoModel, "from_pretrained")
    counted(AutoTokenizer, "from_pretrained")
    counted(trainer_module, "read_rows")
    counted(trainer_module, "check_dataset")
    answers = SimpleNamespace(progress=lambda what, done, total: counts.update([what] if done == total else []))
    trainer = Trainer(dataclasses.replace(site.settings(), device="cpu"), site.agreed, answers)
    assert counts == {"from_pretrained": 2}, "the data is not opened before it is asked for"
    counted(trainer._classifier, "pooled")
    trainer.train(site.adapter, site.sha256, 0)
    passes = counts["pooled"]
    trainer.train(site.adapter, site.sha256, 1)
    assert counts["pooled"] == passes, "the second head round has the first one's features"
    for index in (2, 3):
        trainer.train(site.adapter, site.sha256, index)
    assert counts["pooled"] > passes
    assert (counts["from_pretrained"], counts["read_rows"], counts["check_dataset"]) == (2, 1, 1)
    assert counts["features"] == 1


def test_what_a_site_sets_for_its_memory_reaches_the_model(site: Site) -> None:
    settings = dataclasses.replace(
        site.settings(), device="cpu", base_weights="bfloat16", gradient_checkpointing=True, tokens_per_batch=64
    )
    classifier = Trainer(settings, site.agreed, SimpleNamespace())._classifier
    assert classifier.batches.tokens == 64
    assert classifier.encoder.get_input_embeddings().weight.dtype == torch.bfloat16
    block = classifier.encoder.base_model.model.encoder.layer[0]
    assert block.forward.func is checkpoint


@pytest.mark.parametrize("too_much", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)])
def test_too_little_memory_is_a_sentence_and_not_a_failure_that_nobody_understands(too_much: Any) -> None:
    said: list[str] = []
    answers = SimpleNamespace(error=said.append)
    with answering_errors(answers):
        too_much()
    (sentence,) = said
    assert sentence.startswith("Training ran out of memory; free some, or set gradient_checkpointing = true")


def test_what_changed_since_it_was_agreed_is_refused(site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path)
    settings = dataclasses.replace(other.settings(), device="cpu")
    other.dataset.write_text("note,chapter\neye,Eye\n")
    trainer = Trainer(settings, other.agreed, SimpleNamespace())
    with pytest.raises(LocalError, match=r"rows\.csv has changed since it was added"):
        trainer.train(other.adapter, other.sha256, 0)
    (other.model / "vocab.txt").write_text("other\n")
    with pytest.raises(LocalError, match="but the plan asks for"):
        Trainer(settings, other.agreed, SimpleNamespace())


def test_a_device_that_is_not_there_is_found_before_the_data_is_opened(site: Site) -> None:
    settings = dataclasses.replace(site.settings(), device="cuda:7", dataset="/nowhere/rows.csv")
    with pytest.raises(LocalError, match="cuda:7"):
        TrainerProcess(settings, site.agreed).open()


# False children


PROGRESS = b'{"say": "progress", "what": "steps", "done": 1, "total": 9, "bytes": 0}\n'
OPEN = r"""out.write(b'{"say": "open", "bytes": 0}\n'); out.flush(); """


def false_child(monkeypatch: pytest.MonkeyPatch, script: str) -> list[subprocess.Popen[bytes]]:
    """Every trainer started from here on runs `script` instead; the list holds them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(threads: int, log: Any) -> subprocess.Popen[bytes]:
        prelude = "import sys, json\ninp, out = sys.stdin.buffer, sys.stdout.buffer\n"
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", prelude + script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(child)
        return child

    monkeypatch.setattr(trainer_process, "_start", start)
    return started


@pytest.mark.parametrize("before", ["", OPEN])
@pytest.mark.parametrize(
    "answer",
    [
        b"no json\n",
        b"[]\n",
        b'{"say": "update"}\n',
        b'{"say": "update", "bytes": 8}\n12345678',
        b'{"say": "update", "bytes": 99999999}\n',
        b'{"say": "update", "bytes": -1}\n',
        b'{"say": "hello", "bytes": 0}\n',
        b'{"say": "progress", "what": 1, "done": 1, "total": 1, "bytes": 0}\n',
        b"x" * 70_000,
    ],
)
def test_an_answer_of_another_form_ends_the_child(
    site: Site, monkeypatch: pytest.MonkeyPatch, answer: bytes, before: str
) -> None:
    started = false_child(monkeypatch, f"{before}out.write({answer!r}); out.flush(); inp.read()")
    monkeypatch.setattr(trainer_process, "ENDS_WITHIN", 0.0)
    trainer = TrainerProcess(site.settings(), site.agreed)
    with pytest.raises(LocalError, match="something else than an update"):
        trainer.train(site.adapter, site.sha256, schedule(site.agreed.plan)[0])
    assert started[0].poll() is not None


@pytest.mark.parametrize("script", ["sys.exit(3)", "inp.readline(); sys.exit(3)", f"{OPEN}sys.exit(3)"])
def test_a_child_that_ends_is_named_by_its_status(site: Site, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    false_child(monkeypatch, script)
    with pytest.raises(LocalError, match=r"ended early \(exit status 3\)"):
        TrainerProcess(site.settings(), site.agreed).train(site.adapter, site.sha256, schedule(site.agreed.plan)[0])


def test_a_child_that_cannot_open_says_why_and_is_followed_by_another(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b'{"say": "error", "sentence": "No.", "bytes": 0}\n'
    started = false_child(monkeypatch, f"inp.readline(); out.write({said!r}); out.flush()")
    trainer = TrainerProcess(site.settings(), site.agreed)
    for _ in range(2):
        with pytest.raises(LocalError, match=r"^No\.$"):
            trainer.open()
    assert [child.poll() is None for child in started] == [False, False]


def test_a_killed_child_is_an_error_and_the_next_call_starts_another(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = false_child(monkeypatch, f"{OPEN}out.write({PROGRESS!r}); out.flush(); inp.read()")
    trainer, plan = TrainerProcess(site.settings(), site.agreed), schedule(site.agreed.plan)[0]
    for number in range(2):
        with pytest.raises(LocalError, match=r"killed, most likely because memory ran out"):
            trainer.train(site.adapter, site.sha256, plan, lambda *_: started[-1].kill())
        assert len(started) == number + 1


def test_a_child_that_had_to_be_killed_did_not_run_out_of_memory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    false_child(monkeypatch, f"{OPEN}import os; os.close(1); inp.read()")  # says no more, and does not end
    monkeypatch.setattr(trainer_process, "ENDS_WITHIN", 0.0)
    trainer = TrainerProcess(site.settings(), site.agreed)
    with pytest.raises(LocalError, match=r"ended early \(exit status -9\)"):
        trainer.train(site.adapter, site.sha256, schedule(site.agreed.plan)[0])


def test_stop_ends_a_training_under_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    started = false_child(monkeypatch, f"{OPEN}out.write({PROGRESS!r}); out.flush(); inp.read()")
    trainer, under_way = TrainerProcess(site.settings(), site.agreed), threading.Event()
    stopper = threading.Thread(target=lambda: (under_way.wait(), trainer.stop()))
    stopper.start()
    with pytest.raises(LocalError, match="was stopped"):
        trainer.train(site.adapter, site.sha256, schedule(site.agreed.plan)[0], lambda *_: under_way.set())
    stopper.join()
    assert started[0].poll() == -9
    with pytest.raises(LocalError, match="was stopped"):
        trainer.open()
    assert len(started) == 1


def test_messages_survive_the_pipe() -> None:
    pipe = io.BytesIO()
    write_message(pipe, {"do": "train", "round": 1}, b"\n\0body")
    write_message(pipe, {"do": "stop"})
    pipe.seek(0)
    assert read_message(pipe) == ({"do": "train", "round": 1}, b"\n\0body")
    assert read_message(pipe) == ({"do": "stop"}, b"")
    with pytest.raises(EOFError):
        read_message(pipe)


def test_the_parents_side_has_no_torch() -> None:
    code = "import sys, foedus_client.training.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
