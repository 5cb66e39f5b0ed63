"""Every form of data in the table of docs/data.md is trained and evaluated on, to the same numbers as every other."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import yaml
from tests.label_sets import pair_encoder
from tests.launching import REPOSITORY, TINY, TINY_CLASSIFIER, Finished, start_together

from isotune.config import Recipe
from isotune.models.opening import load_tokenizer

# ---- conversations: each form holds the same exchanges ----

EXCHANGES = [(f"What is {n} and {n + 1}?", f"It is {2 * n + 1}.") for n in range(12)]


def messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = {
    "text in Guanaco's form": lambda q, a: {"text": f"### Human: {q}\n### Assistant: {a}"},
    "messages": lambda q, a: {"messages": messages(q, a)},
    "conversations (ShareGPT)": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "prompt, completion": lambda q, a: {"prompt": q, "completion": a},
    "instruction, input, output (Alpaca)": lambda q, a: {"instruction": q, "input": "", "output": a},
    "question, answer": lambda q, a: {"question": q, "answer": a},
    "columns that are named": lambda q, a: {"frage": q, "antwort": a},
    "a CSV of questions and answers": lambda q, a: {"question": q, "answer": a},
    "a TSV of questions and answers": lambda q, a: {"question": q, "answer": a},
    "messages in one JSON array": lambda q, a: {"messages": messages(q, a)},
    "messages in an Arrow file": lambda q, a: {"messages": messages(q, a)},
    "messages in a file of gzip": lambda q, a: {"messages": messages(q, a)},
    "messages in a file of zstd": lambda q, a: {"messages": messages(q, a)},
    "a mixture of two of them": lambda q, a: {"messages": messages(q, a)},
}
NAMED = {"dataset_prompt_field": "frage", "dataset_completion_field": "antwort"}
ENDS = {"CSV": ".csv", "TSV": ".tsv", "JSON": ".json", "Arrow": ".arrow", "gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}
TOKENISED = "input_ids, labels (tokenised already)"


def conversation_recipes(folder: Path) -> dict[str, dict]:
    recipes: dict[str, dict] = {}
    for number, (form, row_of) in enumerate(CONVERSATIONS.items()):
        rows = [row_of(*exchange) for exchange in EXCHANGES]
        suffix = next((end for word, end in ENDS.items() if word in form), ".jsonl")
        file = write(folder / f"sft{number}", rows, suffix)
        own = {**TINY, "dataset_name": file, "eval_dataset_name": file, "max_steps": 2, "packing": False}
        own |= NAMED if "named" in form else {}
        if "mixture" in form:
            other = write(folder / "alpaca", [{"instruction": q, "output": a} for q, a in EXCHANGES[6:]], ".jsonl")
            first = write(folder / "first", rows[:6], ".jsonl")
            own |= {"dataset_mixture": [first, other], "eval_dataset_name": file}
            del own["dataset_name"]
        recipes[f"sft{number}"] = own | {"global_batch_size": 12, "eval_strategy": "epoch", "num_train_epochs": 2}
        del recipes[f"sft{number}"]["max_steps"]
    return recipes


# ---- labelled texts: each form holds the same texts and classes ----

TEXTS = [(f"{('a calm day', 'a wild storm')[n % 2]} number {n}", n % 2) for n in range(12)]
NAMES = ("calm", "storm")
TURNED = datasets.ClassLabel(names=["storm", "calm"])
LABELLED = {
    "whole numbers": lambda t, k: {"text": t, "label": k},
    "words": lambda t, k: {"text": t, "label": NAMES[k]},
    "true and false": lambda t, k: {"text": t, "label": bool(k)},
    "numbers as floats and texts": lambda t, k: {"text": t, "label": (f"{k}.0", str(k))[k]},
    "a ClassLabel of datasets": lambda t, k: {"text": t, "label": k},
    "columns that are found": lambda t, k: {"remark": t, "weather": NAMES[k]},
    "a CSV without a line of names": lambda t, k: {"label": k, "text": t},
    "a clone with a card": lambda t, k: {"text": t, "label": k},
    "mixed sources of words and numbers with names": lambda t, k: {"text": t, "label": NAMES[k]},
}


def labelled_recipes(folder: Path) -> dict[str, dict]:
    recipes: dict[str, dict] = {}
    for number, (form, row_of) in enumerate(LABELLED.items()):
        rows = [row_of(*each) for each in TEXTS]
        file = write(folder / f"cls{number}", rows, ".csv" if "CSV" in form else ".jsonl", header="without" not in form)
        own = {**TINY_CLASSIFIER, "max_steps": -1, "num_train_epochs": 2, "global_batch_size": 12}
        own |= {"dataset_columns": ["label", "text"]} if "without" in form else {}
        features = datasets.Features({"text": datasets.Value("string"), "label": TURNED})
        if "ClassLabel" in form or "mixed" in form:
            turned = [{"text": text, "label": 1 - label} for text, label in TEXTS]
            made = datasets.Dataset.from_list(turned, features=features)
            saved = str(folder / f"saved{number}.parquet")
            made.select(range(6, 12)).to_parquet(saved)
            made.to_parquet(str(folder / f"cls{number}.parquet"))
            first = write(folder / f"words{number}", rows[:6], ".jsonl")
            file = str(folder / f"cls{number}.parquet") if "ClassLabel" in form else file
            mixed = {"dataset_mixture": [first, saved], "eval_dataset_name": file}
            own |= mixed if "mixed" in form else {"label_names": list(NAMES)}
        if "card" in form:
            clone = folder / "clone"
            clone.mkdir()
            Path(file).rename(clone / "rows.jsonl")
            splits = [{"split": split, "path": "rows.jsonl"} for split in ("train", "test")]
            card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": splits}]})
            (clone / "README.md").write_text(f"---\n{card}---\n")
            file = str(clone)
        own |= {} if "dataset_mixture" in own else {"dataset_name": file, "eval_dataset_name": file}
        own = {key: value for key, value in own.items() if not (key == "dataset_name" and "dataset_mixture" in own)}
        recipes[f"cls{number}"] = own
    return recipes


# ---- other tasks, with content of their own: the recipe and the rows of each ----

EVERYTHING = {"train_on": "everything", "packing": False}
TOOL = {"type": "function", "function": {"name": "look_outside"}}
FURTHER = {
    "plain texts": (EVERYTHING, lambda t, k: {"text": t}),
    "messages with the columns system and tools": (
        {"packing": False},
        lambda t, k: {"messages": messages(t, NAMES[k]), "system": "Say how it is.", "tools": [TOOL]},
    ),
    "pairs of texts": ({}, lambda t, k: {"sentence1": t, "sentence2": "it is calm", "label": k}),
    "lists of labels": ({}, lambda t, k: {"text": t, "label": ["day", NAMES[k]]}),
    "a column of 0 and 1 for each label": (
        {"task_type": "multi_label", "label_names": ["calm", "day", "storm"]},
        lambda t, k: {"text": t, "calm": 1 - k, "day": 1, "storm": k},
    ),
    "numbers that are not whole": ({}, lambda t, k: {"text": t, "label": k + len(t) / 7}),
}
INSTRUCTIONS = tuple(FURTHER)[:2]
SAME = ("lists of labels", "a column of 0 and 1 for each label")  # the same texts and labels


def further_recipes(folder: Path) -> dict[str, dict]:
    recipes: dict[str, dict] = {}
    for number, (form, (values, row_of)) in enumerate(FURTHER.items()):
        file = write(folder / f"further{number}", [row_of(*each) for each in TEXTS], ".jsonl")
        own = {**(TINY if form in INSTRUCTIONS else TINY_CLASSIFIER), **values, "dataset_name": file}
        own |= {"eval_dataset_name": file, "max_steps": -1, "num_train_epochs": 2, "global_batch_size": 12}
        if "pairs" in form:
            own |= {"model_name_or_path": pair_encoder(folder / "bert", "bert")}
        recipes[f"further{number}"] = own
    return recipes


def write(place: Path, rows: list[dict], suffix: str, *, header: bool = True) -> str:
    file = place.with_name(f"{place.name}{suffix}")
    if suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(file, table.schema) as whole:
            whole.write_table(table)
        return str(file)
    out = io.StringIO(newline="")
    if ".json" in suffix:
        out.write(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = csv.DictWriter(out, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
        if header:
            lines.writeheader()
        lines.writerows(rows)
    kind = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    content = out.getvalue().encode()
    file.write_bytes(pa.compress(content, codec=kind, asbytes=True) if kind else content)
    return str(file)


IN_SHORT = ("text in Guanaco's form", "a CSV of questions and answers", "a mixture of two of them")
IN_SHORT += ("whole numbers", "words", "a ClassLabel of datasets", "a CSV without a line of names")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Finished]:
    """The run of a form: those of a task, in short or not, in one process, one after the other."""
    made: dict[str, Finished] = {}

    def of(form: str) -> Finished:
        if form not in made:
            forms, script = (
                (CONVERSATIONS, "train/sft_opt.py") if form in CONVERSATIONS else (LABELLED, "train/yelp.py")
            )
            folder = tmp_path_factory.mktemp("forms")
            recipes = (conversation_recipes if forms is CONVERSATIONS else labelled_recipes)(folder)
            named = dict(zip(recipes, forms, strict=True))
            together = {n: recipe for n, recipe in recipes.items() if (named[n] in IN_SHORT) == (form in IN_SHORT)}
            done = start_together(folder, together, script=script)
            made.update((named[name], run) for name, run in done.items())
        return made[form]

    return of


@pytest.fixture(scope="module")
def further(tmp_path_factory) -> dict[str, Finished]:
    """The same of the other tasks."""
    folder = tmp_path_factory.mktemp("further")
    recipes = further_recipes(folder)
    texts = {name: recipes.pop(name) for name in ("further0", "further1")}
    found = start_together(folder, texts) | start_together(folder, recipes, script="train/yelp.py")
    return {form: found[f"further{n}"] for n, form in enumerate(FURTHER)}


def table() -> dict[str, tuple[str, str]]:
    """The table of docs/data.md: task and what is printed, by form."""
    page = (REPOSITORY / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (instruction tuning|classification) \| (.+?) \|$", page, re.M)
    return {form.replace("`", ""): (task, printed.strip("`")) for form, task, printed in rows}


def test_the_table_of_the_docs_names_the_forms_that_are_tested_here():
    task_of = dict.fromkeys(CONVERSATIONS, "instruction tuning") | dict.fromkeys(LABELLED, "classification")
    task_of |= dict.fromkeys(FURTHER, "classification")
    task_of |= dict.fromkeys((*INSTRUCTIONS, TOKENISED), "instruction tuning")
    assert {form: task for form, (task, _) in table().items()} == task_of


@pytest.mark.parametrize(
    "form",
    [form if form in IN_SHORT else pytest.param(form, marks=pytest.mark.slow) for form in (*CONVERSATIONS, *LABELLED)],
)
def test_every_form_trains_and_evaluates_to_the_same_numbers(trained, form):
    run, first = trained(form), trained(next(iter(CONVERSATIONS if form in CONVERSATIONS else LABELLED)))
    assert len(run.steps) == 2 and len(run.evaluations) == 2
    for lines, others in ((run.steps, first.steps), (run.evaluations, first.evaluations)):
        for line, other in zip(lines, others, strict=True):
            key = "loss" if "loss" in line else "eval_loss"
            assert math.isfinite(line[key]) and line[key] == pytest.approx(other[key], rel=1e-5), form
    assert table()[form][1] in run.stdout
    names = json.loads((run.run / "model" / "config.json").read_text()).get("id2label", {})
    if form in LABELLED and ("words" in form or "ClassLabel" in form or "found" in form):
        assert names == {"0": "calm", "1": "storm"}


@pytest.mark.parametrize("form", FURTHER)
def test_every_further_form_trains_and_evaluates(further, form):
    run = further[form]
    assert len(run.steps) == 2 and len(run.evaluations) == 2 and table()[form][1] in run.stdout
    other = further[SAME[0]] if form == SAME[1] else run
    for lines, others, key in ((run.steps, other.steps, "loss"), (run.evaluations, other.evaluations, "eval_loss")):
        for line, own in zip(lines, others, strict=True):
            assert math.isfinite(line[key])
            assert form not in SAME or line[key] == pytest.approx(own[key], rel=1e-5)


def test_rows_that_are_tokenised_already_train_as_the_texts_that_they_are(tmp_path, trained):
    recipe = next(iter(conversation_recipes(tmp_path).values()))
    tokenizer = load_tokenizer(Recipe.from_values(**recipe, output_dir="x"))
    rows = []
    for question, answer in EXCHANGES:
        asked = tokenizer(f"### Human: {question}\n### Assistant:")["input_ids"]
        answered = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": asked + answered, "labels": [-100] * len(asked) + answered})
    file = write(tmp_path / "tokens", rows, ".jsonl")
    found = start_together(tmp_path, {"tokens": recipe | {"dataset_name": file, "eval_dataset_name": file}})["tokens"]
    expected = trained(next(iter(CONVERSATIONS)))
    assert table()[TOKENISED][1] in found.stdout
    assert [line["loss"] for line in found.steps] == pytest.approx([line["loss"] for line in expected.steps], rel=1e-5)
