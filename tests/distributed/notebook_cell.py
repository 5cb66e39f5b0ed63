"""What a notebook's cell holds, as a program: accelerate's notebook_launcher on a function that trains.

python tests/distributed/notebook_cell.py FOLDER PROCESSES PORT
"""

import json
import os
import sys
from pathlib import Path


def train(folder: str) -> None:
    """Train a tiny classifier; the main process writes the losses. Libraries are imported here, as accelerate asks."""
    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from isotune import Trainer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=120, num_labels=3, **sizes))
    lengths = torch.randint(3, 30, (24,)).tolist()
    texts = [torch.randint(5, 120, (length,)).tolist() for length in lengths]
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    rows = Dataset.from_dict({"input_ids": texts, "label": [length % 3 for length in lengths]})
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    if args.process_index == 0:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        Path(folder, f"{args.world_size}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    from accelerate import notebook_launcher

    notebook_launcher(train, (sys.argv[1],), num_processes=int(sys.argv[2]), use_port=sys.argv[3])
