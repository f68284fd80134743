"""The `deepspeed:` section of a recipe: options that DeepSpeed is given unchanged. Imports no DeepSpeed.

DeepSpeed ignores keys that it does not know, so they are refused here. A test compares the lists with what the pinned
version of DeepSpeed reads.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from pipeline.recipe.fields import exact_decimal

DECIDED_ELSEWHERE = {
    "train_batch_size": "batch.batch_per_step decides it",
    "train_micro_batch_size_per_gpu": "batch.micro_batch decides it",
    "gradient_accumulation_steps": "batch and workers.count decide it",
    "elasticity": "batch and workers.count decide it",
    "optimizer": "phases.* decide it",
    "scheduler": "phases.*.schedule decides it",
    "fp16": "engine.precision decides it",
    "bf16": "engine.precision decides it",
    "bfloat16": "engine.precision decides it",
    "torch_autocast": "engine.precision decides it",
    "amp": "engine.precision decides it",
    "data_types": "engine.precision decides it",
    "zero_allow_untested_optimizer": "the engine sets it",
    "gradient_clipping": "gradients are not clipped here",
}
"""Keys that are refused -> why."""

OPTIONS = (
    *("activation_checkpointing", "aio", "autotuning", "checkpoint", "comet", "comms_logger"),
    *("communication_data_type", "compile", "csv_monitor", "data_efficiency", "dataloader_drop_last"),
    *("datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel"),
    *("flops_profiler", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine", "log_level"),
    *("managed_gradient_accumulation", "memory_breakdown", "pipeline", "prescale_gradients"),
    *("seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard", "timers"),
    *("use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb"),
    *("weight_quantization", "zero_force_ds_cpu_optimizer", "zero_optimization"),
)
"""The other keys that DeepSpeed reads."""

ZERO_OPTIONS = (
    *("allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients"),
    *("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint"),
    *("enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights"),
    *("log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm"),
    *("override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size"),
    *("reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage"),
    *("stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save"),
    *("stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_model_persistence_threshold", "stage3_module_granularity_threshold"),
    *("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params"),
    *("sub_group_size", "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size"),
    *("zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights"),
)
"""The keys of zero_optimization."""


def _refuse_unknown(keys: Iterable[str], known: tuple[str, ...], prefix: str = "") -> None:
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known)}"
        raise ValueError(f"{prefix}{key}: unknown to DeepSpeed; {hint}")


def _check_numbers(key: str, value: Any) -> None:
    """Refuse numbers of any depth that are out of a recipe's bounds, and those that are not finite."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(key, inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = exact_decimal(value)
        except ValueError as error:
            raise ValueError(f"{key} = {value}: {error}") from None
        if number is None:
            raise ValueError(f"{key} = {value}: expected a finite number")


def _check_deepspeed(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    for key, why in DECIDED_ELSEWHERE.items():
        if key in options:
            raise ValueError(f"{key} = {options[key]!r}: {why}; remove this key")
    was_accepted = info.context is not None  # in the recipe of a run: earlier versions let unknown keys pass
    if not was_accepted:
        _refuse_unknown(options, OPTIONS)
    zero = options.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"zero_optimization = {zero!r}: expected a section; engine.zero_stage turns ZeRO on")
    if not was_accepted:
        _refuse_unknown(zero, ZERO_OPTIONS, "zero_optimization.")
    _check_numbers("", options)
    bucket = zero.get("allgather_bucket_size", 0)
    if not was_accepted and isinstance(bucket, int) and bucket % 2:
        raise ValueError(f"zero_optimization.allgather_bucket_size = {bucket}: ZeRO expects an even number of elements")
    return json.loads(json.dumps(options))  # drops the number types of recipe.file


DeepSpeedOptions = Annotated[dict[str, Any], AfterValidator(_check_deepspeed)]
"""Options passed to DeepSpeed unchanged."""
