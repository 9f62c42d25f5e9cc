"""Keys of LLaMA-Factory that are not translated, each with the reason.

Of its three classes of arguments and of transformers' TrainingArguments; what stands in neither table is told to be
unknown.
"""

from __future__ import annotations

from typing import Any

_RUNS = "run folders are named and kept by finsa"
_SPEED = "speed and memory alone"
_SCORED = "labels are scored, nothing is generated"
_CHOSEN = "validation follows every epoch, see train.validate_every; the test split is scored once at the end"
_SECRET = "secrets are read from the environment, never from files"

# Keys without effect on what is learnt.
IGNORED: dict[str, str] = {
    **dict.fromkeys(("output_dir", "overwrite_output_dir", "run_name", "logging_dir", "save_only_model"), _RUNS),
    **dict.fromkeys(("save_steps", "save_strategy", "save_total_limit", "save_safetensors"), _RUNS),
    **dict.fromkeys(("resume_from_checkpoint",), "resume=true goes on with an interrupted run"),
    **dict.fromkeys(("logging_strategy", "logging_first_step", "plot_loss", "include_num_input_tokens_seen"), _RUNS),
    **dict.fromkeys(("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size"), _SPEED),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "tokenized_path", "streaming"), _SPEED),
    **dict.fromkeys(("buffer_size", "cache_dir", "low_cpu_mem_usage", "use_fast_tokenizer", "ddp_timeout"), _SPEED),
    **dict.fromkeys(("use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_reentrant_gc", "tf32"), _SPEED),
    **dict.fromkeys(("flash_attn", "use_kv_cache", "ddp_find_unused_parameters", "torch_empty_cache_steps"), _SPEED),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "local_rank"), "how processes share the work, not what is learnt"
    ),
    **dict.fromkeys(("do_eval", "do_predict", "eval_steps", "eval_strategy", "evaluation_strategy"), _CHOSEN),
    **dict.fromkeys(("eval_on_start", "eval_delay", "per_device_eval_batch_size", "batch_eval_metrics"), _CHOSEN),
    **dict.fromkeys(
        ("eval_accumulation_steps", "compute_accuracy", "eval_on_each_dataset", "greater_is_better"), _CHOSEN
    ),
    **dict.fromkeys(("metric_for_best_model", "load_best_model_at_end"), _CHOSEN),
    **dict.fromkeys(("predict_with_generate", "eval_num_beams", "do_sample", "temperature", "top_p", "top_k"), _SCORED),
    **dict.fromkeys(("num_beams", "max_length", "max_new_tokens", "repetition_penalty", "infer_dtype"), _SCORED),
    **dict.fromkeys(("infer_backend", "skip_special_tokens"), _SCORED),
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token"), _SECRET),
    **dict.fromkeys(("push_to_hub", "export_dir", "export_size", "export_device", "export_legacy_format"), _RUNS),
    **dict.fromkeys(("bf16", "fp16", "pure_bf16"), "false: the precision is model.dtype"),
    **dict.fromkeys(("use_dora", "use_rslora", "pissa_init", "pissa_convert", "loraplus_lr_ratio"), "not in use"),
    **dict.fromkeys(("loraplus_lr_embedding",), "embeddings learn nothing"),
    **dict.fromkeys(
        ("mask_history", "ignore_pad_token_for_loss"), "one question and one answer a row, padding never counts"
    ),
    **dict.fromkeys(("ray_num_workers", "ray_run_name", "print_param_status", "disable_tqdm"), _RUNS),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_target"), "finetuning_type is not lora"),
    **dict.fromkeys(("model_revision",), "main is the default; the file of the model pins a commit"),
    **dict.fromkeys(("max_steps",), "not positive: the epochs decide"),
    **dict.fromkeys(("media_dir", "image_max_pixels", "video_max_pixels", "tool_format"), "texts alone are read"),
    **dict.fromkeys(("quantization_device_map", "offload_folder"), _SPEED),
    "neat_packing": "speed alone: rows are packed where that is cheaper, see train.packing",
}

_OPTIMIZER = "the optimiser is AdamW"
_ROWS = "train on all rows; method.rows_per_class caps a class. Without effect where the set has no more rows"
_TOKENS = "the tokenizer is used as it is"

# Keys that change what is learnt and have no counterpart: values that change nothing, and the reason.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "optim": (("adamw_torch", "adamw_torch_fused", "adamw_hf"), _OPTIMIZER),
    "adam_beta1": ((0.9,), _OPTIMIZER),
    "adam_beta2": ((0.999,), _OPTIMIZER),
    "adam_epsilon": ((1e-8,), _OPTIMIZER),
    **{f"use_{name}": ((False,), _OPTIMIZER) for name in ("galore", "apollo", "badam", "adam_mini", "muon")},
    "lr_scheduler_kwargs": (({},), "train.schedule has no parameters"),
    "label_smoothing_factor": ((0, 0.0), "over the labels, not over all tokens: method.loss.smoothing"),
    "neftune_noise_alpha": ((), "no noise on embeddings"),
    "max_samples": ((), _ROWS),
    "packing": ((False,), "rows of a step never see each other here; with neat_packing=true they do not there either"),
    "mix_strategy": (("concat",), "data.ratios says how parts are mixed"),
    "interleave_probs": ((), "data.ratios says how parts are mixed"),
    "default_system": ((), "put it into data.prompt"),
    "additional_target": ((), "nothing but the adapter learns beside the head"),
    "adapter_name_or_path": ((), "a run starts from the base model"),
    "create_new_adapter": ((False, True), "a run starts from a new adapter"),
    "pissa_iter": ((-1,), "singular vectors are computed exactly"),
    "quantization_type": (("nf4",), "4 bit are nf4"),
    "quantization_method": (("bnb", "bitsandbytes"), "bitsandbytes quantises"),
    "double_quantization": ((True,), "4 bit are quantised twice"),
    "fp8": ((False,), "model.dtype has no fp8"),
    "data_seed": ((), "one seed for everything: seed"),
    "full_determinism": ((False,), "the same seed gives the same result on one machine anyway"),
    "resize_vocab": ((False,), _TOKENS),
    "split_special_tokens": ((False,), _TOKENS),
    "add_tokens": ((), _TOKENS),
    "add_special_tokens": ((), _TOKENS),
    "new_special_tokens_config": ((), _TOKENS),
    "rope_scaling": ((), "the model's own positions"),
    "shift_attn": ((False,), "the model's own attention"),
    "mixture_of_depths": ((), "the model's own layers"),
    "use_llama_pro": ((False,), "the model's own layers"),
    "moe_aux_loss_coef": ((0, 0.0), "the model's own layers"),
    "upcast_layernorm": ((False,), "model.dtype for the whole base"),
    "upcast_lmhead_output": ((False,), "labels are always scored in float32"),
    "train_from_scratch": ((False,), "model.weights=random"),
    "enable_thinking": ((True,), "model.think"),
    "freeze_vision_tower": ((True, False), "texts alone are read"),
    "use_dft_loss": ((False,), "method.loss has other names"),
    "trust_remote_code": ((False,), "say model.trust_remote_code=true yourself, after reading the code"),
    "use_swanlab": ((False,), "tracking is wandb or none"),
    "hub_model_id": ((), "nothing is uploaded"),
}
