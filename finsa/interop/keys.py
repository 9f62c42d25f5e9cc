"""Keys of LLaMA-Factory's three argument classes and of TrainingArguments that are not translated, with the reasons.

A key that is in neither table is reported as unknown.
"""

from __future__ import annotations

from typing import Any

# Keys without effect on the trained weights, by reason.
_IGNORED = {
    "finsa names and manages run folders": (
        "output_dir overwrite_output_dir run_name logging_dir save_only_model save_steps save_strategy "
        "save_total_limit save_safetensors logging_strategy logging_first_step plot_loss "
        "include_num_input_tokens_seen push_to_hub export_dir export_size export_device export_legacy_format "
        "ray_num_workers ray_run_name print_param_status disable_tqdm"
    ),
    "resume=true resumes an interrupted run": "resume_from_checkpoint",
    "only affects speed and memory": (
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size dataloader_num_workers "
        "dataloader_pin_memory tokenized_path streaming buffer_size cache_dir low_cpu_mem_usage use_fast_tokenizer "
        "ddp_timeout use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc tf32 flash_attn use_kv_cache "
        "ddp_find_unused_parameters torch_empty_cache_steps quantization_device_map offload_folder"
    ),
    "only affects how processes share the work": "deepspeed fsdp fsdp_config local_rank",
    "validation runs after every epoch, see train.validate_every; the test split is scored once at the end": (
        "do_eval do_predict eval_steps eval_strategy evaluation_strategy eval_on_start eval_delay "
        "per_device_eval_batch_size batch_eval_metrics eval_accumulation_steps compute_accuracy eval_on_each_dataset "
        "greater_is_better metric_for_best_model load_best_model_at_end"
    ),
    "labels are scored, nothing is generated": (
        "predict_with_generate eval_num_beams do_sample temperature top_p top_k num_beams max_length max_new_tokens "
        "repetition_penalty infer_dtype infer_backend skip_special_tokens"
    ),
    "secrets are read from the environment, never from files": "hf_hub_token ms_hub_token om_hub_token",
    "false: the precision is model.dtype": "bf16 fp16 pure_bf16",
    "not used": "use_dora use_rslora pissa_init pissa_convert loraplus_lr_ratio",
    "embeddings are not trained": "loraplus_lr_embedding",
    "only for stage dpo": "pref_loss pref_beta simpo_gamma",
    "a row has one question and one answer, and padding never counts": "mask_history ignore_pad_token_for_loss",
    "finetuning_type is not lora": "lora_rank lora_alpha lora_dropout lora_target",
    "main is the default; the model's file pins a commit": "model_revision",
    "not positive, so the number of epochs applies": "max_steps",
    "only text is read": "media_dir image_max_pixels video_max_pixels tool_format",
    "only affects speed; rows are packed if that is cheaper, see train.packing": "neat_packing",
}
IGNORED = {key: reason for reason, keys in _IGNORED.items() for key in keys.split()}

_OPTIMIZER = "the optimizer is AdamW"
_ROWS = "all rows are used; see data.split.rows and method.rows_per_class. No difference if the set is not larger"
_TEXT = "only text is read"
_TOKENS = "the tokenizer is used unchanged"
_LAYERS = "the model's layers are used unchanged"

# Keys that affect the trained weights and have no counterpart: the values that change nothing, and the reason.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "optim": (("adamw_torch", "adamw_torch_fused", "adamw_hf"), _OPTIMIZER),
    "adam_beta1": ((0.9,), _OPTIMIZER),
    "adam_beta2": ((0.999,), _OPTIMIZER),
    "adam_epsilon": ((1e-8,), _OPTIMIZER),
    **{f"use_{name}": ((False,), _OPTIMIZER) for name in ("galore", "apollo", "badam", "adam_mini", "muon")},
    "lr_scheduler_kwargs": (({},), "train.schedule has no parameters"),
    "label_smoothing_factor": (
        (0, 0.0),
        "use method.loss.smoothing, which smooths over the labels, not over all tokens",
    ),
    "neftune_noise_alpha": ((), "embeddings get no noise"),
    "max_samples": ((), _ROWS),
    "packing": ((False,), "rows never attend to each other here; in LLaMA-Factory they do without neat_packing"),
    "mix_strategy": (("concat",), "use data.ratios to mix data sets"),
    "interleave_probs": ((), "use data.ratios to mix data sets"),
    "default_system": ((), "put it into data.prompt"),
    "additional_target": ((), "only the adapter and the classification head are trained"),
    "adapter_name_or_path": ((), "set method.adapter.init to its folder"),
    "create_new_adapter": ((False, True), "method.adapter.init trains the saved adapter further"),
    "pissa_iter": ((-1,), "singular vectors are computed exactly"),
    "quantization_type": (("nf4",), "4-bit quantization is nf4"),
    "quantization_method": (("bnb", "bitsandbytes"), "quantization is done by bitsandbytes"),
    "double_quantization": ((True,), "4-bit quantization is always double"),
    "fp8": ((False,), "model.dtype has no fp8"),
    "data_seed": ((), "one seed for everything: seed"),
    "full_determinism": ((False,), "the same seed gives the same result on one machine anyway"),
    "resize_vocab": ((False,), _TOKENS),
    "split_special_tokens": ((False,), _TOKENS),
    "add_tokens": ((), _TOKENS),
    "add_special_tokens": ((), _TOKENS),
    "new_special_tokens_config": ((), _TOKENS),
    "rope_scaling": ((), "the model's position encoding is used unchanged"),
    "shift_attn": ((False,), "the model's attention is used unchanged"),
    "mixture_of_depths": ((), _LAYERS),
    "use_llama_pro": ((False,), _LAYERS),
    "moe_aux_loss_coef": ((0, 0.0), _LAYERS),
    "upcast_layernorm": ((False,), "model.dtype applies to the whole base model"),
    "upcast_lmhead_output": ((False,), "labels are always scored in float32"),
    "train_from_scratch": ((False,), "use model.weights=random"),
    "enable_thinking": ((True,), "use model.think"),
    "freeze_vision_tower": ((True, False), _TEXT),
    "use_dft_loss": ((False,), "choose the loss with method.loss"),
    "trust_remote_code": ((False,), "set model.trust_remote_code=true yourself after reading the code"),
    "pref_ftx": ((0, 0.0), "method=orpo adds the cross-entropy of the preferred answer"),
    "dpo_label_smoothing": ((0, 0.0), "pairs have no label smoothing"),
    "ref_model": ((), "the reference is the model that training starts from, method.init"),
    "use_swanlab": ((False,), "use tracking=swanlab"),
    "hub_model_id": ((), "nothing is uploaded"),
}
