"""The process that trains at a site: one per run, the only one there with torch.

Reads requests on standard input and answers on standard output (messages as in `process`); its log is standard
error. It is told everything by its parent and reads three things: the model folder, adapter files and, at the first
request to train, the dataset; each is checked against its hash first. It ends when its parent's end of the pipe closes.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from foedus_client.data import read_rows
from foedus_client.training.process import TrainerSettings, read_message, write_message
from foedus_common.adapters import adapter_bytes, load_adapter
from foedus_common.core_dumps import forbid_core_dumps
from foedus_common.errors import LocalError
from foedus_common.model_folder import verify
from foedus_common.plan import AgreedPlan, parse_agreed_plan, schedule
from foedus_common.randomness import system_random
from foedus_common.tasks.local_trainer import LocalTrainer, check_spec
from foedus_common.tasks.text_classification import TextClassifier

PROGRESS_EVERY = 0.02
"""Share of a long computation after which it is reported again."""

OUT_OF_MEMORY = (
    "Training ran out of memory; free some, or set gradient_checkpointing = true, a smaller tokens_per_batch or "
    'base_weights = "4bit" in site.toml.'
)

Message = tuple[dict[str, Any], bytes]


class Answers:
    """Standard output, kept for messages alone: what libraries print goes to the log."""

    def __init__(self) -> None:
        self._pipe: IO[bytes] = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._reported = ("", 0.0)

    def progress(self, what: str, done: int, total: int) -> None:
        share = done / total
        before, last = self._reported
        if what != before or share < last or share - last >= PROGRESS_EVERY or done == total:
            self._reported = (what, share)
            write_message(self._pipe, {"say": "progress", "what": what, "done": done, "total": total})

    def open(self) -> None:
        write_message(self._pipe, {"say": "open"})

    def update(self, body: bytes) -> None:
        write_message(self._pipe, {"say": "update"}, body)

    def error(self, sentence: str) -> None:
        write_message(self._pipe, {"say": "error", "sentence": sentence})


class Trainer:
    """One run's trainer. The model is loaded at once, the dataset is opened at the first request to train."""

    def __init__(self, settings: TrainerSettings, agreed: AgreedPlan, answers: Answers) -> None:
        """Raises LocalError when the model or the device is not what plan and settings ask for."""
        self._settings = settings
        self._agreed = agreed
        self._answers = answers
        self._local: LocalTrainer | None = None
        model = Path(settings.model_folder)
        verify(model, agreed.plan.model.sha256)
        self._classifier = TextClassifier.load(
            model,
            agreed.plan,
            settings.device,
            settings.dtype,
            base_weights=settings.base_weights,
            gradient_checkpointing=settings.gradient_checkpointing,
            tokens_per_batch=settings.tokens_per_batch,
        )
        check_spec(self._classifier, agreed)

    def train(self, adapter: Path, sha256: str, index: int) -> bytes:
        """The update of the round, as little-endian float64."""
        if self._local is None:
            self._local = self._with_data()
        spec = self._classifier.spec
        data = read_file(adapter, sha256, adapter_bytes(spec))
        round_plan = schedule(self._agreed.plan)[index]
        return self._local.train(load_adapter(data, spec), round_plan, system_random).astype("<f8").tobytes()

    def _with_data(self) -> LocalTrainer:
        settings, dataset = self._settings, Path(self._settings.dataset)
        check_dataset(dataset, settings.dataset_sha256)
        labels = set(self._agreed.plan.task.labels)
        rows = [row for row in read_rows(dataset, settings.text, settings.label) if row[1] in labels]
        return LocalTrainer(self._classifier, self._agreed, rows, self._answers.progress)


def read_file(path: Path, sha256: str, limit: int) -> bytes:
    """The file's bytes. Raises LocalError when they are more than `limit` or not those that the hash names."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise LocalError(f"The adapter cannot be read: {error.strerror}.") from None
    if len(data) > limit or hashlib.sha256(data).hexdigest() != sha256:
        raise LocalError("The adapter's bytes are not those that the coordinator named.")
    return data


def check_dataset(path: Path, sha256: str) -> None:
    """Raises LocalError unless the file is still the one that was added."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LocalError(f"The dataset {path.name} cannot be read: {error.strerror}.") from None
    if found != sha256:
        raise LocalError(f"The dataset {path.name} has changed since it was added; add it again under a new name.")


def read_requests(pipe: IO[bytes], requests: queue.Queue[Message]) -> None:
    """Runs in a thread of its own: the parent's death or `stop` must end this process in the middle of a step."""
    try:
        while True:
            requests.put(read_message(pipe))
    except EOFError:
        os._exit(0)
    except ValueError:
        os._exit(1)


def log_without_values(error: Exception) -> None:
    """Where it happened and what kind it was; an exception's text could quote a row."""
    print("".join(traceback.format_tb(error.__traceback__)), type(error).__name__, file=sys.stderr, flush=True)


def main() -> None:
    forbid_core_dumps()
    answers = Answers()
    requests: queue.Queue[Message] = queue.Queue()
    threading.Thread(target=read_requests, args=(sys.stdin.buffer, requests), daemon=True).start()
    header, plan = requests.get()
    header.pop("do")
    settings = TrainerSettings(**header)
    os.nice(settings.niceness)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with answering_errors(answers):
        trainer = Trainer(settings, parse_agreed_plan(plan), answers)
        answers.open()
        while True:
            header, _ = requests.get()
            with answering_errors(answers):
                answers.update(trainer.train(Path(header["adapter"]), header["sha256"], header["round"]))


@contextmanager
def answering_errors(answers: Answers) -> Iterator[None]:
    """Whatever goes wrong, the parent hears of it in one sentence."""
    try:
        yield
    except LocalError as error:
        answers.error(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            answers.error(OUT_OF_MEMORY)
            return
        log_without_values(error)
        answers.error("Training failed; the trainer's log says where.")


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for it on a GPU alone."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


if __name__ == "__main__":
    main()
