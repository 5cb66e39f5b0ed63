"""Every classifier of the installed transformers trains exactly, or is refused in one sentence."""

import pytest
import torch
import transformers
from tests.classifier_models import KINDS, NotSmall, measure
from tests.models_table import PAGE, cells_of_lora, trained_classifiers

from isotune.io.errors import RunFault, UserError

FORMS = trained_classifiers(PAGE.read_text())
# among them: neighbours in a token's embedding, sampled routers, an encoder with a decoder, characters
FAST = {"bert", "mobilebert", "phimoe", "bart", "canine", "xlnet", "stablelm"}
# whose scan of a padded text is cut elsewhere: 1.4e-5 of the gradient in fp32, all of it rounding
ROUNDED = {"zamba2"}
# whose experts multiply the tokens of all texts at once, in products whose rounding depends on their number
ROUTED: set[str] = set()


def test_the_table_has_the_classifiers_that_people_start_from():
    assert len(FORMS) >= 90
    common = {"bert", "roberta", "distilbert", "electra", "modernbert", "llama", "qwen3", "gpt2"}
    assert {kind: FORMS.get(kind) for kind in common} == dict.fromkeys(common, "packed")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS])
def test_each_type_agrees_with_its_stock_model_or_is_refused_in_one_sentence(kind: str):
    transformers.logging.set_verbosity_error()
    try:
        found = measure(kind, with_lora=kind == "bert" or kind not in FAST)
    except NotSmall as reason:
        assert kind not in FAST
        pytest.skip(f"no small model: {reason}")
    except (UserError, RunFault) as refusal:
        assert "\n" not in str(refusal) and kind not in FORMS
        return
    assert FORMS.get(kind, found.form) == found.form
    assert found.leak <= (1e-5 if kind in ROUTED else 0.0)
    if found.lora is not None:
        found.lora.check(*cells_of_lora(PAGE.read_text()).get(kind, found.lora.cells))
    if kind in ROUNDED:
        found = measure(kind, torch.float64, with_lora=False)
        assert max(found.logits, found.loss, found.gradient) <= 1e-6
    else:
        assert max(found.logits, found.loss, found.gradient) <= 1e-5
