"""TrainingDynamics for the Trainer of transformers, in real trainings of a tiny GPT-2: when it
measures and what, how runs go on, what it refuses, and that it leaves no trace.
"""

import json
import logging
import random
import shutil
import socket
import subprocess
import sys
import types
import urllib.parse

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import callbacks
import monitor
from callbacks.huggingface import TrainingDynamics
from monitor.capture import NoAttentionError
from monitor.measure import Monitor, measure
from tests.models import VOCABULARY, Bigram, gpt2
from tests.recorded import attempt, page, said, steps, stimulus, tokens

CONTEXT, BATCH = 32, 4
TOKENS_A_BATCH = CONTEXT * BATCH


def text(sequences: int = 64, *, seed: int = 0, positions: int = CONTEXT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (sequences, positions), generator=generator)


HELD_OUT = text(16, seed=5)


class Rows(Dataset):
    """Examples as Trainers take them; `real` of the positions are no padding."""

    def __init__(self, rows, *, real=None):
        self.rows = rows
        self.real = real

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = {"input_ids": self.rows[index], "labels": self.rows[index]}
        if self.real is not None:
            row["attention_mask"] = (torch.arange(len(self.rows[index])) < self.real).long()
        return row


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(Rows(self.rows))


class Keep(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **more):
        self.weights[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def dynamics(root):
    """Makes callbacks that measure few sequences, however long that takes."""

    def dynamics(**more):
        few = {"metrics_port": None, "sequences": 4, "root": root, "overhead": None}
        return TrainingDynamics(**(few | more))

    return dynamics


@pytest.fixture
def trainer(tmp_path):
    """Makes Trainers for 8 steps that are silent and save nothing; other arguments are theirs."""

    def trainer(*callbacks, model=None, train=None, held_out=None, **more):
        defaults = {
            "output_dir": str(tmp_path / "saved"),
            "max_steps": 8,
            "per_device_train_batch_size": BATCH,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        return Trainer(
            model=gpt2() if model is None else model,
            args=TrainingArguments(**(defaults | more)),
            train_dataset=Rows(text()) if train is None else train,
            eval_dataset=held_out,
            callbacks=list(callbacks),
        )

    return trainer


SAVING = {"save_strategy": "steps", "save_steps": 3}


def check_numbers(root, step: int, model) -> None:
    """What is stored at a step is what this model gives, to the last bit."""
    expected = measure(model, text=HELD_OUT, sequences=4, context=CONTEXT)
    for table, field in (("induction", "prefix_matching"), ("in_context", "score")):
        stored = monitor.read(root, table).query(f"step == {step}")[field]
        assert stored.tolist() == expected[table][field].tolist()


# When, and what


def test_everything_by_default(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Somebody else may use the default one.
    monkeypatch.setitem(TrainingDynamics.__init__.__kwdefaults__, "metrics_port", port)
    trainer(TrainingDynamics(overhead=None)).train()
    assert steps("runs") == [0, 1, 2, 4, 8]
    heads = monitor.read("runs", "induction")
    assert len(heads) == 5 * 8
    assert set(heads["validity"]) == {"ok"}
    assert tokens("runs") == [step * TOKENS_A_BATCH for step in (0, 1, 2, 4, 8)]
    row = attempt("runs")
    assert row["config"]["model"] == "GPT2LMHeadModel"
    assert row["config"]["text"] == "training data"
    assert row["config"]["world_size"] == 1


def test_its_arguments_are_those_of_the_other_callback():
    """In one place, so that they cannot come apart."""
    assert TrainingDynamics.__init__ is callbacks.TrainingDynamics.__init__


def test_every_checkpoint_and_the_schedule(trainer, dynamics, root, tmp_path):
    keep = Keep()
    watching = dynamics(schedule=[0, 2, 5], text=HELD_OUT, context=CONTEXT)
    trainer(watching, keep, **SAVING, held_out=Rows(text(8)), eval_strategy="steps",
            eval_steps=2).train()  # fmt: skip
    assert steps(root) == [0, 2, 3, 5, 6, 8]
    assert tokens(root) == [step * TOKENS_A_BATCH for step in (0, 2, 3, 5, 6, 8)]
    for step in (2, 5):
        model = gpt2()
        model.load_state_dict(keep.weights[step])
        check_numbers(root, step, model)
    for step in (3, 6, 8):
        check_numbers(
            root, step, GPT2LMHeadModel.from_pretrained(tmp_path / f"saved/checkpoint-{step}")
        )


def test_checkpoints_at_the_ends_of_epochs(trainer, dynamics, root):
    trainer(dynamics(schedule=[1]), train=Rows(text(12)), save_strategy="epoch", max_steps=-1,
            num_train_epochs=2).train()  # fmt: skip
    assert steps(root) == [1, 3, 6]


def test_steps_are_updates_when_gradients_accumulate(trainer, dynamics, root):
    trainer(dynamics(schedule=2), gradient_accumulation_steps=3, max_steps=4).train()
    assert steps(root) == [0, 2, 4]
    # An epoch has 16 batches: its last update is made of one.
    assert tokens(root) == [step * 3 * TOKENS_A_BATCH for step in (0, 2, 4)]
    assert attempt(root)["config"]["accumulate_grad_batches"] == 3


def test_padding_is_not_counted_among_the_tokens(trainer, dynamics, root):
    trainer(dynamics(schedule=2, text=HELD_OUT), train=Rows(text(), real=20), max_steps=2).train()
    assert tokens(root) == [0, 2 * BATCH * 20]


def test_the_schedule_is_thinned_to_the_budget_and_checkpoints_are_not(
    trainer, dynamics, root, caplog
):
    trainer(dynamics(schedule=1, overhead=1e-6), **SAVING).train()
    assert steps(root) == [0, 3, 6, 8]
    assert sum("overhead=1e-06" in line for line in said(caplog)) == 1


# Its new name is not known to the versions before.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_other_ways_to_train(trainer, dynamics, root, precision):
    model = gpt2()
    model.gradient_checkpointing_enable()
    watching = dynamics(schedule=2, text=HELD_OUT)
    trainer(watching, model=model, max_steps=2, bf16=precision == "bf16").train()
    assert set(monitor.read(root, "induction")["validity"]) == {"ok"}
    assert attempt(root)["config"]["precision"] == precision
    assert steps(root) == [0, 2]


def test_two_models_under_watch_in_one_training(trainer, root, dynamics):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = gpt2(tie_word_embeddings=False)
            self.teacher = gpt2(tie_word_embeddings=False, n_layer=1)

        def forward(self, input_ids, labels):
            return self.student(input_ids=input_ids, labels=labels)

    how = {"text": HELD_OUT, "context": CONTEXT, "schedule": 4}
    watching = [
        dynamics(model="student", root=root / "student", **how),
        dynamics(model=lambda both: both.teacher, root=root / "teacher", **how),
    ]
    running = trainer(*watching, model=Both(), **SAVING)
    running.train()
    for name, layers in (("student", 2), ("teacher", 1)):
        assert steps(root / name) == [0, 3, 4, 6, 8]
        assert monitor.read(root / name, "induction")["layer"].nunique() == layers
        assert tokens(root / name)[-1] == 8 * TOKENS_A_BATCH
    kept = running.state.stateful_callbacks
    assert {kept["phasewatch.0"]["run"], kept["phasewatch.1"]["run"]} == {
        attempt(root / name)["run"] for name in ("student", "teacher")
    }
    assert "training_step" not in vars(running)


# Held-out text


class Broken(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise OSError("planted")


def table(rows):
    """With columns that no model takes."""
    return datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "labels": rows.tolist(), "title": ["a"] * len(rows)}
    )


@pytest.mark.parametrize(
    "held_out",
    [
        Rows(HELD_OUT),
        {"a": Broken(), "b": Rows(HELD_OUT)},
        table(HELD_OUT),
    ],
)
def test_held_out_text_comes_from_the_evaluation_data(trainer, dynamics, root, held_out):
    trainer(dynamics(schedule=8), held_out=held_out).train()
    assert attempt(root)["config"]["text"] == "evaluation data"
    shown = stimulus(root, "text")
    assert len(shown) == 4
    assert all(row in HELD_OUT.tolist() for row in shown)


@pytest.mark.parametrize("held_out", [None, Broken(), Rows(text(8) + VOCABULARY)])
@pytest.mark.parametrize("train", [Rows, table])
def test_else_from_the_training_data(trainer, dynamics, root, held_out, train):
    trainer(dynamics(schedule=8), train=train(text(seed=3)), held_out=held_out).train()
    assert attempt(root)["config"]["text"] == "training data"
    assert all(row in text(seed=3).tolist() for row in stimulus(root, "text"))


def test_else_from_the_first_batch(trainer, dynamics, root):
    trainer(dynamics(schedule=8), train=Stream(text(seed=3))).train()
    assert attempt(root)["config"]["text"] == "first training batch"
    assert sorted(stimulus(root, "text")) == sorted(text(seed=3)[:BATCH].tolist())
    assert tokens(root) == [0, 8 * TOKENS_A_BATCH]


# Runs that go on


@pytest.fixture
def saved(trainer, dynamics):
    """A run of 8 steps, with checkpoints at 3, 6 and 8."""
    trainer(dynamics(schedule=2), **SAVING).train()


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_goes_on_from_a_checkpoint(trainer, dynamics, root, tmp_path, saved, restore):
    stimuli = stimulus(root, "repeated")
    shutil.rmtree(tmp_path / "saved/checkpoint-8")
    running = trainer(
        dynamics(schedule=2, seed=3), max_steps=10, **SAVING,
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    running.train(resume_from_checkpoint=True)
    frame = monitor.read(root, "in_context")
    assert frame["run"].nunique() == 1
    assert frame["step"].tolist() == [0, 2, 3, 4, 6, 8, 9, 10]
    assert frame["attempt"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert frame["tokens"].tolist() == [step * TOKENS_A_BATCH for step in frame["step"]]
    assert monitor.read(root, "attempts")["resumed_from"].fillna(-1).tolist() == [-1, 6]
    assert stimulus(root, "repeated") == stimuli
    assert len(list(root.glob("_superseded/in_context/run=*/*.parquet"))) == 1


def test_a_checkpoint_saved_without_the_callback(trainer, dynamics, root, tmp_path):
    trainer(**SAVING, max_steps=3).train()
    trainer(dynamics(schedule=2), **SAVING).train(resume_from_checkpoint=True)
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [4, 6, 8]
    # Nobody counted the tokens of the first three steps: a number would be wrong.
    assert frame["tokens"].isna().all()
    state = json.loads((tmp_path / "saved/checkpoint-8/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["phasewatch"] == {"run": frame["run"][0], "tokens": None}


def test_a_new_training_with_the_same_callback_is_a_new_run(trainer, dynamics, root):
    running = trainer(dynamics(schedule=4))
    running.train()
    running.train()
    assert steps(root) == [0, 4, 8] * 2
    assert tokens(root) == [0, 4 * TOKENS_A_BATCH, 8 * TOKENS_A_BATCH] * 2
    assert monitor.read(root, "in_context")["run"].nunique() == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_broken_off_can_be_read_and_goes_on(trainer, dynamics, root, error):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 5:
                raise error("stop")

    watching, stop = dynamics(schedule=1, metrics_port=0), Stop()
    running = trainer(watching, stop, **SAVING)
    with pytest.raises(error, match="stop"):
        running.train()
    assert steps(root) == [0, 1, 2, 3, 4, 5]
    port = urllib.parse.urlsplit(watching.monitor.url).port
    # In the same process, as a notebook would.
    running.remove_callback(stop)
    running.train(resume_from_checkpoint=True)
    assert monitor.read(root, "in_context")["attempt"].tolist() == [1] * 4 + [2] * 5
    assert monitor.read(root, "in_context")["run"].nunique() == 1
    assert tokens(root) == [step * TOKENS_A_BATCH for step in range(9)]
    assert "training_step" not in vars(running)
    socket.create_server(("127.0.0.1", port)).close()


def test_metrics_while_it_trains(trainer, dynamics):
    pages = []

    class Look(TrainerCallback):
        def on_step_end(self, *arguments, **more):
            pages.append(page(watching.monitor.url))

    watching = dynamics(schedule=1, run="mine", metrics_port=0)
    trainer(watching, Look(), max_steps=2).train()
    for step, shown in zip((1, 2), pages, strict=True):
        assert f'phasewatch_step{{run="mine"}} {step}.0' in shown
        assert f'phasewatch_tokens{{run="mine"}} {step * TOKENS_A_BATCH}.0' in shown
    assert watching.monitor is None


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": 9}, ValueError, "never fires in this training, which ends at step 8"),
        ({"text": text() + VOCABULARY}, ValueError, "expected 0 to 47"),
        ({"context": 65}, ValueError, "context=65 is longer than the 64 positions"),
        ({"vocab_size": 99}, ValueError, f"own vocabulary of {VOCABULARY}"),
        ({"sequences": 1}, ValueError, "sequences=1"),
        ({"model": "lm"}, ValueError, "GPT2LMHeadModel has no such attribute"),
    ],
)
def test_arguments_that_are_refused_before_the_first_step(
    trainer, dynamics, root, arguments, error, message
):
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    running = trainer(dynamics(**arguments), model=model)
    with pytest.raises(error, match=message):
        running.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not root.exists() or monitor.tables(root) == []


@pytest.mark.parametrize("overhead", [0, -1, 2, "2%", True])
def test_overheads_that_are_refused_at_once(overhead):
    with pytest.raises(ValueError, match=r"overhead=.*expected the share"):
        TrainingDynamics(overhead=overhead)


def test_a_model_that_shows_no_attention_is_refused(trainer, dynamics):
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Bigram(vocab_size=VOCABULARY)

        def forward(self, input_ids, labels):
            logits = self.net(input_ids)
            return {"loss": torch.nn.functional.cross_entropy(logits.mT, labels)}

    with pytest.raises(NoAttentionError):
        trainer(dynamics(), model=Counts()).train()
    trainer(dynamics(probes=["in_context"]), model=Counts()).train()


def test_somebody_elses_loop_is_told_so(dynamics):
    with pytest.raises(RuntimeError, match=r"Trainer\(callbacks=\[...\]\).*monitor.measure"):
        dynamics().on_train_begin(None, types.SimpleNamespace(stateful_callbacks={}), None)


def test_a_probe_that_raises_does_not_stop_training(trainer, dynamics, root, monkeypatch, caplog):
    def broken(observations):
        raise ZeroDivisionError("planted")

    prepare = Monitor.prepare

    def prepare_broken(self, *arguments):
        given = prepare(self, *arguments)
        first, *rest = self._probes
        self._probes = (type(first)(spec=first.spec, compute=broken), *rest)
        return given

    monkeypatch.setattr(Monitor, "prepare", prepare_broken)
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        done = trainer(dynamics(schedule=2)).train()
    assert done.global_step == 8
    assert steps(root) == [0, 2, 4, 6, 8]
    assert len(monitor.read(root, "failures")) == 5
    assert caplog.text.count("induction failed, training goes on") == 1


# What it leaves behind


class Jittered(Rows):
    """Examples that draw on every random stream there is."""

    def __getitem__(self, index):
        shift = random.randrange(3) + int(np.random.randint(3)) + int(torch.randint(3, ()))
        row = (self.rows[index] + shift) % VOCABULARY
        return {"input_ids": row, "labels": row}


class Batches(Trainer):
    def training_step(self, model, inputs, *others, **named):
        vars(self).setdefault("seen", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *others, **named)


def train_jittered(folder, *callbacks) -> dict:
    """Trains with dropout; everything that training left behind."""
    running = Batches(
        model=gpt2(resid_pdrop=0.2, attn_pdrop=0.1),
        args=TrainingArguments(
            str(folder), max_steps=40, per_device_train_batch_size=BATCH, use_cpu=True,
            report_to=[], disable_tqdm=True, eval_strategy="steps", eval_steps=7,
            save_strategy="no", logging_steps=5, gradient_accumulation_steps=2, seed=11,
        ),
        train_dataset=Jittered(text()),
        eval_dataset=Jittered(text(8, seed=3)),
        callbacks=list(callbacks),
    )  # fmt: skip
    running.train()
    timing = ("runtime", "per_second")
    return {
        "weights": running.model.state_dict(),
        "optimizer": running.optimizer.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "batches": torch.stack(running.seen),
        "modes": [part.training for part in running.model.modules()],
        "log": [
            {name: value for name, value in line.items() if not name.endswith(timing)}
            for line in running.state.log_history
        ],
    }


def identical(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


class Draw(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 30:
            torch.rand(1)


def test_training_is_bit_identical_with_and_without_it(dynamics, root, tmp_path):
    bare = train_jittered(tmp_path / "bare")
    watched = train_jittered(tmp_path / "watched", dynamics(schedule=3, metrics_port=0))
    assert steps(root) == list(range(0, 40, 3))
    for what, expected in bare.items():
        assert identical(expected, watched[what]), what
    # The comparison can fail.
    disturbed = train_jittered(tmp_path / "disturbed", Draw())
    same = {what for what in bare if identical(bare[what], disturbed[what])}
    assert same.isdisjoint({"weights", "optimizer", "torch", "batches"})
    assert {"modes"} <= same


def test_the_trainers_own_step_comes_back_as_it_was(trainer, dynamics):
    calls = []
    running = trainer(dynamics(schedule=8))
    own = running.training_step

    def step(*arguments, **named):
        calls.append(len(arguments))
        return own(*arguments, **named)

    running.training_step = step
    running.train()
    assert len(calls) == 8
    assert vars(running)["training_step"] is step


# Which packages it needs


@pytest.mark.parametrize(
    ("absent", "statement"),
    [
        (["transformers", "lightning", "pytorch_lightning"], "import callbacks.watching"),
        (["lightning", "pytorch_lightning"], "from callbacks.huggingface import TrainingDynamics"),
    ],
)
def test_one_trainers_callback_does_not_need_the_others_package(absent, statement):
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {statement}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_what_the_package_does_not_have():
    with pytest.raises(AttributeError, match="'callbacks' has no attribute 'TrainingDynamcs'"):
        callbacks.TrainingDynamcs  # noqa: B018
