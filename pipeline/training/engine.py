"""DeepSpeed: the engine that steps the trained parameters, and its state under plain names.

The engine is built after the module holds its weights (DeepSpeed copies them at initialisation). Its optimizer holds
only what the phase trains. State is gathered and restored in full, so a checkpoint fits any world size and ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import nn
from torch.nn.utils import get_total_norm

from pipeline.models.pruning.scores import Scores
from pipeline.models.state import trained_parameters
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import Phase
from pipeline.training.compiled import Compiled
from pipeline.training.context import RunContext

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's constants (Kingma and Ba, ICLR 2015, algorithm 1), which HYDRA's reference leaves as they are."""
STEP = "step"
"""Adam's count of its steps, by which it corrects the bias of its averages: a scalar, the same for all that trains."""
LARGEST_BUCKET = 50_000_000
"""Elements that ZeRO reduces at once at the most."""


def zero_stage(recipe: Recipe, world: int) -> int:
    """The recipe's stage; 0 for one worker, as ZeRO would copy every gradient and weight to share them with nobody.

    Options of ZeRO in the recipe's `deepspeed:` section are for a stage, which then is kept.
    """
    return recipe.engine.zero_stage if world > 1 or "zero_optimization" in recipe.deepspeed else 0


def deepspeed_config(context: RunContext, trained: int) -> dict[str, Any]:
    """The recipe's own `deepspeed:` section plus what the recipe says elsewhere; `trained` counts parameters."""
    recipe, batch = context.recipe, context.recipe.batch
    config: dict[str, Any] = dict(recipe.deepspeed)
    config.setdefault("steps_per_print", 10**9)
    # DeepSpeed allocates a whole bucket at every step, 2 GB by default, however small the network is.
    bucket = min(trained, LARGEST_BUCKET)
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
    """Attach DeepSpeed to the process group there is. On CPU its inference-only shared-memory op is not built."""
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_optimizer(
    parameters: dict[str, nn.Parameter], phase: Phase, score_weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """SGD or Adam, as the phase says. Weight decay is added to the gradient in both: Adam's is not decoupled.

    Scores have a group of their own if `score_weight_decay` is another than the phase's, and so have rates: they have
    no weight decay, which would pull the layers' shares of the budget back to the uniform ones.
    """
    decays: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        own = {"rate": 0.0, "score": score_weight_decay}.get(name.split("/")[0])
        decays.setdefault(phase.weight_decay if own is None else own, []).append(parameter)
    groups = [{"params": members, "weight_decay": decay} for decay, members in decays.items()]
    if phase.optimizer == "adam":
        return torch.optim.Adam(groups, lr=phase.lr, betas=BETAS, eps=EPSILON)
    # Fused, it takes a quarter of the time on a CPU. Where ZeRO cuts decides its last bits, as it does of the sums.
    return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, fused=True)


def slots_of(phase: Phase) -> tuple[str, ...]:
    """Names of the optimizer's state that has its parameter's shape."""
    if phase.optimizer == "adam":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if phase.momentum else ()


def autocast_of(recipe: Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What DeepSpeed opens around its own forward, for a forward that bypasses it."""
    if recipe.engine.precision == "bf16":
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


class Engine:
    """One phase's DeepSpeed engine.

    It steps the parameters of `network` that have requires_grad when it is made.
    """

    prefix = "optim/"

    def __init__(self, network: nn.Module, scores: Scores | None, phase: Phase, context: RunContext) -> None:
        recipe, group = context.recipe, context.group
        parameters = self._parameters = trained_parameters(network)
        self._scores = scores
        self._compiled = Compiled(network) if recipe.engine.mode == "compiled" else None
        self.network: nn.Module = network if self._compiled is None else self._compiled
        """What is called in training: the network, compiled if the recipe says so."""
        optimizer = build_optimizer(parameters, phase, recipe.sparsity.score_weight_decay)
        self._engine, *_ = deepspeed.initialize(
            model=self.network,
            optimizer=optimizer,
            model_parameters=list(parameters.values()),  # pyright: ignore[reportArgumentType]
            config=deepspeed_config(context, sum(p.numel() for p in parameters.values())),
            dist_init_required=False,
        )
        self._optimizer = optimizer  # the one that steps, also inside ZeRO's
        self._slots = slots_of(phase)
        self._counts_steps = phase.optimizer == "adam"
        self._zero: DeepSpeedZeroOptimizer | None = None
        if zero_stage(recipe, group.world) > 0:
            assert isinstance(self._engine.optimizer, DeepSpeedZeroOptimizer), type(self._engine.optimizer)
            self._zero = self._engine.optimizer
        else:
            # DeepSpeed broadcasts weights at initialisation, which it cannot in another order than the usual one. ZeRO
            # has them in flat tensors, in that order.
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            # Alone, DeepSpeed would copy every gradient into a buffer, and back.
            self._engine.enable_backward_allreduce = group.world > 1
        self._begin_state()
        # DeepSpeed divides the loss by this number to get a mean; a rate's gradient does not shrink with it (`masked`).
        local = context.local_micro_batches
        rates = [parameter for name, parameter in parameters.items() if name.startswith("rate/")]
        self._hooks = [rate.register_hook(lambda gradient: gradient / local) for rate in rates]
        self.autocast = autocast_of(recipe, group.device)
        """What DeepSpeed opens around its own forward, for the attack, which bypasses it."""

    @property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The update's forward; gradients flow to what trains. Attacks use `network` instead."""
        return self._engine

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def advance(self) -> bool:
        """Call after every micro-batch's backward; the parameters move at the last one of a step.

        False, the same on every rank, if they do not because a gradient is NaN or infinite.
        """
        ends_step = self._engine.is_gradient_accumulation_boundary()
        if ends_step and self._zero is None:  # the gradients are summed over the ranks by now
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            if not math.isfinite(float(get_total_norm(gradients))):
                return False
        self._engine.step()
        if ends_step and self._scores is not None:
            self._scores.weights_changed()
        return self._zero is None or not self._zero.overflow  # ZeRO takes the norm, and then skips the step, silently

    def state(self) -> dict[str, torch.Tensor]:
        """Full state as CPU copies, fp32; call it after a step. Collective.

        `optim/<plain name>/<slot>` [parameter's shape]: momentum_buffer of SGD, exp_avg and exp_avg_sq of Adam; and
        `optim/<plain name>/step` [] of Adam, as a partition of ZeRO has one count for all that it steps.
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
        """Put back what `state` returned, whatever world size or ZeRO stage it came from."""
        slots = (*self._slots, STEP) if self._counts_steps else self._slots
        expected = {f"optim/{name}/{slot}" for name in self._parameters for slot in slots}
        if set(tensors) != expected:
            odd = sorted(set(tensors) ^ expected)
            raise ValueError(f"optimizer state does not fit this phase; first difference: {odd[0]}")
        counts = [tensor for name, tensor in tensors.items() if name.endswith(f"/{STEP}")]
        if any(not torch.equal(count, counts[0]) for count in counts):
            raise ValueError("optimizer state has different counts of steps, but all that trains moves at every step")
        if counts:
            for held in self._optimizer.state.values():
                held[STEP].copy_(counts[0])
        for name, parameter in self._parameters.items():
            for slot in self._slots:
                full = tensors[f"optim/{name}/{slot}"].to(parameter.device)
                if self._zero is None:
                    self._optimizer.state[parameter][slot].copy_(full)
                else:
                    safe_set_full_optimizer_state(parameter, full, slot)

    def _begin_state(self) -> None:
        """Zeros for all that the optimizer steps, which at ZeRO 1 and 2 are DeepSpeed's flat partitions.

        DeepSpeed finds a parameter's part of them only if they are there when it looks, which it does once: left alone,
        after the step of the first of several groups.
        """
        for parameter in [p for group in self._optimizer.param_groups for p in group["params"]]:
            for slot in self._slots:
                self._optimizer.state[parameter][slot] = torch.zeros_like(parameter)
            if self._counts_steps:
                self._optimizer.state[parameter][STEP] = torch.tensor(0.0)  # torch keeps it on the CPU
        if self._zero is not None:
            self._zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Release DeepSpeed's hooks on the network, so that the next phase can build an engine of its own."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
        if self._compiled is not None:
            self._compiled.close()
