"""A finished run answers as it was trained to: in a program, from a command line and from a pipe."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tests.launching import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from isotune.data.sft.conversations import first_turn, render_prompt
from isotune.evaluation.generation.chat import answer, fit_history, print_sample_answer
from isotune.evaluation.generation.completion import Decoding
from isotune.evaluation.models import generation_model_named, generation_model_of_run
from isotune.evaluation.samples import read_samples
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

POSITIONS = 96
TAUGHT = "### Human: What is 2 + 2?\n### Assistant: It is 4.\n### Human: Thanks\n### Assistant: You are welcome 🙂."
RETAUGHT = "### Human: What is 2 + 2?\n### Assistant: You are 4."  # in words that the frozen head has learnt


def teach(model, tokenizer, text, learning_rate, wanted_loss=0.02):
    """Overfit `text` and its eos by transformers' own loss."""
    tokens = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(200):
        loss = model(input_ids=tokens, labels=tokens).loss
        if loss.item() < wanted_loss:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"the fixture did not learn: loss {loss.item():.3f}")


@pytest.fixture(scope="module")
def tokenizer():
    return builtin_tokenizer("builtin:opt-tiny")


@pytest.fixture(scope="module")
def full_run(tokenizer, tmp_path_factory) -> Path:
    """A run folder whose whole model knows one conversation by heart."""
    run = tmp_path_factory.mktemp("runs") / "full"
    torch.manual_seed(0)
    geometry = {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_hidden_layers": 2}
    config = OPTConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=POSITIONS, dropout=0.0, **geometry
    )
    model = OPTForCausalLM(config)
    teach(model, tokenizer, TAUGHT, learning_rate=1e-2)
    write_run(run, {"tune": "full", "model_name_or_path": "facebook/opt-350m", "model_init": "random"})
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    return run


@pytest.fixture(scope="module")
def lora_run(full_run, tokenizer) -> Path:
    """A run folder whose adapter changes the first answer of the model of `full_run`."""
    run = full_run.parent / "lora"
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(full_run / "model")
    targets = ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]
    model = get_peft_model(base, LoraConfig(r=32, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"))
    teach(model, tokenizer, RETAUGHT, learning_rate=1e-2)
    write_run(run, {"tune": "lora", "model_name_or_path": str(full_run / "model"), "model_init": "pretrained"})
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    return run


def write_run(run, settings):
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def speaker(full_run):
    return generation_model_of_run(full_run)


def greedy_by_hand(model, tokens, count):
    """Argmax after argmax, without a cache and without generate()."""
    for _ in range(count):
        with torch.no_grad():
            tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens


def generate(*arguments, text="", fresh=False):
    command = [sys.executable, "eval/generate.py", *map(str, arguments)]
    return run_command(command, text=text, fresh=fresh, timeout_seconds=120)


def test_the_greedy_answer_is_the_argmax_of_the_model_after_the_prompt_of_training(speaker, full_run, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(full_run / "model").eval()
    prompt = tokenizer("### Human: Tell me more\n### Assistant:").input_ids
    assert prompt[0] == tokenizer.bos_token_id  # OPT was trained with its bos, once
    assert tokenizer.bos_token_id not in prompt[1:]
    by_hand = greedy_by_hand(model, prompt, 6)[len(prompt) :]

    text = answer(speaker, "Tell me more", Decoding(max_new_tokens=6))

    assert text == first_turn(tokenizer.decode(by_hand, skip_special_tokens=True))
    assert text


def test_an_answer_ends_where_the_model_begins_another_turn(speaker):
    assert answer(speaker, "What is 2 + 2?") == "It is 4."


def test_generation_stops_at_the_header_and_does_not_run_to_the_end(speaker, tokenizer):
    lengths = []
    original = speaker.model.generate
    try:
        speaker.model.generate = lambda **given: lengths.append(original(**given)) or lengths[-1]
        answer(speaker, "What is 2 + 2?", Decoding(max_new_tokens=60))
    finally:
        del speaker.model.generate
    prompt = len(tokenizer(render_prompt("What is 2 + 2?")).input_ids)
    assert lengths[0].shape[1] - prompt <= len(tokenizer(" It is 4.\n### Human:").input_ids)


def test_an_answer_ends_at_eos_and_sees_the_turns_before_it(speaker):
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Thanks"},
    ]
    assert answer(speaker, messages) == "You are welcome 🙂."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Yes.\n### Human: And?", "Yes."),
        (" Yes. ###Human: And?", "Yes."),
        (" Yes.\n### Assistant: Yes.", "Yes."),
        (" A title:\n#### Human: it is no header", "A title:\n#### Human: it is no header"),
        ("### Human: nothing else", ""),
        (" Yes.\n", "Yes."),
    ],
)
def test_an_answer_is_cut_where_training_would_read_the_next_turn(text, kept):
    assert first_turn(text) == kept


def test_an_adapter_answers_and_not_its_base(lora_run):
    adapted = generation_model_of_run(lora_run)
    assert answer(adapted, "What is 2 + 2?") == "You are 4."
    layers = [module for module in adapted.model.modules() if "lora" in type(module).__module__]
    assert layers  # unmerged: the adapter itself is what is heard


def test_the_base_that_a_run_wrote_is_found_after_the_run_has_moved(lora_run, full_run, tmp_path):
    moved = tmp_path / "moved"
    write_run(moved, {"tune": "lora", "model_name_or_path": "facebook/opt-350m", "model_init": "random"})
    base = AutoModelForCausalLM.from_pretrained(full_run / "model")
    base.save_pretrained(moved / "base_model")
    adapter = PeftModel.from_pretrained(base, str(lora_run / "model"))
    adapter.peft_config["default"].base_model_name_or_path = "/gone/base_model"
    adapter.save_pretrained(moved / "model", save_embedding_layers=False)
    AutoTokenizer.from_pretrained(full_run / "model").save_pretrained(moved / "model")
    assert answer(generation_model_of_run(moved), "What is 2 + 2?") == "You are 4."


def test_sampling_depends_on_its_seed_alone(speaker):
    def draw(seed):
        return answer(speaker, "Thanks for", Decoding(max_new_tokens=12, temperature=3.0, seed=seed))

    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = draw(1)
    assert torch.rand(1) == expected_next  # the caller's generator is left alone
    assert draw(1) == first
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_tiny_nucleus_is_greedy(speaker):
    sampled = Decoding(max_new_tokens=8, temperature=2.0, top_p=1e-6, seed=3)
    assert answer(speaker, "Tell me", sampled) == answer(speaker, "Tell me", Decoding(max_new_tokens=8))


def test_history_drops_the_oldest_exchanges_until_the_answer_has_room(speaker, tokenizer):
    messages = []
    for number in range(12):
        messages += [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": f"{number}."}]
    messages.append({"role": "user", "content": "And now?"})

    kept = fit_history(speaker, messages, max_new_tokens=20)

    def tokens(part):
        return len(tokenizer(render_prompt(part)).input_ids)

    assert kept == messages[-len(kept) :]
    assert kept[0]["role"] == "user"
    assert tokens(kept) <= POSITIONS - 20 < tokens(messages[-len(kept) - 2 :])


def test_an_answer_never_runs_past_the_positions_of_the_model(speaker):
    question = "word " * 16
    assert isinstance(answer(speaker, question, Decoding(max_new_tokens=500)), str)
    with pytest.raises(UserError, match=rf"the model {POSITIONS} positions"):
        answer(speaker, "word " * 200)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top_p"),
        ({"top_p": 0.9}, "no effect"),
    ],
)
def test_decoding_that_cannot_be_is_named(values, says):
    with pytest.raises(UserError, match=says):
        Decoding(**values)


def test_an_allowance_longer_than_the_model_does_not_make_it_forget(speaker, tokenizer):
    messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    assert fit_history(speaker, messages, max_new_tokens=100 * POSITIONS) == messages


def test_any_llama_model_answers_too(shared_data):
    speaker = generation_model_named(str(shared_data / "checkpoints" / "stories260K"))
    assert answer(speaker, "Once upon a time", Decoding(max_new_tokens=20))


def test_the_sample_answer_of_a_run_is_printed_with_its_prompt(full_run, capsys):
    print_sample_answer(full_run, "What is 2 + 2?")
    printed = capsys.readouterr()
    assert printed.out == "### Human: What is 2 + 2?\n### Assistant: It is 4.\n"
    assert printed.err == ""
    assert read_samples(Path(full_run)) == [{"input": "What is 2 + 2?", "output": "It is 4."}]


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fork", "fresh"])
def test_the_command_prints_the_answer_and_nothing_else(lora_run, fresh):
    done = generate("--run_dir", lora_run, "--prompt", "What is 2 + 2?", fresh=fresh)
    assert (done.returncode, done.stdout, done.stderr) == (0, "You are 4.\n", "")


def test_a_chat_from_a_pipe_remembers_resets_and_quits(full_run):
    lines = ["What is 2 + 2?", "Thanks", "", "/reset", "/help", "What is 2 + 2?", "/quit", "Thanks"]
    done = generate("--run_dir", full_run, text="\n".join(lines))
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["It is 4.", "You are welcome 🙂.", "It is 4."]
    assert done.stderr.splitlines() == ["/help is no command: there are /reset and /quit"]


def test_a_chat_goes_on_after_a_question_that_is_too_long_and_ends_with_its_input(full_run):
    done = generate("--run_dir", full_run, "--max_new_tokens", 12, text="word " * 200 + "\nWhat is 2 + 2?")
    assert done.returncode == 0
    assert done.stdout == "It is 4.\n"
    assert done.stderr.count("\n") == 1
    assert "shorten it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--run_dir", "/nowhere/run", "--prompt", "Hi"], "/nowhere/run"),
        (["--prompt", "Hi"], "--run_dir"),
        (["--model", "/nowhere/model", "--prompt", "Hi"], "/nowhere/model"),
        (["--run_dir", "RUN", "--temperature", "warm"], "--temperature"),
        (["--run_dir", "RUN", "--prompt", "Hi", "--top_p", "2"], "--top_p"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(full_run, arguments, names):
    done = generate(*[full_run if argument == "RUN" else argument for argument in arguments])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert names in done.stderr


def test_a_truncated_model_is_named_with_its_file(full_run, tmp_path):
    broken = tmp_path / "broken"
    write_run(broken, {"tune": "full"})
    (broken / "model").mkdir()
    for file in (full_run / "model").iterdir():
        content = file.read_bytes()
        (broken / "model" / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    done = generate("--run_dir", broken, "--prompt", "Hi")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(broken / "model" / "model.safetensors") in done.stderr
