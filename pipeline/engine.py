"""DeepSpeed: the engine that steps the trained parameters, and its state under plain names.

The engine is built after the module holds its weights (DeepSpeed copies them at initialisation). Its optimizer holds
only what the phase trains. State is gathered and restored in full, so a checkpoint fits any world size and ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import nn

from pipeline.group import Group
from pipeline.recipe import Recipe
from pipeline.recipe_sections import Phase

MOMENTUM = "momentum_buffer"
LARGEST_BUCKET = 50_000_000
"""Elements that ZeRO reduces at once at the most."""


def deepspeed_config(recipe: Recipe, world: int, trained: int) -> dict[str, Any]:
    """The recipe's own `deepspeed:` section plus what the recipe says elsewhere; `trained` counts parameters."""
    batch = recipe.batch
    config: dict[str, Any] = dict(recipe.deepspeed)
    config.setdefault("steps_per_print", 10**9)
    # DeepSpeed allocates a whole bucket at every step, 2 GB by default, however small the network is.
    bucket = min(trained, LARGEST_BUCKET)
    buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    config |= {
        "train_batch_size": batch.batch_per_step,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.micro_batches_per_step // world,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's own default clips at norm 1
        "zero_optimization": {**buckets, **config.get("zero_optimization", {}), "stage": recipe.engine.zero_stage},
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


def autocast_of(recipe: Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What DeepSpeed opens around its own forward, for a forward that bypasses it."""
    if recipe.engine.precision == "bf16":
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


def _weight_decay(name: str, phase: Phase, recipe: Recipe) -> float:
    """Rates have none: it would pull the layers' shares of the budget back to the uniform ones."""
    own = {"rate": 0.0, "score": recipe.sparsity.score_weight_decay}.get(name.split("/")[0])
    return phase.weight_decay if own is None else own


class Engine:
    """One phase's DeepSpeed engine.

    `parameters` maps plain names to the parameters that train; all others are frozen.
    """

    def __init__(
        self, network: nn.Module, parameters: dict[str, nn.Parameter], phase: Phase, recipe: Recipe, group: Group
    ) -> None:
        self._parameters = parameters
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(_weight_decay(name, phase, recipe), []).append(parameter)
        optimizer = torch.optim.SGD(
            [{"params": members, "weight_decay": decay} for decay, members in groups.items()],
            lr=phase.lr,
            momentum=phase.momentum,
        )
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            model_parameters=list(parameters.values()),  # pyright: ignore[reportArgumentType]
            config=deepspeed_config(recipe, group.world, sum(p.numel() for p in parameters.values())),
            dist_init_required=False,
        )
        self._sgd = optimizer
        self._zero: DeepSpeedZeroOptimizer | None = None
        if recipe.engine.zero_stage > 0:
            assert isinstance(self._engine.optimizer, DeepSpeedZeroOptimizer), type(self._engine.optimizer)
            self._zero = self._engine.optimizer
            # Momentum from the start, zero: DeepSpeed looks for it once, after the first group's first step, and so
            # would never gather that of the other groups. SGD's first step makes the gradient of it, as without.
            for flat in [flat for members in self._sgd.param_groups for flat in members["params"]]:
                self._sgd.state[flat][MOMENTUM] = torch.zeros_like(flat)
            self._zero._lazy_init_hp_params_optimizer_state()
        # DeepSpeed divides the loss by this number to get a mean; a rate's gradient does not shrink with it (`masked`).
        local = recipe.batch.micro_batches_per_step // group.world
        rates = [parameter for name, parameter in parameters.items() if name.startswith("rate/")]
        self._hooks = [rate.register_hook(lambda gradient: gradient / local) for rate in rates]
        self.autocast = autocast_of(recipe, group.device)
        """What DeepSpeed opens around its own forward, for the attack, which bypasses it."""

    @property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The update's forward; gradients flow to what trains. Attacks use the bare network instead."""
        return self._engine

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def set_lr(self, lr: float) -> None:
        for group in self._sgd.param_groups:
            group["lr"] = lr

    def advance(self) -> None:
        """Call after every micro-batch's backward; the parameters move at the last one of a step."""
        self._engine.step()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Full state as CPU copies: `optim/<plain name>/momentum_buffer` -> fp32 [parameter's shape]. Collective."""
        state = {}
        for name, parameter in self._parameters.items():
            if self._zero is None:
                full = self._sgd.state[parameter][MOMENTUM]
            else:
                full = safe_get_full_optimizer_state(parameter, MOMENTUM)
            assert full is not None, name
            state[f"optim/{name}/{MOMENTUM}"] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `optimizer_state` returned, whatever world size or ZeRO stage it came from."""
        expected = {f"optim/{name}/{MOMENTUM}" for name in self._parameters}
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)
            raise ValueError(f"optimizer state does not fit this phase; first difference: {odd[0]}")
        for name, parameter in self._parameters.items():
            full = state[f"optim/{name}/{MOMENTUM}"].to(parameter.device)
            if self._zero is None:
                self._sgd.state[parameter][MOMENTUM] = full.clone()
            else:
                safe_set_full_optimizer_state(parameter, full, MOMENTUM)

    def close(self) -> None:
        """Release DeepSpeed's hooks on the network, so that the next phase can build an engine of its own."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
