"""Keys of other tools that have no effect here or another name, and the sentence that answers each."""

from isotune.io.shipped import IS_CHECKOUT

_BATCH = "the batch of a step is global_batch_size on any hardware, and microbatch_tokens bounds the memory"
_PLAN = "the plan lays out every row of every step, and nothing is dropped"
_EVALUATION = "evaluation sums its exact loss over all supervised tokens, whatever the batch"
_LAUNCH = (
    "choose the engine by `accelerate launch --config_file accelerate_configs/...`"
    if IS_CHECKOUT
    else "choose the engine by --engine NAME (`isotune ls engines`)"
)
_DEVICE = "the script chooses the device and the backend; an empty CUDA_VISIBLE_DEVICES hides GPUs"
_COMPILE = "rows of many lengths would each be compiled anew, and packed attention is not compiled"
_LOSS = "the loss is the exact cross-entropy over the supervised tokens of a step"
_HUB = "push_to_hub: true uploads OUTPUT_DIR/model once, after it is saved"
_TOKEN = (
    "others on this machine can see a command line, and a recipe is copied: set HF_TOKEN, name a file that holds the "
    "token by HF_TOKEN_PATH, or log in with `hf auth login`"
)
TOKEN_NAMES = ("hub_token", "hf_token", "token", "use_auth_token")  # of other tools, whose values are never shown
_LIGER = "the packed attention and the chunked loss take the place of Liger's kernels"

NAMES_BY_ANSWER: dict[str, tuple[str, ...]] = {
    # the same under another name here
    "say max_seq_length": ("max_length",),
    "say r": ("lora_r",),
    "say target_modules": ("lora_target_modules",),
    "say modules_to_save": ("lora_modules_to_save",),
    "say seed": ("data_seed",),
    "say resume": ("resume_from_checkpoint",),
    "say tokenizer_name_or_path": ("tokenizer_name",),
    "say model_name_or_path": ("model", "model_name"),
    "say dataset_name": ("dataset", "train_file"),
    "say eval_dataset_name": ("validation_file",),
    "say dataset_split": ("dataset_train_split",),
    "say eval_dataset_split": ("dataset_test_split",),
    "say eval_strategy": ("evaluation_strategy",),
    "say overlong": ("truncation_mode",),
    "say learning_rate": ("lr",),
    "say num_train_epochs": ("epochs", "num_epochs"),
    "say global_batch_size": ("batch_size", "train_batch_size"),
    # without effect here
    _BATCH: ("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"),
    f"{_EVALUATION}; eval_microbatch_tokens bounds the memory": ("per_device_eval_batch_size",),
    _PLAN: (
        "remove_unused_columns", "label_names", "train_sampling_strategy", "group_by_length", "length_column_name",
        "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "shuffle_dataset",
        "pad_to_multiple_of"),
    f"say packing: true or false; {_PLAN}": ("padding_free", "packing_strategy", "eval_packing"),
    "say train_on: all, last or everything": ("completion_only_loss", "assistant_only_loss"),
    "say device: cpu": ("use_cpu", "no_cuda"),
    _DEVICE: ("ddp_backend", "local_rank"),
    _LAUNCH: ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"),
    "say on_nonfinite: stop or skip; a non-finite loss is never hidden": ("logging_nan_inf_filter", "debug"),
    _LOSS: ("label_smoothing_factor", "loss_type", "average_tokens_across_devices"),
    f"{_EVALUATION}, in the precision of training": ("bf16_full_eval", "fp16_full_eval"),
    _EVALUATION: (
        "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
        "include_for_metrics", "batch_eval_metrics"),
    "a checkpoint holds everything that a run needs to go on, and OUTPUT_DIR/model is the final model": (
        "save_only_model", "save_on_each_node", "save_safetensors", "ignore_data_skip",
        "restore_callback_states_from_checkpoint"),
    "a run that is told to stop always writes a checkpoint": ("enable_jit_checkpoint",),
    "it follows from metric_for_best_model": ("greater_is_better",),
    "choose another output_dir, or remove the folder": ("overwrite_output_dir",),
    _TOKEN: TOKEN_NAMES,
    _HUB: ("hub_strategy", "hub_always_push", "hub_revision"),
    _COMPILE: ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    _LIGER: ("use_liger_kernel", "liger_kernel_config"),
    "a run trains, and evaluates when eval_dataset_name is given": ("do_train", "do_eval", "do_predict"),
    "packed attention is the one for every architecture": ("attn_implementation",),
    "say bf16: true or fp16: true, or neither for fp32": (
        "dtype", "torch_dtype", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
    "say tune: lora": ("use_peft",),
    "say tune: qlora": ("load_in_4bit",),
    "on a GPU bitsandbytes chooses by all tokens of a microbatch which columns it rounds to 8 bits, so the result "
    "would depend on its size: tune: qlora has 4-bit weights": ("load_in_8bit",),
    "say warmup_steps: a number below 1 is a share of the run": ("warmup_ratio",),
    "metrics.jsonl has input_tokens and peak_memory_bytes": (
        "include_num_input_tokens_seen", "skip_memory_metrics"),
    "a tracker keeps its files where its own environment variables say": ("logging_dir",),
    "training never keeps a cache of keys and values": ("use_cache",),
    "its noise depends on the length of a row, so packing would change the result": ("neftune_noise_alpha",),
    "microbatch_tokens and gradient_checkpointing bound the memory": (
        "torch_empty_cache_steps", "activation_offloading"),
    "only optimisers that train the modules of tune are offered": ("optim_target_modules",),
    "gradient checkpointing is always of the non-reentrant form": (
        "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    "every trained parameter takes part in every backward": ("ddp_find_unused_parameters",),
    "fp32 is the same number on every GPU, and bf16: true is the faster way": ("tf32",),
    "a rank may run an empty microbatch, so the graph is not static": ("ddp_static_graph",),
    "preparation tokenises in threads by itself": ("dataset_num_proc",),
    "special tokens belong to the tokenizer: set them in its folder": ("eos_token", "pad_token"),
    "say chat_format: the template's file": ("chat_template_path",),
    "a model's folder says how it is made": ("model_init_kwargs",),
    "dataset_name and dataset_split say what is read": ("dataset_kwargs",),
    "rows are read in bounded memory, prepared once and mapped from disk, so leave it out": (
        "streaming", "dataset_streaming"),
    "say eval_dataset_name, or eval_split_share for a classifier": ("test_split_size",),
    "say dataset_mixture": ("dataset_mixer",),
    "say dataset_prompt_field": ("prompt_column", "prompt_field", "question_column", "input_column"),
    "say dataset_completion_field": (
        "completion_column", "completion_field", "response_column", "answer_column", "output_column"),
    "code from the Hub is never run": ("trust_remote_code",),
    "say augment_word_dropout, augment_word_swap or augment_synonyms": ("augment", "augmentation"),
}  # fmt: skip

UNSUPPORTED = {name: answer for answer, names in NAMES_BY_ANSWER.items() for name in names}
