"""The usual QLoRA tutorial: a base in 4 bits, LoRA on all its linear layers, chats learnt on their answers.

python qlora_chat.py MODEL chats.jsonl OUTPUT ROWS ACCUMULATION
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig

from trl import SFTTrainer  # isort: skip

name, data, output, rows, accumulation = sys.argv[1:]
dataset = load_dataset("json", data_files=data, split="train")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(
    name,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    dtype=torch.float32,
    device_map={"": "cpu"},
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output,
        per_device_train_batch_size=int(rows),
        gradient_accumulation_steps=int(accumulation),
        learning_rate=2e-3,
        max_steps=3,
        logging_steps=1,
        max_length=256,
        packing=False,
        assistant_only_loss=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(output)
trainer.save_state()
