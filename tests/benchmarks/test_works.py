"""What is timed side by side gives the same numbers."""

import pytest
import torch
import transformers

from tests.benchmarks.works import attention_probe, gpt2, gpt_neox, stimulus_for, transformer_lens

SIZES = {"layers": 2, "width": 32, "heads": 4, "vocabulary": 64, "positions": 40}


@pytest.fixture
def loud():
    """The import of TransformerLens silences transformers."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("make", [gpt2, gpt_neox])
def test_transformer_lens_does_the_same_work(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(**SIZES)
    for parameter in model.parameters():
        # Far from uniform attention.
        parameter.data *= 10
    stimulus = stimulus_for(model, 3, 40)
    layers, _ = transformer_lens(model)(stimulus)
    columns = attention_probe(model)(stimulus)
    # All but the logits, which it would have to keep as well.
    assert layers[0].keys() == {name for name in columns if f"{name}_null" in columns} - {
        "previous_token_text",
        "largest_logit",
    }
    for name in layers[0]:
        fields = torch.cat([layer[name] for layer in layers])
        torch.testing.assert_close(fields, columns[name], atol=1e-5, rtol=0, check_dtype=False)
    assert columns["normalized_entropy"].max() < 0.95
