"""Which modules of a sequence classifier are its head, by model type."""

from transformers import PreTrainedConfig

# Modules above the encoder: a file may lack them, and beside LoRA they are trained whole.
HEADS = {
    "albert": ["pooler", "classifier"],
    "bert": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
}
OTHER_HEADS = ["classifier"]


def head_of(config: PreTrainedConfig) -> list[str]:
    """Names of the head's modules; none of them is below the encoder."""
    return HEADS.get(config.model_type, OTHER_HEADS)
