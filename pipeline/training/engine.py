"""The DeepSpeed engine that steps the trained parameters, and its state under plain names.

Build the engine after loading the weights, as DeepSpeed copies them at initialisation. Its optimizer holds only the
parameters that the phase trains. State is gathered and restored in full, so a checkpoint fits any world size and ZeRO
stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import nn
from torch.nn.utils import get_total_norm

from pipeline.models.pruning.scores import Scores
from pipeline.models.state import trained_parameters
from pipeline.recipe.phase import Phase
from pipeline.recipe.schema import Recipe
from pipeline.training.compiled import Compiled
from pipeline.training.context import RunContext

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's constants (Kingma and Ba, ICLR 2015, algorithm 1), also used by HYDRA's reference code."""
STEP = "step"
"""Adam's step count, for its bias correction: a scalar, the same for all trained parameters."""
LARGEST_BUCKET = 50_000_000
"""Most elements that ZeRO reduces at once."""


def zero_stage(recipe: Recipe, world: int) -> int:
    """The recipe's ZeRO stage; 0 for one worker, as ZeRO would copy every gradient and weight with nothing to shard.

    If the recipe's `deepspeed:` section has options of ZeRO, which need a stage, the recipe's stage is kept.
    """
    return recipe.engine.zero_stage if world > 1 or "zero_optimization" in recipe.deepspeed else 0


def deepspeed_config(context: RunContext, trained: int) -> dict[str, Any]:
    """The recipe's `deepspeed:` section plus its other settings; `trained` is the number of trained parameters."""
    recipe, batch = context.recipe, context.recipe.batch
    config: dict[str, Any] = dict(recipe.deepspeed)
    config.setdefault("steps_per_print", 10**9)
    # Throughput is measured by the stopwatch; DeepSpeed's timer waits for the GPU before every forward.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    # DeepSpeed allocates a whole bucket at every step, 2 GB by default, even for a small network. ZeRO wants it even.
    bucket = min(trained + trained % 2, LARGEST_BUCKET)
    buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    config |= {
        "train_batch_size": batch.batch_per_step,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": context.local_micro_batches,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's own default clips at norm 1
        "zero_optimization": {
            **buckets,
            **config.get("zero_optimization", {}),
            "stage": zero_stage(recipe, context.group.world),
        },
    }
    if recipe.engine.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def prepare_deepspeed(device: torch.device) -> None:
    """Attach DeepSpeed to the existing process group. On CPU its inference-only shared-memory op is not built."""
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed would ask NVML for free memory by CUDA_VISIBLE_DEVICES' numbers, and raise for names (GPU-..., MIG-...).
    cuda_accelerator.pynvml = None
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_optimizer(
    parameters: dict[str, nn.Parameter], phase: Phase, score_weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """The phase's SGD, Adam or AdamW. Only AdamW's weight decay is decoupled; the others add it to the gradient.

    Scores form a group of their own if `score_weight_decay` differs from the phase's, and so do rates: they have no
    weight decay, which would push the layers' shares of the budget towards the uniform ones.
    """
    decays: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        override = {"rate": 0.0, "score": score_weight_decay}.get(name.split("/")[0])
        decays.setdefault(phase.weight_decay if override is None else override, []).append(parameter)
    groups = [{"params": members, "weight_decay": decay} for decay, members in decays.items()]
    if phase.optimizer == "adam":
        return torch.optim.Adam(groups, lr=phase.lr, betas=BETAS, eps=EPSILON)
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=phase.lr, betas=BETAS, eps=EPSILON)
    # Fused takes a quarter of the time on a CPU. Its last bits depend on where ZeRO partitions, like those of the sums.
    return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, fused=True)


def slots_of(phase: Phase) -> tuple[str, ...]:
    """Names of the optimizer state that has its parameter's shape."""
    if phase.optimizer == "sgd":
        return ("momentum_buffer",) if phase.momentum else ()
    return "exp_avg", "exp_avg_sq"


def autocast_of(recipe: Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """DeepSpeed's autocast, for a forward that bypasses it."""
    if recipe.engine.precision == "bf16":
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


class Engine:
    """One phase's DeepSpeed engine. It steps the parameters of `network` that have requires_grad at construction."""

    prefix = "optim/"

    def __init__(self, network: nn.Module, scores: Scores | None, phase: Phase, context: RunContext) -> None:
        recipe, group = context.recipe, context.group
        parameters = self._parameters = trained_parameters(network)
        self._scores = scores
        self._compiled = Compiled(network) if recipe.engine.mode == "compiled" else None
        self.network: nn.Module = network if self._compiled is None else self._compiled
        """The network to call in training: compiled if the recipe says so."""
        optimizer = build_optimizer(parameters, phase, recipe.sparsity.score_weight_decay)
        self._engine, *_ = deepspeed.initialize(
            model=self.network,
            optimizer=optimizer,
            model_parameters=list(parameters.values()),  # pyright: ignore[reportArgumentType]
            config=deepspeed_config(context, sum(p.numel() for p in parameters.values())),
            dist_init_required=False,
        )
        self._optimizer = optimizer  # the one that steps, also inside ZeRO's wrapper
        self._slots = slots_of(phase)
        self._counts_steps = phase.optimizer != "sgd"
        self._zero: DeepSpeedZeroOptimizer | None = None
        if zero_stage(recipe, group.world) > 0:
            assert isinstance(self._engine.optimizer, DeepSpeedZeroOptimizer), type(self._engine.optimizer)
            self._zero = self._engine.optimizer
        else:
            # Only now, as DeepSpeed cannot broadcast weights of this memory format at initialisation. ZeRO has them in
            # flat tensors, in the usual format.
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            # With one worker, DeepSpeed would copy every gradient into a buffer and back.
            self._engine.enable_backward_allreduce = group.world > 1
        self._allocate_state()
        # DeepSpeed divides the loss by this number for a mean; a normalised gradient of a rate does not scale with it.
        local, normalised = context.local_micro_batches, scores is not None and scores.source == "learned"
        rates = [parameter for name, parameter in parameters.items() if normalised and name.startswith("rate/")]
        self._hooks = [rate.register_hook(lambda gradient: gradient / local) for rate in rates]
        self.autocast = autocast_of(recipe, group.device)
        """DeepSpeed's autocast, for attacks, which bypass its forward."""

    @property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The update's forward, with gradients for the trained parameters. Attacks use `network` instead."""
        return self._engine

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def advance(self) -> bool:
        """Call after the backward of every micro-batch; the parameters change after the last one of a step.

        Returns False, on every rank, if they do not change because a gradient is NaN or infinite.
        """
        ends_step = self._engine.is_gradient_accumulation_boundary()
        if ends_step and self._zero is None:  # gradients are already summed over the ranks
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            if not math.isfinite(float(get_total_norm(gradients))):
                return False
        self._engine.step()
        if ends_step and self._scores is not None:
            self._scores.weights_changed()
        return self._zero is None or not self._zero.overflow  # ZeRO checks the norm and skips the step silently

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set pruned weights and their optimizer state to zero, for a phase that trains weights. Collective."""
        assert self._scores is not None
        for name, mask in self._scores.masks().items():
            parameter, pruned = self._parameters[f"weight/{name}"], ~mask
            parameter.masked_fill_(pruned, 0.0)
            if self._zero is None:
                for slot in self._slots:
                    self._optimizer.state[parameter][slot].masked_fill_(pruned, 0.0)
                continue
            safe_set_full_fp32_param(parameter, parameter)
            for slot in self._slots:
                full = safe_get_full_optimizer_state(parameter, slot)
                assert full is not None, name
                safe_set_full_optimizer_state(parameter, full.masked_fill(pruned, 0.0), slot)
        self._scores.weights_changed()

    def state(self) -> dict[str, torch.Tensor]:
        """The full optimizer state as fp32 CPU copies; call it after a step. Collective.

        `optim/<plain name>/<slot>` [parameter's shape]: momentum_buffer of SGD, exp_avg and exp_avg_sq of Adam; for
        Adam also `optim/<plain name>/step` [], from the one count of a ZeRO partition.
        """
        state = {}
        for name, parameter in self._parameters.items():
            for slot in self._slots:
                if self._zero is None:
                    full = self._optimizer.state[parameter][slot]
                else:
                    full = safe_get_full_optimizer_state(parameter, slot)
                assert full is not None, name
                state[f"optim/{name}/{slot}"] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
            if self._counts_steps:
                counts = next(iter(self._optimizer.state.values()))
                state[f"optim/{name}/{STEP}"] = counts[STEP].detach().to("cpu", torch.float32, copy=True)
        return state

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned, from any world size and ZeRO stage. Errors: ValueError if it does not fit."""
        slots = (*self._slots, STEP) if self._counts_steps else self._slots
        expected = {f"optim/{name}/{slot}" for name in self._parameters for slot in slots}
        if set(tensors) != expected:
            mismatches = sorted(set(tensors) ^ expected)
            raise ValueError(f"optimizer state does not fit this phase; first difference: {mismatches[0]}")
        counts = [tensor for name, tensor in tensors.items() if name.endswith(f"/{STEP}")]
        if any(not torch.equal(count, counts[0]) for count in counts):
            raise ValueError("optimizer state has different step counts, but all trained parameters step together")
        if counts:
            for slots_of_one in self._optimizer.state.values():
                slots_of_one[STEP].copy_(counts[0])
        for name, parameter in self._parameters.items():
            for slot in self._slots:
                full = tensors[f"optim/{name}/{slot}"].to(parameter.device)
                if self._zero is None:
                    self._optimizer.state[parameter][slot].copy_(full)
                else:
                    safe_set_full_optimizer_state(parameter, full, slot)

    def _allocate_state(self) -> None:
        """Zeros for every tensor that the optimizer steps: at ZeRO 1 and 2, DeepSpeed's flat partitions.

        DeepSpeed maps parameters to their slices of that state only once, by default after the step of the first of
        several groups; state that does not exist by then is never mapped.
        """
        for parameter in [p for group in self._optimizer.param_groups for p in group["params"]]:
            for slot in self._slots:
                self._optimizer.state[parameter][slot] = torch.zeros_like(parameter)
            if self._counts_steps:
                self._optimizer.state[parameter][STEP] = torch.tensor(0.0)  # torch keeps it on the CPU
        if self._zero is not None:
            self._zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Remove the hooks on the network, so that the next phase can build its own engine."""
        # DeepSpeed leaves its own, through which its engine, with the optimizer's state, lives as long as the network.
        engine = self._engine
        for hook in (*self._hooks, engine.module_forward_pre_hook, engine.module_forward_post_hook):
            if hook is not None:
                hook.remove()
        self._engine.destroy()
        if self._compiled is not None:
            self._compiled.close()
