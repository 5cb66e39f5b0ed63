"""Every causal type of the installed transformers trains exactly, or is refused in one sentence."""

import pytest
import transformers
from tests.causal_models import PAGE, NotSmall, measure, table_of
from tests.small_adapters import NOT_MEASURED, PROMPTS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from isotune.io.errors import RunFault, UserError

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ENTRIES = table_of(PAGE.read_text())
ROWS = {kind: [cell.strip() for cell in line.split("|")[2:-1]] for kind, line in ENTRIES.items() if line[0] == "|"}
FORMS = {kind: cells[0] for kind, cells in ROWS.items()}
FAST = {"llama"}


def test_the_table_has_the_architectures_that_people_start_from():
    assert len(FORMS) >= 45
    common = {"llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2"}
    assert {kind: FORMS.get(kind) for kind in common} == dict.fromkeys(common, "packed")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS])
def test_each_type_agrees_with_its_stock_model_or_is_refused_in_one_sentence(kind: str):
    transformers.logging.set_verbosity_error()
    try:
        row = measure(kind)
    except NotSmall as reason:
        assert kind not in FAST
        pytest.skip(f"no small model: {reason}")
    except (UserError, RunFault) as refusal:
        assert "\n" not in str(refusal) and kind not in FORMS
        return
    assert FORMS.get(kind, row.form) == row.form
    assert row.leak == 0.0
    assert max(row.logits, row.loss) <= 1e-5
    assert row.gradient <= 1e-4
    lora, export, answers = ROWS[kind][5:8] if kind in ROWS else [NOT_MEASURED] * 3
    row.lora.check(lora, export)
    assert "\n" not in row.notes and row.answers in (None, len(PROMPTS))
    assert answers in (NOT_MEASURED, "refused" if row.answers is None else "yes")
