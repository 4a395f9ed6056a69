"""Options as other trainers name them, for the hint that an unknown option gets."""

from __future__ import annotations

# By the option here, with its value where one is needed: the names in transformers' Trainer and its scripts, TRL,
# LLaMA-Factory, ms-swift, axolotl, and kohya's and ai-toolkit's scripts.
_BY_OPTION = {
    "activation_checkpointing every_layer": "gradient_checkpointing use_gradient_checkpointing",
    "base_ckpt": "base_model model model_id model_name model_name_or_path model_path pretrained_model_name_or_path",
    "batch_size": "micro_batch_size per_device_batch_size per_device_train_batch_size train_batch_size",
    "deepspeed": "deepspeed_config ds_config",
    "early_stopping_patience": "patience",
    "ema_decay": "ema use_ema",
    "epochs": "max_epochs max_train_epochs num_epochs num_train_epochs",
    "evaluate_steps": "predict_every predict_steps predict_with_generate",
    "finetune full": "full_finetune full_finetuning finetuning_type",
    "grad_accum": "accumulate_grad_batches accumulation_steps gradient_accumulation gradient_accumulation_steps",
    "init_from": "adapter_name_or_path adapters lora_weights network_weights",
    "keep_checkpoints": "save_total_limit",
    "load_in_4bit": "4bit load_in_8bit qlora quant_bits quantization quantization_bit use_4bit use_qlora",
    "log_steps": "log_every logging_steps",
    "lora_alpha": "network_alpha",
    "lora_r": "lora_dim lora_rank network_dim r rank",
    "lora_targets": "lora_target lora_target_modules target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "max_grad_norm": "clip_grad_norm grad_clip gradient_clip_val gradient_clipping",
    "max_seq_len": "cutoff_len max_length max_seq_length model_max_length sequence_len",
    "max_steps": "max_train_steps num_steps num_train_steps train_steps",
    "optim": "optimizer optimizer_type",
    "output_dir": "output out_dir save_dir",
    "precision": "compute_type dtype mixed_precision torch_dtype",
    "precision bf16": "bf16 bfloat16",
    "precision fp16": "fp16 half",
    "precision fp32": "fp32 float32",
    "push_to_hub": "upload",
    "resume": "resume_from resume_from_checkpoint",
    "save_steps": "save_every save_interval",
    "sample_steps": "sample_every",
    "train_manifest": "data_dir data_path dataset dataset_name dataset_path train_data train_data_dir train_dataset "
    "train_file train_files",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "val_manifest": "eval_dataset eval_file val_data val_dataset val_file validation_file",
    "val_split": "eval_split eval_split_size split_dataset_ratio val_size",
    "val_steps": "eval_every eval_steps evaluation_steps",
    "warmup_ratio": "num_warmup_steps warmup_steps",
}
OPTION_OF = {name: option for option, names in _BY_OPTION.items() for name in names.split()}
