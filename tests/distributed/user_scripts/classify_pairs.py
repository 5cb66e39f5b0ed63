"""Fine-tune a classifier on pairs of sentences, in the manner of the scripts that come with transformers.

python classify_pairs.py --model_name_or_path MODEL --train_file train.csv --validation_file test.csv --do_train \
    --do_eval --do_predict --output_dir out --per_device_train_batch_size 8
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from transformers import Trainer  # isort: skip


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "A CSV file with sentence1, sentence2 and label."})
    validation_file: str = field(metadata={"help": "Another one, to evaluate and predict on."})
    max_seq_length: int = field(default=64, metadata={"help": "Longer pairs are cut."})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A folder or a name on the Hub."})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("csv", data_files={"train": data_args.train_file, "validation": data_args.validation_file})
    labels = sorted(set(raw["train"]["label"]))
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(labels))
    config.label2id, config.id2label = {str(n): n for n in labels}, {n: str(n) for n in labels}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)

    def preprocess(examples):
        pairs = (examples["sentence1"], examples["sentence2"])
        return tokenizer(*pairs, max_length=data_args.max_seq_length, truncation=True)

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw = raw.map(preprocess, batched=True)

    def compute_metrics(found: EvalPrediction):
        logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return {"accuracy": float((np.argmax(logits, axis=1) == found.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=raw["train"] if training_args.do_train else None,
        eval_dataset=raw["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        result = trainer.train()
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate(eval_dataset=raw["validation"]))
    if training_args.do_predict:
        logits = trainer.predict(raw["validation"].remove_columns("label"), metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            file = Path(training_args.output_dir) / "predictions.json"
            file.write_text(json.dumps(np.asarray(logits).tolist()))


if __name__ == "__main__":
    main()
