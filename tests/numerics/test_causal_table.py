"""Every causal type of the installed transformers trains exactly, or is refused in one sentence."""

import re

import pytest
import transformers
from tests.causal_models import BEGIN, END, PAGE, NotSmall, measure
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from isotune.io.errors import RunFault, UserError

TABLE = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", PAGE.read_text(), re.DOTALL)
FORMS = dict(re.findall(r"^\| `([\w.-]+)` \| (packed|padded) ", TABLE[1], re.MULTILINE)) if TABLE else {}


def test_the_table_has_the_architectures_that_people_start_from():
    assert len(FORMS) >= 45
    common = {"llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2"}
    assert {kind: FORMS.get(kind) for kind in common} == dict.fromkeys(common, "packed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_each_type_agrees_with_its_stock_model_or_is_refused_in_one_sentence(kind: str):
    transformers.logging.set_verbosity_error()
    try:
        row = measure(kind)
    except NotSmall as reason:
        pytest.skip(f"no small model: {reason}")
    except (UserError, RunFault) as refusal:
        assert "\n" not in str(refusal) and kind not in FORMS
        return
    assert FORMS.get(kind, row.form) == row.form
    assert row.leak == 0.0
    assert max(row.logits, row.loss) <= 1e-5
    assert row.gradient <= 1e-4
