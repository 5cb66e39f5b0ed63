"""An evaluation that a device has too little memory for is that of the undisturbed device, in smaller batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.building import Built, build, build_classifier, small_opt

from isotune.evaluation.classification.evaluate import classify
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.generation.evaluate import Reference, score_references
from isotune.evaluation.models import Classifier, generation_model_named, load_run_classifier
from isotune.io.errors import RankError, UserError
from isotune.models.layouts.fitting import FittingBatches
from isotune.training.from_recipe import save

LIMIT = 300
ALONE = Ranks(0, 1, torch.device("cpu"))
# each length a letter, and what it sees: fewer than 20 tokens or one item
TEXTS = ["a" * 9, "b" * 8, "c" * 7, "d" * 6, "e" * 5]


def run_out() -> None:
    """As torch's allocator does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def short_of_memory(module: torch.nn.Module, limit: int = LIMIT) -> list[int]:
    """Forwards in evaluation mode of more than `limit` tokens, padding included, raise; returns their sizes."""
    seen: list[int] = []

    def look(layer: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        if not layer.training:
            seen.append(inputs[0].shape[:-1].numel())
            if seen[-1] > limit:
                run_out()

    module.register_forward_hook(look)
    return seen


def tokens(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def test_a_batch_is_halved_until_it_fits_and_no_larger_one_is_tried_again(capsys):
    tried: list[int] = []

    def forward(texts: Sequence[str]) -> str:
        tried.append(len(texts))
        return "".join(texts) if tokens(texts) < 20 else run_out() or ""

    fitting = FittingBatches()
    found = list(fitting.run(TEXTS, tokens, forward))
    assert [part for part, _ in found] == [TEXTS[:2], TEXTS[2:3], TEXTS[3:]]
    assert [result for _, result in found] == ["".join(part) for part, _ in found]
    assert tried == [5, 2, 1, 2], "35, 17, 7 and 11 tokens; 24 are known to be too many"
    tried.clear()
    assert [part for part, _ in fitting.run(TEXTS[1:4], tokens, forward)] == [TEXTS[1:3], TEXTS[3:4]]
    assert tried == [2, 1] and fitting.largest_tokens == 17
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory ")]
    assert "a batch of 35 tokens ran out of memory: batches have 17 at most from here on" in said


def test_an_item_alone_another_error_and_a_model_in_shards_are_not_tried_again():
    refused: list[tuple[FittingBatches, Sequence[str], Callable[..., Any], type[Exception]]] = [
        (FittingBatches(), TEXTS[:1], lambda _: run_out(), torch.OutOfMemoryError),
        (FittingBatches(halves=False), TEXTS, lambda _: run_out(), torch.OutOfMemoryError),
        (FittingBatches(), TEXTS, lambda _: 1 / 0, ZeroDivisionError),
        (FittingBatches(), TEXTS, lambda _: torch.zeros(2) @ torch.zeros(3), RuntimeError),
    ]
    for fitting, texts, forward, error in refused:
        with pytest.raises(error):
            list(fitting.run(texts, tokens, forward))
    assert list(FittingBatches().run([], tokens, len)) == [([], 0)], "a rank without items runs one forward"


def evaluated(folder: Path, model: str, layer: str, limit: int, **values: Any) -> tuple[Built, dict, list[int]]:
    """The evaluation of a run before its first step, and the sizes of its forwards."""
    built = build(folder, model_name_or_path=model, save_strategy="no", **values)
    seen = short_of_memory(built.model.get_submodule(layer), limit)
    return built, built.trainer.evaluate(), seen


@pytest.mark.parametrize("exact", [True, False])
def test_an_evaluation_in_training_has_the_figures_of_the_undisturbed_one(tmp_path, exact: bool):
    model = small_opt(tmp_path / "opt", dropout=0.1)
    layer = "model.decoder.layers.0.fc2"
    values = {"chosen_tokens": 1024, "eval_dataset_name": "builtin:greetings", "exact_gradients": exact}
    built, found, sizes = evaluated(tmp_path / "short", model, layer, LIMIT, **values)
    _, whole, whole_sizes = evaluated(tmp_path / "whole", model, layer, 10**9, **values)
    assert max(whole_sizes) > LIMIT < max(sizes) and sum(s for s in sizes if s <= LIMIT) == sum(whole_sizes)
    assert found["eval_supervised_tokens"] == whole["eval_supervised_tokens"]
    assert found["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert built.trainer.plan.schedule.microbatch_tokens == 1024, "the size for training, and its bits, stay"
    before = len([size for size in sizes if size > LIMIT])
    built.trainer.evaluate()
    assert len([size for size in sizes if size > LIMIT]) == before, "a second evaluation knows the size"


def test_so_has_a_classifiers_with_a_prediction_a_document(tmp_path):
    results = []
    for name, limit in (("short", 100), ("whole", 10**9)):
        built = build_classifier(tmp_path / name, save_strategy="no")
        built.trainer.memory.evaluation.halves = True  # as where auto chose the size
        seen = short_of_memory(built.model.get_submodule("bert.encoder.layer.0.output.dense"), limit)
        results.append(built.trainer.evaluate())
        assert max(seen) > 100
    short, whole = results
    assert short.keys() == whole.keys()
    timed = {"eval_seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    for key in whole.keys() - timed:
        assert short[key] == pytest.approx(whole[key], rel=1e-6), key


def test_a_size_that_was_given_is_kept_in_evaluations_too(tmp_path):
    for values in ({"microbatch_tokens": 1024}, {"chosen_tokens": 1024, "eval_microbatch_tokens": 1024}):
        given = {"model_name_or_path": small_opt(tmp_path / "opt"), "eval_dataset_name": "builtin:greetings", **values}
        built = build(tmp_path / str(len(values)), save_strategy="no", **given)
        short_of_memory(built.model.get_submodule("model.decoder.layers.0.fc2"))
        with pytest.raises(torch.OutOfMemoryError):
            built.trainer.evaluate()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Classifier:
    built = build_classifier(tmp_path_factory.mktemp("classifier"), max_steps=1)
    built.trainer.train()
    save(built.start, built.trainer)
    return load_run_classifier(built.run.path, torch.device("cpu"), torch.float32)


def test_the_harness_and_predictions_go_on_in_smaller_batches(classifier, tmp_path):
    documents = build_classifier(tmp_path).trainer.plan.evaluation.documents
    whole = classify(classifier, documents, ALONE, batch_tokens=1024)
    layer = classifier.model.get_submodule("bert.encoder.layer.0.output.dense")
    seen = short_of_memory(layer, limit=int(max(documents.lengths)) + 40)
    found = classify(classifier, documents, ALONE, batch_tokens=1024)
    assert max(seen) > max(documents.lengths) + 40
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)
    short_of_memory(layer, limit=1)
    with pytest.raises(UserError, match="out of memory with one text at a time: a smaller max_seq_length or 16-bit"):
        classify(classifier, documents, ALONE)


def test_answers_and_likelihoods_are_those_of_larger_batches(tmp_path):
    lm = generation_model_named(small_opt(tmp_path / "opt", init_std=0.3))
    prompts = [Prompt(row, f"Number {row}: " + "and so on " * (row % 5)) for row in range(12)]
    references = [Reference(row, prompt.text, "an answer " * (1 + row % 3)) for row, prompt in enumerate(prompts)]
    decodings = [Decoding(max_new_tokens=6), Decoding(max_new_tokens=6, temperature=1.0, seed=3)]
    whole = [complete(lm, prompts, decoding, batch_size=12) for decoding in decodings]
    nats = score_references(lm, references)
    seen = short_of_memory(lm.model.get_submodule("model.decoder.layers.0.fc2"), limit=200)
    for decoding, expected in zip(decodings, whole, strict=True):
        assert complete(lm, prompts, decoding, batch_size=12) == expected
    assert max(seen) > 200
    seen.clear()
    found = score_references(lm, references)
    assert max(seen) > 200 and found.keys() == nats.keys()
    for row, likelihood in nats.items():
        assert found[row].nll == pytest.approx(likelihood.nll, rel=1e-5)
    short_of_memory(lm.model.get_submodule("model.decoder.layers.0.fc2"), limit=0)
    asked = {
        "shorter texts, a smaller max_new_tokens or": lambda: complete(lm, prompts, decodings[0]),
        "shorter texts or 16-bit": lambda: score_references(lm, references),
    }
    for remedy, ask in asked.items():
        with pytest.raises(UserError, match=f"out of memory with one text at a time: {remedy}"):
            ask()
    sharded = FittingBatches(halves=False)
    with pytest.raises(RankError, match="in a batch, of which a smaller --batch_size makes less") as said:
        complete(lm, prompts, decodings[0], fitting=sharded)
    assert said.value.prints, "whichever rank it is"
