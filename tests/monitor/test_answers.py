"""Answers to the questions of a task: from models of every shape that can give them, also in parts,
and leaving no trace; recorded with a run, also where it goes on.
"""

import copy
import dataclasses
import functools

import pytest
import torch

import monitor
from monitor import answers
from monitor.anatomy import NotALanguageModelError, find_language_model
from monitor.capture import NoAttentionError, Observation, observe
from monitor.measure import Monitor, measure
from monitor.tasks import ModularAddition, Task, task_stimulus
from tests.models import AttentionOnly, gpt2
from tests.models.sums import AnswerOnly, OneByOne, ShortTransformer, random_pairs
from tests.recorded import attempt, stimulus

P = 11
TASK = ModularAddition(P, train=random_pairs(P))
TWO = dataclasses.replace(TASK, sequence=("a", "b"))

SHAPES = {
    "answer_only": (functools.partial(AnswerOnly, P), TWO),
    "one_by_one": (functools.partial(OneByOne, P), TWO),
    "short_transformer": (functools.partial(ShortTransformer, P), TASK),
    "attention_only": (AttentionOnly, TASK),
    "gpt2": (gpt2, TASK),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def made(shape):
    torch.manual_seed(0)
    make, task = SHAPES[shape]
    return make(), task


def answered(module, task):
    model = find_language_model(module, task=task)
    asked = task_stimulus(task, vocab_size=model.vocab_size, width=model.width)
    return model, asked, observe(model, asked, answers=True)


@each_shape
def test_what_is_answered_is_what_the_model_says(shape):
    module, task = made(shape)
    seen = answered(module, task)[2].answers
    read = task.questions().tokens
    module.eval()
    with torch.no_grad():
        output = module(read[:, :-1])
    output = getattr(output, "logits", output)
    logits = output if output.ndim == 2 else output[:, -1]
    losses = -logits.double().log_softmax(-1).gather(1, read[:, -1:])[:, 0]
    assert torch.allclose(seen.losses, losses, atol=1e-5)
    assert torch.equal(seen.right, (logits.argmax(-1) == read[:, -1]).long())
    assert torch.allclose(seen.logits, logits[:, :P].double(), atol=1e-5)


@each_shape
def test_the_ends_are_those_of_the_numbers(shape):
    module, task = made(shape)
    seen = answered(module, task)[2].answers
    tables = [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    assert torch.equal(seen.embedding, tables[0][:P].detach().double())
    ends = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert torch.equal(seen.unembedding, ends[-1][:P].detach().double())


@each_shape
def test_all_of_a_measurement_and_nothing_of_it_in_the_model(shape):
    module, task = made(shape)
    module.train()
    before = copy.deepcopy(module.state_dict())
    state = torch.random.get_rng_state()
    table = measure(module, probes=["grokking"], task=task)["grokking"]
    assert table["validity"].tolist() == ["ok"]
    assert not table[["gini_embedding", "gini_unembedding", "weight_norm"]].isna().any(axis=None)
    assert module.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(module._forward_hooks for module in module.modules())


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("short_transformer", "context=3 is too short to repeat random tokens in"),
        ("small_vocabulary", "vocab_size=12 is too small for blocks of"),
    ],
)
def test_what_needs_longer_sequences_is_refused_where_it_is_asked_for(shape, said):
    module = (
        AttentionOnly(vocab_size=P + 1, context=256)
        if shape == "small_vocabulary"
        else made(shape)[0]
    )
    for probes in (None, ["induction", "grokking"]):
        with pytest.raises(ValueError, match=f"{said}.*for the task alone: probes="):
            measure(module, probes=probes, task=TASK)
    assert "grokking" in measure(module, probes=["grokking"], task=TASK)


def test_a_model_without_attention_says_so_only_where_attention_is_asked_for():
    class Pointwise(torch.nn.Module):
        """A language model by its shape: of every position what its own token says."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(P + 1, P + 1)

        def forward(self, tokens):
            return self.table(tokens)

    assert "grokking" in measure(Pointwise(), probes=["grokking"], task=TASK, context=16)
    with pytest.raises(NoAttentionError):
        measure(Pointwise(), probes=["grokking", "induction"], task=TASK, context=16)


def test_without_its_task_such_a_model_is_none():
    with pytest.raises(NotALanguageModelError):
        find_language_model(AnswerOnly(P))
    with pytest.raises(NotALanguageModelError, match="less than the 11 that the task's answers"):
        find_language_model(torch.nn.Sequential(torch.nn.Embedding(P + 1, 6)), task=TASK)


def test_it_is_found_within_another_module():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = AnswerOnly(P)

    wrapped = Wrapper()
    assert find_language_model(wrapped, task=TWO).module is wrapped.net


def test_parts_and_chunks_are_the_whole(monkeypatch):
    module, task = made("short_transformer")
    model, asked, whole = answered(module, task)
    monkeypatch.setattr(answers, "_QUESTIONS", 50)
    parts = []
    for start, stop in ((0, 70), (51, 121)):
        part = asked.rows(start, stop, torch.device("cpu"))
        parts.append((start, observe(model, part, answers=True)))
    joined = Observation.join(asked, parts).answers
    for field in ("losses", "right", "logits", "embedding", "unembedding"):
        assert torch.allclose(getattr(joined, field), getattr(whole.answers, field)), field
    assert joined.weight_norm == whole.answers.weight_norm


def test_losses_below_what_float32_tells_from_zero():
    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(40 * torch.eye(8))

        def forward(self, tokens):
            return self.table[tokens]

    rows = torch.arange(8)[:, None].expand(8, 17)
    task = Task(train=rows[:4], held_out=rows[4:], answer=16)
    row = measure(Sure(), probes=["grokking"], task=task, vocab_size=8)["grokking"].iloc[0]
    assert row["train_loss"] == pytest.approx(7 * 2.718281828**-40, rel=1e-3)


def test_what_has_no_questions_is_refused():
    model = find_language_model(AttentionOnly())
    asked = task_stimulus(TASK, vocab_size=64, width=64)
    with pytest.raises(ValueError, match="stimulus 'task': expected the questions of a task"):
        observe(model, dataclasses.replace(asked, labels=None), answers=True)


def test_a_run_keeps_its_task_when_it_goes_on(tmp_path):
    module, task = made("short_transformer")
    keyed = dataclasses.replace(task, keys=[2, 4])
    arguments = {"run": "r", "probes": ["grokking"]}
    with Monitor(tmp_path, task=keyed, **arguments) as watch:
        watch.measure(module, step=0)
    assert attempt(tmp_path)["config"]["concepts"] == {}
    assert stimulus(tmp_path, "task") == task.questions().tokens.tolist()
    other = ModularAddition(P, train=random_pairs(P, seed=5))
    with Monitor(tmp_path, task=other, **arguments) as watch:
        watch.measure(module, step=1)
    first, second = monitor.read(tmp_path, "grokking").drop(columns=["time", "spectrum"]).iloc
    same = ["train_loss", "restricted_loss_named", "excluded_loss_named", "gini_embedding"]
    assert first[same].tolist() == second[same].tolist()
    assert first[same].notna().all()
    assert [first["attempt"], second["attempt"]] == [1, 2]


def test_what_is_no_task_is_refused_whatever_the_model():
    for module in (AnswerOnly(P), AttentionOnly()):
        with pytest.raises(TypeError, match="task= is str; expected a Task or a ModularAddition"):
            measure(module, probes=["grokking"], task="addition")
