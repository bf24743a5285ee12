"""Every field of `induction` against TransformerLens: the attention patterns that it caches of the
same weights on the same tokens, put through the oracle.

Its bridge rewrites the module tree of the model that it gets, so it gets a copy.
"""

import copy

import pytest
import torch
import transformers

from monitor.anatomy import find_language_model
from monitor.batches import StimulusOptions
from monitor.measure import measure
from monitor.probes import induction, select
from monitor.subject import Subject
from tests import models
from tests.oracles import attention as oracle

SEQUENCES, CONTEXT = 6, 40


@pytest.fixture
def build_bridge():
    """TransformerLens's, whose import silences transformers."""
    verbosity = transformers.logging.get_verbosity()
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    yield build_bridge_from_module
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_every_field_agrees_with_transformer_lens(kind, build_bridge):
    model = models.HUGGING_FACE[kind]().eval()
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(models.VOCABULARY, (SEQUENCES, CONTEXT), generator=generator)
    options = {"text": text, "context": CONTEXT, "sequences": SEQUENCES}
    found = measure(model, probes=["induction"], **options)["induction"]

    subject = Subject.new(
        model, find_language_model(model), select(["induction"]), StimulusOptions(**options)
    )
    copied = copy.deepcopy(model)
    bridge = build_bridge(copied, type(model).__name__, hf_config=copied.config)

    def patterns(tokens, what="pattern"):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens)
        return [cache[what, layer] for layer in range(models.LAYERS)]

    repeated, text = (subject.stimuli[name].tokens for name in ("repeated", "text"))
    sampled = subject.stimuli["repeated"].sampled
    expected = oracle.induction(patterns(repeated), repeated, patterns(text), text, sampled=sampled)
    assert {*expected, "largest_logit"} == {field.name for field in induction.SPEC.fields}
    for field, estimates in expected.items():
        tolerance = 1e-5 if field == "entropy" else 1e-6
        for column, part in ((field, "mean"), (f"{field}_stderr", "stderr")):
            wanted = [getattr(estimate, part) for estimate in estimates]
            assert found[column].tolist() == pytest.approx(wanted, abs=tolerance), column
    # Attention is far from uniform, or agreement would say little.
    assert max(estimate.mean for estimate in expected["normalized_entropy"]) < 0.5
    hidden = torch.ones(CONTEXT, CONTEXT).triu(1).bool()
    scores = torch.cat(patterns(repeated, "attn_scores"), dim=1).masked_fill(hidden, float("-inf"))
    largest = scores.amax((-1, -2))
    assert found["largest_logit"].tolist() == pytest.approx(largest.mean(0).tolist(), abs=1e-5)
    stderr = largest.std(0) / SEQUENCES**0.5
    assert found["largest_logit_stderr"].tolist() == pytest.approx(stderr.tolist(), abs=1e-5)
