"""A Modelfile's template writes of a conversation what the run's chat template writes, read by Go's rules."""

import json
import re
from types import SimpleNamespace

import pytest
from tests.chat_tokenizers import byte_chat_tokenizer
from transformers import GenerationConfig, LlamaConfig

from isotune.checkpoint.formats.ollama import Layout, NotExpressible, modelfile
from isotune.data.sft.chat_format import ChatFormat
from isotune.data.sft.chat_template import ChatTemplate

RULE = {"role": "system", "content": 'Be "kind".\nAnd brief.'}
TURNS = [
    {"role": "user", "content": "Do {{ you }} know\n\nwhat 2 + 2 is? 世界 🙂"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def model(kind="llama"):
    config = LlamaConfig(max_position_embeddings=128)
    config.model_type = kind
    return SimpleNamespace(config=config, generation_config=GenerationConfig(), name_or_path="m")


def rendered_by_go(template: str, messages: list[dict]) -> str:
    """What Go's text/template writes: only what a Modelfile here uses, evaluated word by word."""
    trimmed = re.sub(r"\s*\{\{-", "{{", template)
    assert "-}}" not in trimmed
    actions = re.compile(r'\{\{\s*((?:"(?:[^"\\]|\\.)*"|[^"}])*?)\s*\}\}')
    nodes, at = [], 0
    for found in actions.finditer(trimmed):
        nodes += [("text", trimmed[at : found.start()]), ("action", found[1])]
        at = found.end()
    nodes.append(("text", trimmed[at:]))

    def holds(words: str, number: int, message: dict) -> bool:
        if words.startswith("and "):
            parts = re.findall(r"\(([^()]*)\)", words)
            return all(holds(part, number, message) for part in parts)
        operator, left, right = words.split(" ")
        value = {"$number": number, "$message.Role": message["role"]}[left]
        return (value == json.loads(right)) == (operator == "eq")

    def run(start: int, number: int = -1, message: dict | None = None, *, live: bool = True) -> tuple[str, int]:
        """The text of a block from its first node, and the node behind its end."""
        out, place = "", start
        while place < len(nodes):
            kind, words = nodes[place]
            if kind == "text":
                out += words if live else ""
            elif words == "end":
                return out, place + 1
            elif words.startswith("range"):
                assert words == "range $number, $message := .Messages"
                for turn, each in enumerate(messages):
                    text, behind = run(place + 1, turn, each)
                    out += text
                place = behind
                continue
            elif words.startswith("if "):
                text, place = branches(place, number, message, live)
                out += text
                continue
            elif words.startswith("else if "):
                return out, place
            elif live:
                out += message["content"] if words == "$message.Content" else json.loads(words)
            place += 1
        return out, place

    def branches(place, number, message, live):
        out, taken = "", False
        while True:
            words = nodes[place][1]
            own = live and not taken and holds(words.removeprefix("else ").removeprefix("if "), number, message)
            text, place = run(place + 1, number, message, live=own)
            out, taken = out + (text if own else ""), taken or own
            if nodes[place - 1] == ("action", "end"):
                return out, place

    return run(0)[0]


def template_of(text: str) -> str:
    return re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi", "opens_thinking", "gemma", None])
def test_the_go_template_writes_what_the_chat_template_of_the_run_writes(name):
    tokenizer = byte_chat_tokenizer(name)
    ChatFormat.of("auto", tokenizer).apply(tokenizer)
    if name is None or name in ("llama3", "gemma"):  # bos, which Ollama puts before a prompt itself
        text = modelfile(model(), tokenizer, ".")
        template, bos = template_of(text), "<bos>"
    else:
        layout = Layout.of(ChatTemplate(tokenizer, lambda text: []))
        template, bos = layout.as_go(), ""
    conversations = [TURNS[:1], TURNS]
    conversations += [] if name == "gemma" else [[RULE, *TURNS[:1]], [RULE, *TURNS]]  # which knows no system message
    for messages in conversations:
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert bos + rendered_by_go(template, messages) == wanted


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mistral", "does not write each turn once|into the question behind it"),
        ("chatml", "Ollama puts '<bos>' before"),
    ],
)
def test_a_template_that_cannot_be_laid_out_is_one_sentence(name, says):
    with pytest.raises(NotExpressible, match=says):
        modelfile(model(), byte_chat_tokenizer(name), ".")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = byte_chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{{- bos_token }}{%- for message in messages %}<|{{ message.role }}|>"
        "{{ message.content if loop.last else message.content.split('\\n')[0] }}<|end|>{%- endfor %}"
        "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
    )
    with pytest.raises(NotExpressible, match="trims or rewrites turns"):
        modelfile(model(), tokenizer, ".")


def test_it_ends_and_draws_as_the_run_was_evaluated():
    tokenizer = byte_chat_tokenizer()
    ChatFormat.of("guanaco", tokenizer).apply(tokenizer)
    text = modelfile(model(), tokenizer, "./model.gguf")
    assert text.startswith("FROM ./model.gguf\n")
    lines = [line for line in text.splitlines() if line.startswith("PARAMETER")]
    assert lines == [
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "### Human:"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 128",
    ]
    with pytest.raises(NotExpressible, match="Ollama imports no model of the type 'opt'"):
        modelfile(model("opt"), tokenizer, ".")
    assert modelfile(model("opt"), tokenizer, "./model.gguf").startswith("FROM ./model.gguf\n"), "nothing is imported"
