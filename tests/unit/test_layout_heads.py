"""Whether a stock classifier asks for the token that pads, whatever its configuration allows to say."""

import pytest
from tests.classifier_models import small_classifier

from isotune.models.layouts.heads import reads_last_token


@pytest.mark.parametrize(
    ("kind", "reads"),
    [("llama", True), ("gpt2", True), ("bert", False), ("nomic_bert", False)],  # Nomic's refuses to be without one
)
def test_a_head_that_looks_for_the_last_token_is_known_and_its_configuration_stays(kind, reads):
    model = small_classifier(kind)
    before = model.config.to_dict()
    assert reads_last_token(model) is reads
    assert model.config.to_dict() == before
