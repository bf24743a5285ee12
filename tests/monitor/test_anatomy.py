"""Finding the language model in whatever module is passed, how it is called, and what is known of
it: vocabulary, context, beginning of sequence, and the numbers of its layers.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from monitor.anatomy import NotALanguageModelError, find_language_model, layer_numbers
from monitor.untouched import untouched
from tests import models
from tests.models import AttentionOnly, Bigram

TOKENS = torch.arange(20).view(2, 10)


def logits(model):
    with untouched(model.module):
        return model.logits(TOKENS)


class Holder(nn.Module):
    """A training module: it holds other modules and cannot be called on token ids."""

    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)

    def forward(self, batch):
        return batch["inputs"]


class Returning(nn.Module):
    """A language model that wraps its logits."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.inner = Bigram()
        self.wrap = wrap

    def forward(self, tokens):
        return self.wrap(self.inner(tokens))


class NanoGPT(nn.Module):
    """Without targets it gives the logits of the last position only, and always a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(64, 8)
        self.wpe = nn.Embedding(32, 8)
        self.lm_head = nn.Linear(8, 64)

    def forward(self, idx, targets=None):
        hidden = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        if targets is None:
            return self.lm_head(hidden[:, [-1]]), None
        logits = self.lm_head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Positioned(nn.Module):
    """A model whose position table begins with `offset` rows that no position uses."""

    def __init__(self, rows: int, offset: int = 0, *, batched: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(64, 8)
        self.position = nn.Embedding(rows, 8)
        self.offset = offset
        self.batched = batched
        self.unembedding = nn.Linear(8, 64)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1]) + self.offset
        if self.batched:
            positions = positions.expand_as(tokens)
        return self.unembedding(self.token(tokens) + self.position(positions))


@pytest.mark.parametrize("kind", models.HUGGING_FACE)
def test_hugging_face_models(kind):
    module = models.HUGGING_FACE[kind]()
    model = find_language_model(module)
    assert model.module is module
    assert (model.vocab_size, model.max_context, model.bos) == (48, 64, 0)
    assert model.parameter_count == module.num_parameters()
    assert model.device == torch.device("cpu")
    assert logits(model).shape == (2, 10, 48)


def test_a_bos_outside_of_the_vocabulary_is_none():
    module = models.gpt2()
    module.config.bos_token_id = 50256
    assert find_language_model(module).bos is None
    assert find_language_model(Bigram()).bos is None


def test_tied_parameters_count_once():
    module = Bigram()
    module.unembedding.weight = module.token.weight
    assert find_language_model(module).parameter_count == 64 * 8 + 64


def test_the_model_is_found_inside_of_others():
    inner = Bigram()
    root = Holder(wrapper=Holder(model=inner), metric=nn.Linear(3, 3))
    assert find_language_model(root).module is inner


def test_the_outermost_module_that_is_a_language_model_is_taken():
    module = Returning(lambda logits: logits)
    assert find_language_model(module).module is module


def test_one_model_held_twice_is_one():
    inner = Bigram()
    assert find_language_model(Holder(model=inner, teacher_free_alias=inner)).module is inner


def test_of_two_models_one_must_be_named():
    root = Holder(student=Bigram(), teacher=Bigram())
    message = r"2 language models found in Holder: student, teacher; expected one .*model='student'"
    with pytest.raises(NotALanguageModelError, match=message):
        find_language_model(root)


def test_none_is_said_with_all_that_was_tried():
    root = Holder(classifier=nn.Sequential(nn.Embedding(64, 8), nn.Flatten(), nn.LazyLinear(2)))
    root.classifier(torch.zeros(2, 16, dtype=torch.long))
    with pytest.raises(NotALanguageModelError) as raised:
        find_language_model(root)
    message = str(raised.value)
    assert "no language model found in Holder" in message
    assert "expected one module that maps token ids [batch, position] to logits" in message
    assert "the module itself (Holder): IndexError" in message
    assert "classifier (Sequential): for token ids [2, 16] it returned [2, 2]" in message
    assert "Pass the language model itself (TrainingDynamics: model='attribute.path')" in message


def test_a_base_model_without_a_head_is_no_language_model():
    base = models.gpt2().transformer
    message = r"the module itself \(GPT2Model\): it returned BaseModelOutput.*, not logits"
    with pytest.raises(NotALanguageModelError, match=message):
        find_language_model(base)


def test_hidden_states_are_not_taken_for_logits():
    body = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8))
    message = "its output is 8 wide, less than its 64 embedded token ids"
    with pytest.raises(NotALanguageModelError, match=message):
        find_language_model(body)


def test_whole_numbers_are_not_taken_for_logits():
    class Rounding(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).long()

    with pytest.raises(NotALanguageModelError, match=r"returned \[2, 16, 64\] \(torch.int64\)"):
        find_language_model(nn.Sequential(nn.Embedding(64, 8), Rounding(8, 64)))


@pytest.mark.parametrize("root", ["gpt2", None, 3, Bigram])
def test_what_is_no_module(root):
    message = rf"expected a torch.nn.Module that maps .*; got {type(root).__name__}$"
    with pytest.raises(TypeError, match=message):
        find_language_model(root)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (logits,),
        lambda logits: [logits, None],
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: SimpleNamespace(loss=None, logits=logits),
        lambda logits: SimpleNamespace(logits=(logits, None)),
    ],
    ids=["tuple", "list", "dictionary", "attribute", "tuple in an attribute"],
)
def test_however_logits_are_returned(wrap):
    module = Returning(wrap)
    model = find_language_model(module)
    assert model.module is module
    torch.testing.assert_close(logits(model), module.inner(TOKENS))


def test_a_model_that_gives_only_the_last_position_without_targets():
    module = NanoGPT()
    model = find_language_model(module)
    assert model.module is module
    assert model.max_context == 32
    assert logits(model).shape == (2, 10, 64)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("rows", "offset", "context"), [(32, 0, 32), (34, 2, 32), (17, 1, 16)])
def test_the_context_is_that_of_the_position_table(rows, offset, context, batched):
    assert find_language_model(Positioned(rows, offset, batched=batched)).max_context == context


def test_the_context_is_that_of_the_configuration():
    module = Bigram()
    assert find_language_model(module).max_context is None
    module.block_size = 40
    assert find_language_model(module).max_context == 40
    module.config = SimpleNamespace(max_position_embeddings=30, n_ctx="unknown")
    assert find_language_model(module).max_context == 30
    both = Positioned(24)
    both.config = SimpleNamespace(max_position_embeddings=100)
    assert find_language_model(both).max_context == 24


def test_rotary_models_have_the_context_of_their_configuration():
    assert find_language_model(models.llama(max_position_embeddings=99)).max_context == 99


def test_the_vocabulary():
    module = Bigram(vocab_size=50)
    assert find_language_model(module).vocab_size == 50
    assert find_language_model(module, vocab_size=30).vocab_size == 30
    # Tables are padded to round sizes: the configuration knows how many tokens there are.
    module.config = SimpleNamespace(vocab_size=47)
    assert find_language_model(module).vocab_size == 47
    assert find_language_model(module, vocab_size=50).vocab_size == 50
    # Nothing is drawn that could not be embedded.
    module.config = SimpleNamespace(vocab_size=64)
    assert find_language_model(module).vocab_size == 50


def test_more_logits_than_embedded_tokens():
    module = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 64))
    assert find_language_model(module).vocab_size == 50


@pytest.mark.parametrize("vocab_size", [65, 50257])
def test_a_vocabulary_larger_than_the_models(vocab_size):
    message = rf"vocab_size={vocab_size} is larger than .* 64 token ids: pass at most 64"
    with pytest.raises(ValueError, match=message):
        find_language_model(Bigram(), vocab_size=vocab_size)


@pytest.mark.parametrize("vocab_size", [0, -1])
def test_a_vocabulary_of_nothing(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size}"):
        find_language_model(Bigram(), vocab_size=vocab_size)


def test_compiled_models_are_looked_through():
    module = AttentionOnly()
    assert find_language_model(torch.compile(module, backend="eager")).module is module
    root = Holder(model=torch.compile(module, backend="eager"))
    assert find_language_model(root).module is module


def test_data_parallel_models_are_looked_through(tmp_path):
    module = AttentionOnly()
    assert find_language_model(nn.DataParallel(module)).module is module
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        assert find_language_model(wrapped).module is module
        assert find_language_model(Holder(model=wrapped)).module is module
        assert find_language_model(torch.compile(wrapped, backend="eager")).module is module
    finally:
        torch.distributed.destroy_process_group()


def test_looking_leaves_the_modules_as_they_were():
    root = Holder(model=Bigram(), metric=nn.BatchNorm1d(3))
    root.metric.eval()
    before = {name: value.clone() for name, value in root.state_dict().items()}
    state = torch.random.get_rng_state()
    find_language_model(root)
    assert root.training
    assert root.model.training
    assert not root.metric.training
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in root.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("paths", "numbers"),
    [
        (["transformer.h.0.attn", "transformer.h.1.attn"], [0, 1]),
        (["layers.1.attention", "layers.3.attention", "layers.12.attention"], [1, 3, 12]),
        (["blocks.0.inner.5.attn", "blocks.1.inner.5.attn"], [0, 1]),
        (["first", "second"], [0, 1]),
        (["", ""], [0, 1]),
        (["shared.0", "shared.0", "shared.0"], [0, 1, 2]),
        (["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"], [0, 1, 2]),
        (["blocks.1", "blocks.0"], [0, 1]),
        (["local", "blocks.0"], [0, 1]),
    ],
)
def test_layer_numbers(paths, numbers):
    assert layer_numbers(paths) == numbers
