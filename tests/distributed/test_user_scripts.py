"""Scripts as people write them, with the one import changed: losses that no launch and no split changes.

Beside each the script as it stands, on one process and the whole batch at once, where stock is right; on as many rows
as an update has, because stock draws others.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.building import small_encoder, small_opt
from tests.chat_tokenizers import byte_chat_tokenizer
from tests.launching import launcher, run_command
from tests.numerics.test_drop_in import SMALL
from transformers import LlamaConfig, LlamaForCausalLM

from isotune.data.sources.source import find_corpus

SCRIPTS = "tests/distributed/user_scripts"
WHOLE, SPLIT = (8, 1), (2, 2)  # rows of a pass and passes: of one process, and of each of two


def run(which: str, script: str, arguments: list[str], output: Path, processes: int = 0) -> list[float]:
    start = launcher("ddp.yaml", processes) if processes else [sys.executable]
    done = run_command([*start, "tests/distributed/changed_import.py", which, f"{SCRIPTS}/{script}", *arguments])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def classify(
    which: str, model: str, folder: Path, name: str, split: tuple[int, int], processes: int = 0, train="train"
):
    rows, accumulation = split
    output = folder / name
    words = ["--model_name_or_path", model, "--train_file", str(folder / f"{train}.csv"), "--do_train", "--do_eval"]
    words += ["--validation_file", str(folder / "test.csv"), "--do_predict", "--output_dir", str(output)]
    words += ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-3", "--use_cpu", "true"]
    words += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    words += ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation)]
    losses = run(which, "classify_pairs.py", words, output, processes)
    evaluated = json.loads((output / "eval_results.json").read_text())
    return losses, evaluated, np.array(json.loads((output / "predictions.json").read_text()))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = list(find_corpus("builtin:opinions").rows("train"))[:61]
    for name, part in (("train", rows[:40]), ("update", rows[:8]), ("test", rows[40:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["sentence1", "sentence2", "label"])
            table.writeheader()
            for row in part:
                first, _, second = row["text"].partition(". ")
                table.writerow({"sentence1": first, "sentence2": second, "label": row["label"]})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_script_of_pairs_has_the_same_losses_metrics_and_predictions(pairs: Path, tmp_path: Path, dropout: float):
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = small_encoder(tmp_path / "model", "bert", type_vocab_size=2, **drops)
    losses, evaluated, predicted = classify("isotune", model, pairs, f"one-{dropout}", WHOLE)
    again = classify("isotune", model, pairs, f"two-{dropout}", SPLIT, processes=2)
    assert len(losses) == 3 and again[0] == pytest.approx(losses, rel=1e-6)
    assert again[1]["eval_accuracy"] == evaluated["eval_accuracy"]
    assert again[1]["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    assert predicted.shape == (21, 3) and np.allclose(again[2], predicted, rtol=0, atol=1e-5)
    if dropout:  # of which stock draws other masks
        return
    ours, theirs = (classify(which, model, pairs, which, WHOLE, train="update") for which in ("isotune", "stock"))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1]["eval_accuracy"] == theirs[1]["eval_accuracy"]
    assert ours[1]["eval_loss"] == pytest.approx(theirs[1]["eval_loss"], rel=1e-5)
    assert np.allclose(ours[2], theirs[2], rtol=0, atol=1e-5)


def chats(file: Path, count: int) -> str:
    rows = [
        [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."},
         {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "You are welcome" + "!" * (n % 7)}]
        for n in range(count)
    ]  # fmt: skip
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return str(file)


@pytest.mark.slow
def test_a_qlora_script_of_chats_has_the_same_losses(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    tokenizer = byte_chat_tokenizer("chatml_generation")
    shape = SMALL | {"hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def losses(which: str, name: str, split: tuple[int, int], rows: int, processes: int = 0) -> list[float]:
        output = tmp_path / name
        given = [str(tmp_path / "model"), chats(tmp_path / f"{rows}.jsonl", rows), str(output)]
        return run(which, "qlora_chat.py", [*given, *map(str, split)], output, processes)

    one = losses("isotune", "one", WHOLE, 24)
    assert losses("isotune", "two", SPLIT, 24, processes=2) == one, "bit for bit: exact gradients by themselves"
    ours, theirs = (losses(which, which, WHOLE, 8)[0] for which in ("isotune", "stock"))
    assert ours == pytest.approx(theirs, rel=1e-5), "before dropout has an effect"


@pytest.mark.slow
def test_a_script_of_packed_instructions_has_the_same_losses(tmp_path: Path):
    model = small_opt(tmp_path / "model", dropout=0.0)
    draw = np.random.default_rng(0)
    make = lambda n: " ".join(draw.choice(["red", "green", "blue", "one"], n))  # noqa: E731
    rows = [{"instruction": make(draw.integers(2, 9)), "output": make(draw.integers(1, 20))} for _ in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def losses(which: str, name: str, split: tuple[int, int], processes: int = 0) -> list[float]:
        output = tmp_path / name
        words = [model, str(tmp_path / "rows.jsonl"), str(output), *map(str, split)]
        return run(which, "instructions.py", words, output, processes)

    one = losses("isotune", "one", WHOLE)
    assert losses("isotune", "two", SPLIT, processes=2) == pytest.approx(one, rel=1e-6)
    assert len(one) == 3 and one[0] > one[-1]
