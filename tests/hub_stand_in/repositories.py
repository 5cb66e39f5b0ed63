"""Repositories in the layout of the real ones, under the real names, with tiny weights and a few rows made by code.

Layouts as public: file names, formats, keys and dtypes of weights, columns, class names and configurations. Beside what
is read lie files of other frameworks, which nobody should fetch.
"""

import io
import json
import random
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
)

from isotune.data.sources.source import find_corpus
from tests.hub_stand_in.server import HubStandIn, Repository

OPT, BERT_CASED, BERT_UNCASED, DISTILBERT = (
    "facebook/opt-350m",
    "google-bert/bert-base-cased",
    "google-bert/bert-base-uncased",
    "distilbert/distilbert-base-uncased",
)
GUANACO, YELP, IMDB, PROMPTS = (
    "timdettmers/openassistant-guanaco",
    "Yelp/yelp_review_full",
    "stanfordnlp/imdb",
    "fka/awesome-chatgpt-prompts",
)
STARS = ("1 star", "2 star", "3 stars", "4 stars", "5 stars")
POSITIONS = 1024
OTHER_FRAMEWORKS = {"tf_model.h5": b"TensorFlow", "flax_model.msgpack": b"Flax", "rust_model.ot": b"Rust"}


def stock(hub: HubStandIn) -> None:
    """Every repository that a default recipe names, with the names that they once had."""
    opt(hub)
    bert(hub, BERT_CASED, cased=True)
    bert(hub, BERT_UNCASED)
    distilbert(hub)
    guanaco(hub)
    yelp(hub)
    imdb(hub)
    prompts(hub)


# ---- models ----


def opt(hub: HubStandIn) -> Repository:
    """OPT-350M: weights in fp16 in a pickle, without the prefix of the language model; no tokenizer.json.

    A pull request converts them to safetensors and loses the embedding.
    """
    model = tiny_opt()
    weights = {name.removeprefix("model."): tensor.half() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied
    files = {
        "README.md": _card("license: other\n"),
        "config.json": _config(model, dtype="float16", prefix="</s>", activation_dropout=0.0),
        "generation_config.json": _json({"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2,
                                         "pad_token_id": 1, "transformers_version": "4.27.0.dev0"}),
        "pytorch_model.bin": pickled(weights),
        **opt_tokenizer(),
        **OTHER_FRAMEWORKS,
    }  # fmt: skip
    repository = hub.add(Repository("model", OPT))
    repository.commit(files)
    converted = {name: tensor for name, tensor in weights.items() if "embed_tokens" not in name}
    repository.commit({**files, "model.safetensors": save(converted, {"format": "pt"})}, "refs/pr/1")
    repository.pull_requests.append(
        {"num": 1, "title": "Adding `safetensors` variant of this model", "status": "open", "isPullRequest": True,
         "author": {"name": "SFconvertbot"}, "createdAt": "2023-05-01T00:00:00.000Z",
         "repo": {"name": OPT, "type": "model"}}
    )  # fmt: skip
    return repository


@cache
def tiny_opt() -> OPTForCausalLM:
    """OPT-350M's build, small: embeddings narrower than the layers, and normalised after each of their halves."""
    torch.manual_seed(350)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=512, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, do_layer_norm_before=False, max_position_embeddings=POSITIONS, dropout=0.1,
            pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def pickled(weights: dict[str, Any]) -> bytes:
    """What `torch.save` writes."""
    out = io.BytesIO()
    torch.save(weights, out)
    return out.getvalue()


@cache
def opt_tokenizer() -> dict[str, bytes]:
    """GPT-2's kind of tokenizer with OPT's special tokens, in two files; `</s>` begins every text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        _texts(), vocab_size=512, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    content = json.loads(tokenizer.to_str())["model"]
    return opt_tokenizer_files(content["vocab"], content["merges"])


def opt_tokenizer_files(vocabulary: dict[str, int], merges: Iterable[Any]) -> dict[str, bytes]:
    """The files of OPT's tokenizer: vocab.json, merges.txt and what they do not say."""

    def special(content: str) -> dict[str, Any]:
        return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}

    end, pad = special("</s>"), special("<pad>")
    roles = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": pad}
    lines = "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    return {
        "vocab.json": _json(vocabulary),
        "merges.txt": f"#version: 0.2\n{lines}\n".encode(),
        "special_tokens_map.json": _json(roles),
        "tokenizer_config.json": _json(
            {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, "special_tokens_map_file": None,
             "name_or_path": "patrickvonplaten/opt-30b", "tokenizer_class": "GPT2Tokenizer",
             **{role: {**token, "__type": "AddedToken"} for role, token in roles.items()}}
        ),
    }  # fmt: skip


def bert(hub: HubStandIn, name: str, *, cased: bool = False) -> Repository:
    """BERT with both heads that it was pretrained with, and the old names of a layer norm's weights."""
    files = bert_tokenizer(cased)
    words = len(files["vocab.txt"].splitlines())
    torch.manual_seed(len(name))
    geometry = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForPreTraining(BertConfig(vocab_size=words, **geometry))
    old_names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return _encoder(hub, name, model, files, lambda key: _replaced(key, old_names), "BertForMaskedLM")


def distilbert(hub: HubStandIn) -> Repository:
    """DistilBERT with the head it was pretrained with."""
    files = bert_tokenizer(False)
    words = len(files["vocab.txt"].splitlines())
    torch.manual_seed(6)
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=words, dim=32, hidden_dim=64, n_layers=2, n_heads=4))
    return _encoder(hub, DISTILBERT, model, files)


def _encoder(
    hub: HubStandIn,
    name: str,
    model: Any,
    tokenizer: dict[str, bytes],
    rename: Callable[[str], str] = str,
    says: str = "",
) -> Repository:
    weights = {rename(key): tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    repository = hub.add(Repository("model", name), name.split("/")[1])
    repository.commit(
        {
            "README.md": _card("language: en\nlicense: apache-2.0\n"),
            "config.json": _config(model, architectures=[says or type(model).__name__]),
            "model.safetensors": save(weights, {"format": "pt"}),
            "pytorch_model.bin": pickled(weights),
            **tokenizer,
            **OTHER_FRAMEWORKS,
        }
    )
    return repository


@cache
def bert_tokenizer(cased: bool) -> dict[str, bytes]:
    """A WordPiece tokenizer, as a list of words and whole."""
    tokenizer = BertWordPieceTokenizer(lowercase=not cased)
    tokenizer.train_from_iterator(_texts(), vocab_size=400, show_progress=False)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "vocab.txt": "".join(f"{word}\n" for word, _ in words).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": _json({"do_lower_case": not cased, "model_max_length": 512}),
    }


def _config(model: Any, **more: Any) -> bytes:
    content = {**model.config.to_dict(), "architectures": [type(model).__name__], **more}
    return _json({key: value for key, value in content.items() if value is not None})


# ---- data sets ----


def guanaco(hub: HubStandIn, rows: int = 24) -> Repository:
    """Conversations in two files whose names say train and eval."""
    made = _rows("capitals", rows + 8)
    files = {
        "README.md": b"This dataset is a subset of the Open Assistant dataset.\n",
        "openassistant_best_replies_train.jsonl": _jsonl({"text": row["text"]} for row in made[:rows]),
        "openassistant_best_replies_eval.jsonl": _jsonl({"text": row["text"]} for row in made[rows:]),
    }
    repository = hub.add(Repository("dataset", GUANACO))
    repository.commit(files)
    return repository


def yelp(hub: HubStandIn) -> Repository:
    """Reviews with one to five stars, in a folder of the configuration's name; class names stand in the card."""
    made = _rows("opinions", 60)
    reviews = [{"label": number % 5, "text": f"{row['text']}\\n{'Great! ' * (number % 5)}"}
               for number, row in enumerate(made)]  # fmt: skip
    return _parquet_repository(
        hub, YELP, "yelp_review_full", STARS, {"train": reviews[:40], "test": reviews[40:]}, ("label", "text")
    )


def imdb(hub: HubStandIn) -> Repository:
    """Reviews for or against a film, and a third split whose labels are -1."""
    made = _rows("opinions", 90)
    reviews = [{"text": f"{row['text']}<br /><br />{('Bad', 'good')[number % 2]}.", "label": number % 2}
               for number, row in enumerate(made)]  # fmt: skip
    unlabelled = [{**row, "label": -1} for row in reviews[60:]]
    return _parquet_repository(
        hub,
        IMDB,
        "plain_text",
        ("neg", "pos"),
        {"train": reviews[:40], "test": reviews[40:60], "unsupervised": unlabelled},
        ("text", "label"),
    )


def _parquet_repository(
    hub: HubStandIn,
    name: str,
    config: str,
    classes: tuple[str, ...],
    splits: dict[str, list[dict[str, Any]]],
    columns: tuple[str, str],
) -> Repository:
    types = {"label": pa.int64(), "text": pa.string()}
    schema = pa.schema([(column, types[column]) for column in columns])
    files = {}
    for split, rows in splits.items():
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), out)
        files[f"{config}/{split}-00000-of-00001.parquet"] = out.getvalue()
    names = "".join(f"          '{number}': {each}\n" for number, each in enumerate(classes))
    kinds = {"text": "    dtype: string\n", "label": f"    dtype:\n      class_label:\n        names:\n{names}"}
    features = "".join(f"  - name: {column}\n{kinds[column]}" for column in columns)
    sizes = "".join(f"  - name: {split}\n    num_bytes: 1\n    num_examples: {len(rows)}\n"
                    for split, rows in splits.items())  # fmt: skip
    paths = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    files["README.md"] = _card(
        f"dataset_info:\n  config_name: {config}\n  features:\n{features}  splits:\n{sizes}"
        f"  download_size: 1\n  dataset_size: 1\n"
        f"configs:\n- config_name: {config}\n  data_files:\n{paths}  default: true\n"
    )
    repository = hub.add(Repository("dataset", name), name.split("/")[1])
    repository.commit(files)
    return repository


def prompts(hub: HubStandIn) -> Repository:
    """Prompts in one CSV file, with the columns that were added since 2023."""
    kinds = ("Write a poem about {}.", "What is a {}?", "The {} opens at nine.", "I want you to act as a {}.")
    nouns = ("museum", 'poet, or "bard"', "chess player", "train station", "NA", "2024", "null", "true", "kitchen")
    rows = [f'"{noun.title()} {number}","{kind.format(noun)}",{flag},TEXT,someone{number}'
            for number, noun in enumerate(word.replace('"', '""') for word in nouns)
            for kind, flag in zip(kinds, ("TRUE", "FALSE") * 2, strict=True)]  # fmt: skip
    repository = hub.add(Repository("dataset", PROMPTS))
    repository.commit(
        {
            "README.md": _card("license: cc0-1.0\ntags:\n- ChatGPT\n"),
            "prompts.csv": ("act,prompt,for_devs,type,contributor\n" + "\n".join(rows) + "\n").encode(),
        }
    )
    return repository


# ---- bytes ----


def _rows(corpus: str, count: int) -> list[dict[str, Any]]:
    return list(find_corpus(f"builtin:{corpus}").generate(random.Random(0), count))


@cache
def _texts() -> tuple[str, ...]:
    return tuple(row["text"] for corpus in ("capitals", "opinions") for row in _rows(corpus, 90))


def _replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode()


def _jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _card(metadata: str) -> bytes:
    return f"---\n{metadata}---\n\nA card.\n".encode()
