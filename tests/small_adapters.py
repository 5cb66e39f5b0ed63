"""LoRA, its export and greedy answers of the tables' small random models, held to the stock models of transformers.

What a refusal says stands in the tables; any other error ends their measurement.
"""

import copy
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from isotune.checkpoint.export import export_run
from isotune.checkpoint.final_model import save_and_verify
from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.models import GenerationModel
from isotune.io.errors import RunFault, UserError
from isotune.models.adapters.lora import add_adapters
from isotune.models.cpu.layers import enable_speedups

EOS, PAD = 2, 1
NOT_MEASURED = "–"  # in the tables
PROMPTS = (
    "once upon a time there was",
    "a",
    "the cat sat on the mat and looked at the dog of the house",
    "lily",
    "what",
)
NEW_TOKENS = 8

Gradients = dict[str, torch.Tensor]
LogitsOf = Callable[[Any, torch.Tensor], torch.Tensor]  # of a stock model and a document
LossOf = Callable[[torch.Tensor, int], torch.Tensor]  # of logits and the document's number


def letters_tokenizer() -> Any:
    """A tokenizer of 32 tokens: the smallest vocabularies of the tables have no more."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase, " ", "."]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def recipe_in(folder: Path, *, classifies: bool = False, **adapter: Any) -> RunRecipe:
    """The recipe of a run in `folder` that trains LoRA on the base beside it; layers by default."""
    kind = ClassificationRecipe if classifies else Recipe
    own = {"tune": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "max_seq_length": 64}
    own |= adapter
    return kind.from_values(
        model_name_or_path=str(folder / "base"), dataset_name="builtin:capitals", output_dir=str(folder / "run"), **own
    )


def adapted(model: Any, recipe: RunRecipe) -> Any:
    """The model with adapters as a run makes them, and B matrices that are drawn: the same for each model of a type."""
    found: Any = add_adapters(model, recipe)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in found.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    return found.train(model.training)


@dataclass(frozen=True)
class Alone:
    """What a stock model makes of each document alone."""

    logits: list[torch.Tensor]
    loss: float  # summed over the documents
    gradients: Gradients  # of that sum


def each_alone(model: Any, documents: Sequence[torch.Tensor], logits_of: LogitsOf, loss_of: LossOf) -> Alone:
    """Run each document through a copy of its own, for some models remember the documents before."""
    logits, loss, found = list[torch.Tensor](), 0.0, Gradients()
    for number, document in enumerate(documents):
        fresh = copy.deepcopy(model)
        own = logits_of(fresh, document)
        part = loss_of(own, number)
        part.backward()
        logits.append(own.detach())
        loss += float(part.detach())
        for name, gradient in gradients(fresh).items():
            found[name] = found.get(name, torch.zeros(())) + gradient
    return Alone(logits, loss, found)


def gradients(model: nn.Module) -> Gradients:
    """Of every parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(found: Gradients, expected: Gradients) -> float:
    """That of the gradients of one parameter relative to its norm, or to a hundredth of all where that is more."""
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    zero = torch.zeros(())
    return max(float((found.get(n, zero) - g).norm() / max(g.norm(), 1e-2 * whole)) for n, g in expected.items())


@dataclass(frozen=True)
class Adapted:
    """LoRA on a type of model; None where it is refused, and `why`."""

    gradient: float | None  # of the adapters: the largest difference of one parameter's, relative to its norm
    export: float | None  # of the logits of the merged model, relative to the largest
    why: str = ""

    @property
    def cells(self) -> tuple[str, str]:
        """Its two cells of a table."""
        if self.gradient is None:
            return "refused", ""
        return power_of_ten(self.gradient), "refused" if self.export is None else power_of_ten(self.export)

    def check(self, lora: str, export: str) -> None:
        """Hold it to its two cells of the page's table, and to the stock model."""
        assert "\n" not in self.why
        assert self.gradient is None or self.gradient <= 1e-4
        assert self.export is None or self.export <= 1e-5
        for cell, own in zip((lora, export), self.cells, strict=True):
            assert cell == NOT_MEASURED or (cell in ("", "refused")) == (own in ("", "refused"))


def power_of_ten(figure: float) -> str:
    """A figure that other machines reach too."""
    return f"{figure:.0e}" if figure else "0"


@dataclass(frozen=True)
class LoraCheck:
    """LoRA on a model that was installed for rows, beside the stock model with the same adapters."""

    stock: Any  # a copy of the model before it was installed
    recipe: RunRecipe
    documents: Sequence[torch.Tensor]
    logits_of: LogitsOf
    loss_of: LossOf

    def of(self, installed: Any, loss_of_row: Callable[[Any], torch.Tensor]) -> Adapted:
        """Give both the adapters, run the row, merge and reopen; the stock model is the base that the recipe names."""
        base = Path(self.recipe.model_name_or_path)
        self.stock.save_pretrained(base)
        letters_tokenizer().save_pretrained(base)
        try:
            stock, model = adapted(copy.deepcopy(self.stock), self.recipe), adapted(installed, self.recipe)
        except (UserError, RunFault) as refusal:
            return Adapted(None, None, f"LoRA: {refusal}")
        alone = each_alone(stock, self.documents, self.logits_of, self.loss_of)
        enable_speedups(model)
        model.zero_grad()
        loss_of_row(model).backward()
        gradient = largest_difference(gradients(model), alone.gradients)
        try:
            merged = exported(model, self.recipe)
        except (UserError, RunFault) as refusal:
            return Adapted(gradient, None, f"export: {refusal}".replace(f"{base.parent}/", ""))
        with torch.no_grad():
            logits = [self.logits_of(copy.deepcopy(merged), document) for document in self.documents]
        return Adapted(gradient, difference_of_logits(logits, alone.logits))


def exported(model: Any, recipe: RunRecipe) -> Any:
    """What `isotune export --merge` makes of a run that ended with these adapters, by stock transformers.

    The base is in the folder that the recipe names. UserError or RunFault where the run cannot be saved or exported.
    """
    run = Path(recipe.output_dir)
    model.peft_config["default"].base_model_name_or_path = recipe.model_name_or_path
    save_and_verify(model, letters_tokenizer(), run / "model")
    recipe.write(run / "recipe.yaml")
    folder = export_run(run, merge=True).folder
    auto: Any = AutoModelForSequenceClassification if isinstance(recipe, ClassificationRecipe) else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto").eval()


def difference_of_logits(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest, relative to the largest logit."""
    largest = max(float(logits.abs().max()) for logits in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest


@torch.no_grad()
def answered_alike(model: Any) -> int:
    """How many of PROMPTS get in one batch the greedy answer that stock `generate` gives to each alone."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # else the model says one thing to everything
            parameter.data += torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    tokenizer = letters_tokenizer()
    lm = GenerationModel(copy.deepcopy(model), tokenizer)
    prompts = [Prompt(number, text) for number, text in enumerate(PROMPTS)]
    found = complete(lm, prompts, Decoding(NEW_TOKENS), turns=False)
    alike = 0
    for prompt in prompts:
        stock = copy.deepcopy(model)  # some remember the texts before
        stock.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
        ids = torch.tensor([tokenizer(prompt.text)["input_ids"]])
        answer = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        tokens = answer[0, ids.shape[1] :].tolist()
        expected = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        alike += list(found[prompt.row].tokens) == expected
    return alike
