"""`Trainer` and `SFTTrainer` for anybody's script, whose result does not depend on the launch. One import changes:

    from isotune import Trainer        # was: from transformers import Trainer
    from isotune import SFTTrainer     # was: from trl import SFTTrainer

What the library does before and around the updates stays the library's: arguments, loading, templates, tokenising,
peft, optimizer, learning rate, callbacks, trackers, checkpoints. Here a schedule decides what each update sees, packed
attention keeps documents apart, the loss is summed over the global batch and divided once, and dropout belongs to the
document.

    rows of an update      per_device_train_batch_size x gradient_accumulation_steps x processes, or global_batch_size=,
                           which pins them on any launch
    packing                rows of max_length tokens whose documents do not see each other, on any attention
    padding                none, or inside the model where it needs it
    evaluate, predict      one exact loss, one prediction a row, in the order of the rows
"""

from isotune.drop_in.describe import describe
from isotune.drop_in.trainer import SFTTrainer, Trainer

__all__ = ["SFTTrainer", "Trainer", "describe"]
