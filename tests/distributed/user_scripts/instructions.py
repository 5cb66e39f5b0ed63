"""The usual tutorial of instruction tuning: prompts written by a function, packed, every token learnt.

python instructions.py MODEL rows.jsonl OUTPUT ROWS ACCUMULATION
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from trl import SFTTrainer  # isort: skip

name, data, output, rows, accumulation = sys.argv[1:]


def write_prompt(row: dict[str, str]) -> str:
    return f"### Question: {row['instruction']}\n### Answer: {row['output']}"


args = SFTConfig(
    output_dir=output,
    per_device_train_batch_size=int(rows),
    gradient_accumulation_steps=int(accumulation),
    learning_rate=1e-3,
    max_steps=3,
    logging_steps=1,
    max_length=96,
    packing=True,
    padding_free=True,
    report_to="none",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    save_strategy="no",
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    args=args,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
    formatting_func=write_prompt,
)
trainer.train()
trainer.save_model(output)
trainer.save_state()
