"""Whatever model trains, the estimate with which every run starts can be made of its configuration alone."""

from typing import Any

import pytest
import transformers
from tests import causal_models
from tests.causal_models import small_config, table_of
from tests.models_table import PAGE, trained_classifiers
from torch import nn
from transformers import AutoConfig

from isotune.config import ClassificationRecipe, Recipe
from isotune.io.errors import UserError
from isotune.models.opening import check_kind, empty_base_model
from isotune.models.packed_attention import max_positions
from isotune.preflight import preflight_report
from isotune.preflight.preflight_report import Estimator, NotTraced
from isotune.preflight.request import PLAIN, Launch
from isotune.preflight.resources.blocks import layers_of, with_layers
from isotune.preflight.resources.sharding import model_builder

TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 512}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# models of pictures and texts, as they are published: what a language model needs to know stands in their text_config
COMPOSITE = ("gemma3", "qwen3_5")


def recipe(kind: type = Recipe, **values: Any) -> Any:
    own = {"tune": "full", "max_seq_length": 64, "microbatch_tokens": 128, "output_dir": "runs/none"} | values
    return kind.from_values(model_name_or_path="builtin:opt-tiny", dataset_name="builtin:greetings", **own)


def estimator(config: Any, kind: type = Recipe, **values: Any) -> Estimator:
    return Estimator(recipe(kind, **values), config, None, on_cpu=True)


# layer_types without a setter, state heads, blocks in groups, windows by layer, a parameter that is drawn on the CPU
TRICKY = {"bamba", "falcon_h1", "falcon_mamba", "funnel", "jamba", "longformer", "mamba", "mamba2", "recurrent_gemma"}
TRICKY |= {"xlnet"}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Recipe, ClassificationRecipe])
def test_every_type_of_the_tables_starts(kind: type, every: bool):
    transformers.logging.set_verbosity_error()
    page = PAGE.read_text()
    causal = [name for name, entry in table_of(page).items() if entry.startswith("|")]
    names = set(causal if kind is Recipe else trained_classifiers(page))
    assert len(names) >= 90 and len(names & TRICKY) >= 4
    failed = {}
    for name in names if every else names & TRICKY:
        try:
            config = small_config(name)
            check_kind(recipe(kind), config)
            assert estimator(config, kind).stats.numel > 0
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_model_of_pictures_and_texts_is_estimated_by_its_text_part(name: str):
    config = AutoConfig.for_model(name, text_config=TEXT, vision_config=VISION)
    found = estimator(config)
    assert (found.stats.layers, found.stats.attention_size) == (5, 32)
    assert found.stats.block_numel > 0 and max_positions(config) == 512
    smaller = with_layers(config, 2)
    assert smaller is not None and layers_of(smaller) == 2 and layers_of(config) == 5


# the layers that are left where two are asked for
SHORTENED = {"mamba2": 2, "jamba": 2, "recurrent_gemma": 2, "longformer": 2, "gemma3_text": 2, "funnel": None}


@pytest.mark.parametrize("name", SHORTENED)
def test_fewer_blocks_are_a_model_too_where_a_type_can_have_them(name: str, monkeypatch: pytest.MonkeyPatch):
    for key in ("num_hidden_layers", "num_layers"):
        monkeypatch.setitem(causal_models.SMALL, key, 6)
    more = {"attention_window": [8] * 6} if name == "longformer" else {}
    config = small_config(name, **more)
    smaller = with_layers(config, 2)
    assert (smaller and layers_of(smaller)) == SHORTENED[name]
    task = ClassificationRecipe if name in ("longformer", "funnel") else Recipe
    if smaller is not None:
        whole, two = (model_builder(recipe(task), config)(layers) for layers in (None, 2))
        assert 0 < count(two) < count(whole)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_model_that_needs_values_is_estimated_without_its_activations(monkeypatch: pytest.MonkeyPatch):
    def stops(*_: Any, **__: Any) -> Any:
        raise RuntimeError("aten._local_scalar_dense.default\nmore")

    monkeypatch.setattr(preflight_report, "trace_microbatch", stops)
    found = estimator(small_config("gpt2"))
    assert found.stats.numel > 0
    with pytest.raises(NotTraced, match=r"^the activations of model type 'gpt2' cannot be estimated \(aten[^\n]*\)$"):
        found.memory(found.recipe, Launch(PLAIN, 1))


@pytest.mark.parametrize(("name", "task", "what"), [
    ("t5", Recipe, "model type 't5' has no causal language model in transformers"),
    ("fnet", Recipe, "model type 'fnet' has no causal language model in transformers"),
    ("clip", ClassificationRecipe, "model type 'clip' has no classifier in transformers"),
    ("musicgen", Recipe, "model type 'musicgen' cannot be trained"),
])  # fmt: skip
def test_a_type_that_transformers_has_no_such_model_of_is_one_sentence(name: str, task: type, what: str):
    config = AutoConfig.for_model("opt") if name == "musicgen" else AutoConfig.for_model(name)
    if name == "musicgen":
        config = AutoConfig.for_model(name, text_encoder=config, audio_encoder=config, decoder=config)
    with pytest.raises(UserError, match=f"^{what}"):
        check_kind(recipe(task), config)


def test_a_configuration_that_builds_no_model_is_one_sentence():
    config = AutoConfig.for_model("gpt2", n_embd=30, n_head=4)
    with pytest.raises(UserError, match=r"^the configuration of '.*' makes no model: "):
        empty_base_model(recipe(), config)
