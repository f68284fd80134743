"""Loads an exported network of a run as a plain module, for attacks, evaluations, predictions and third-party code.

    import pipeline

    network = pipeline.load("runs/demo", keep_fraction=0.01)
    logits = network(torch.stack([network.preprocess("shirt.png")]))

Imports none of the training dependencies (Ray, DeepSpeed, FFCV, wandb); `preprocess` imports FFCV's C library.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipeline.evaluation.result import EvaluationResult
from pipeline.models import Network
from pipeline.models.export import load_model, read_metadata
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.stages import Stage, stages_of
from pipeline.recipe.technique import MeasureName
from pipeline.run.files import sha256_of
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.provenance import load_run_recipe
from pipeline.run.records import Provenance, StageResult

if TYPE_CHECKING:
    from pipeline.data.loading.preprocessing import Preprocessing

DENSE = Decimal(1)
"""The keep_fraction of the network before pruning."""


class LoadedNetwork(Network):
    """A finished network, and what its file and its run say about it.

    Files from before this was exported are completed from the recipe and the test file of the run that they lie in.
    """

    def __init__(self, file: Path) -> None:
        network = load_model(file)
        super().__init__(network.backbone, (0.0,), (1.0,), network.image_size)
        self.mean, self.std = network.mean, network.std
        self.file = file
        self.metadata: dict[str, Any] = read_metadata(file)
        """What `models.export.write_model` wrote: architecture, image_size, keep_fraction, hashes and so on."""
        self.eval()

    @cached_property
    def class_names(self) -> list[str]:
        """By label; "class 0" and so on if neither the file nor its run says."""
        if "class_names" in self.metadata:
            return self.metadata["class_names"]
        manifest = self._test_manifest
        return manifest.class_names if manifest else [f"class {i}" for i in range(self.metadata["num_classes"])]

    @cached_property
    def threat_model(self) -> dict[str, str] | None:
        """norm and eps that it was trained for; None without one, or if neither the file nor its run says."""
        if "threat_model" in self.metadata or self.run is None:
            return self.metadata.get("threat_model")
        threat_model = load_run_recipe(self.run).threat_model
        return threat_model.model_dump(mode="json") if threat_model else None

    @cached_property
    def preprocess(self) -> Preprocessing:
        """PIL image or path of an image file -> float32 [3, image_size, image_size], as the network sees test images.

        Errors: ValueError if neither the file nor its run says how.
        """
        from pipeline.data.loading.preprocessing import Preprocessing

        if "preprocessing" in self.metadata:
            return Preprocessing.model_validate(self.metadata["preprocessing"])
        if self.run is None or self._test_manifest is None:
            raise ValueError(
                f"{self.file} does not say how images are prepared, as older versions exported it, and "
                "the test file of its run is not there; put it back into its run, and bring that file back"
            )
        data = load_run_recipe(self.run).data
        return Preprocessing.of(self._test_manifest, data.image_size, data.augmentation)

    @cached_property
    def evaluation(self) -> EvaluationResult | None:
        """Of its run, on the test set: accuracies, attack, eps; None if the file is not in a run, or not evaluated yet.

        Errors: ValueError naming a damaged file.
        """
        files = [StageFolder(self.file.parent).evaluation(name) for name in get_args(MeasureName)]
        results = [EvaluationResult.read(path) for path in files if path.is_file()]
        sha256 = sha256_of(self.file) if results else None
        return next((result for result in results if result.model_sha256 == sha256), None)

    @cached_property
    def run(self) -> Path | None:
        """The folder of the run that the file lies in; None if it lies in none."""
        return next((f for f in self.file.resolve().parents if RunFolder(f).recipe.is_file()), None)

    @cached_property
    def _test_manifest(self) -> Any:
        """The manifest of the run's test file, if that is still the file with which the run was started."""
        from pipeline.data.manifest import DataError, read_manifest

        if self.run is None:
            return None
        try:
            manifest = read_manifest(Path(load_run_recipe(self.run).data.test_file))
        except DataError:
            return None
        provenance = Provenance.read_if_there(RunFolder(self.run).provenance)
        hashes = (provenance and provenance.data_sha256) or {}
        return manifest if manifest.sha256 == hashes.get("data.test_file", manifest.sha256) else None


def load_network(
    run: str | Path,
    keep_fraction: float | str | Decimal | None = None,
    *,
    method: str | None = None,
    stage: str | None = None,
) -> LoadedNetwork:
    """The network of a finished stage, on the CPU and in eval mode.

    Maps images [n, 3, height, width], float32 in [0, 1] and of size data.image_size, to logits [n, num_classes]:
    normalisation is built in, and pruned connections are zeros in place. `preprocess` prepares such images.

    `run` is a run's folder, or one model.safetensors, which takes no further arguments. In a run, `keep_fraction` is
    one of the recipe's, or 1 for the dense network; it may be omitted if the other arguments leave only one. `method`
    (its label in the recipe, such as magnitude or hydra-erk; default hydra) and `stage`, the last part of the stage's
    name, select among the networks of one keep_fraction: HYDRA's is finetune, if the recipe has that phase, else prune.

    Errors: ValueError for a missing, unfinished or damaged run, network or file; the message lists what is available.
    """
    path = Path(run)
    if path.suffix == ".safetensors":
        arguments = {"keep_fraction": keep_fraction, "method": method, "stage": stage}
        if extra := [key for key, value in arguments.items() if value is not None]:
            raise ValueError(f"{path} is one network; omit {extra[0]}, or give the run's folder")
        return LoadedNetwork(path)
    if not RunFolder(path).recipe.is_file():
        raise ValueError(f"{path} is not a run (it has no recipe.yaml); give its folder, such as runs/demo, or a file")
    selected_stage = _select_stage(path, stages_of(load_run_recipe(path)), keep_fraction, method, stage)
    folder = path / selected_stage.name
    if not StageFolder(folder).result.is_file():
        raise ValueError(f"{folder} is not finished; python -m launch resume {path}")
    network = LoadedNetwork(StageFolder(folder).network)
    if sha256_of(StageFolder(folder).network) != StageResult.read(StageFolder(folder).result).model_sha256:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the network that the stage exported (its sha256 differs from "
            "result.json); restore that file, or load this one by its path"
        )
    return network


def _select_stage(
    run: Path, stages: list[Stage], keep_fraction: float | str | Decimal | None, method: str | None, phase: str | None
) -> Stage:
    if keep_fraction is not None:
        stages = _filter_stages(str(run), "keep_fraction", _canonical(keep_fraction), stages, _keep_fraction)
    if method is not None:
        stages = _filter_stages(str(run), "method", method.lower(), stages, lambda s: s.label)
    if phase is not None:
        stages = _filter_stages(str(run), "stage", phase, stages, lambda s: s.phase)
    if len(keeps := _distinct_names(stages, _keep_fraction)) > 1:
        raise ValueError(f"{run} has several networks; give keep_fraction, one of {', '.join(keeps)} (1 is dense)")
    return next((s for s in reversed(stages) if s.label == "hydra"), stages[-1])


def _filter_stages(run: str, key: str, value: str, stages: list[Stage], name: Callable[[Stage], str]) -> list[Stage]:
    """The stages whose `name` is `value`."""
    matches = [stage for stage in stages if name(stage) == value]
    if not matches:
        keeps = _distinct_names(stages, _keep_fraction)
        where = f" at keep_fraction {keeps[0]}" if len(keeps) == 1 else ""
        raise ValueError(f"{run} has no {key} {value}{where}; there is {', '.join(_distinct_names(stages, name))}")
    return matches


def _distinct_names(stages: list[Stage], name: Callable[[Stage], str]) -> list[str]:
    return list(dict.fromkeys(map(name, stages)))


def _keep_fraction(stage: Stage) -> str:
    return canonical_decimal(DENSE if stage.keep_fraction is None else stage.keep_fraction)


def _canonical(keep_fraction: float | str | Decimal) -> str:
    """Spelling of the recipe: 0.10 and 1e-1 are both 0.1."""
    try:
        return canonical_decimal(Decimal(str(keep_fraction)))
    except InvalidOperation:
        return str(keep_fraction)
