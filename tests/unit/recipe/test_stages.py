"""Which stages a recipe has, what each starts from, and where its epochs are counted from."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe.file import deciding_values, dump_recipe, load_recipe, recipe_hash
from pipeline.recipe.flat_objective import to_flat
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, Trial, stages_of
from pipeline.run.layout import StageFolder, is_done, unevaluated

DEMO = Path(__file__).parents[3] / "recipes" / "fashion_mnist.yaml"
PHASES = [
    "phases.pretrain={epochs: 7, lr: 0.3}",
    "phases.prune={epochs: 3, lr: 0.2}",
    "phases.finetune={epochs: 5, lr: 0.1, weight_decay: 0.001}",
]


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(DEMO, [*PHASES, "sparsity.keep_fractions=[0.10, 1e-2]", *overrides])


def by_name(recipe: Recipe) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(recipe)}


def test_every_stage_follows_the_one_it_starts_from() -> None:
    stages = by_name(recipe_with())
    kinds = ("prune", "finetune", "magnitude")
    assert list(stages) == ["pretrain", *(f"keep-{k}/{kind}" for k in ("0.1", "0.01") for kind in kinds)]
    seen: set[str | None] = {None}
    for stage in stages.values():
        assert stage.starts_from in seen
        seen.add(stage.name)


def test_what_each_stage_trains_and_starts_from() -> None:
    stages = by_name(recipe_with())
    facts = {name: (s.phase, s.trains, s.starts_from, s.scores_from, s.measure) for name, s in stages.items()}
    assert facts["pretrain"] == ("pretrain", "weights", None, "none", "pgd")
    assert facts["keep-0.1/prune"] == ("prune", "scores", "pretrain", "scaled", None)
    assert facts["keep-0.1/finetune"] == ("finetune", "weights", "keep-0.1/prune", "source", "pgd")
    assert facts["keep-0.1/magnitude"] == ("magnitude", "weights", "pretrain", "scaled", "pgd")
    assert facts["keep-0.01/finetune"][2] == "keep-0.01/prune"
    assert stages["pretrain"].keep_fraction is None
    assert {str(s.keep_fraction) for n, s in stages.items() if n.startswith("keep-0.01/")} == {"0.01"}


def test_finished_networks_have_additional_attacks() -> None:
    """But the dense network not by transfer, and networks that only the next stage uses not at all."""
    attacks = "evaluation.attacks=[{name: apgd, images: 9}, {name: transfer}, {name: pgd, steps: 50, restarts: 10}]"
    stages = by_name(recipe_with(attacks))
    assert stages["pretrain"].evaluations == ("pgd", "apgd", "pgd-50x10")
    assert stages["keep-0.1/finetune"].evaluations == ("pgd", "apgd", "transfer", "pgd-50x10")
    assert stages["keep-0.1/magnitude"].evaluations == stages["keep-0.1/finetune"].evaluations
    assert stages["keep-0.1/prune"].evaluations == ()


def test_a_stage_is_done_when_all_its_evaluations_are(tmp_path: Path) -> None:
    stage = by_name(recipe_with("evaluation.attacks=[{name: square}]"))["pretrain"]
    folder = tmp_path / "pretrain" / "evaluate"
    folder.mkdir(parents=True)
    (folder.parent / "result.json").touch()
    for name, left in (("pgd", ["square"]), ("square", [])):
        assert not is_done(tmp_path, stage)
        StageFolder(folder.parent).evaluation(name).touch()
        assert unevaluated(tmp_path, stage) == left
    assert is_done(tmp_path, stage)


def test_epoch_numbers_continue_those_of_the_source_stage() -> None:
    """So that no stage repeats the order and crops of a stage that it descends from."""
    stages = by_name(recipe_with())
    assert stages["pretrain"].first_epoch == 0
    for name in ("keep-0.1/finetune", "keep-0.01/magnitude"):
        stage = stages[name]
        while stage.starts_from is not None:
            source = stages[stage.starts_from]
            assert stage.first_epoch == source.first_epoch + source.optimisation.epochs
            stage = source


@pytest.mark.parametrize(("choice", "epochs"), [("same_total_epochs", 3 + 5), ("finetune_epochs", 5)])
def test_a_baseline_gets_hydras_epochs_or_the_papers(choice: str, epochs: int) -> None:
    recipe = recipe_with(f"sparsity.baseline_epochs={choice}", "sparsity.baselines=[magnitude, random]")
    for name in ("magnitude", "random"):
        baseline = by_name(recipe)[f"keep-0.1/{name}"].optimisation
        assert baseline.epochs == epochs
        assert baseline.model_copy(update={"epochs": 5}) == recipe.phases.finetune, "learning rate or weight decay"


def test_baselines_differ_in_their_scores_alone() -> None:
    recipe = recipe_with("sparsity.baselines=[snip, random, magnitude]")
    stages = {name: stage for name, stage in by_name(recipe).items() if stage.label not in ("dense", "hydra")}
    assert list(stages) == [f"keep-{k}/{name}" for k in ("0.1", "0.01") for name in ("snip", "random", "magnitude")]
    assert [stage.scores_from for stage in stages.values()] == 2 * ["snip", "random", "scaled"]
    first, *others = [
        replace(stage, name="any", phase="snip", method=None, scores_from="snip")
        for name, stage in stages.items()
        if "0.01" in name
    ]
    assert others == [first, first]
    assert (first.trains, first.starts_from, first.measure) == ("weights", "pretrain", "pgd")


def test_gradual_pruning_has_a_baselines_epochs_and_prunes_over_prunes_share() -> None:
    for choice, epochs in (("same_total_epochs", 3 + 5), ("finetune_epochs", 5)):
        baselines = "sparsity.baselines=[gradual, {name: gradual, allocation: erk}]"
        stages = by_name(recipe_with(f"sparsity.baseline_epochs={choice}", "sparsity.allocation=learned", baselines))
        own, erk = stages["keep-0.01/gradual"], stages["keep-0.01/gradual-erk"]
        assert (own.phase, own.trains, own.starts_from, own.scores_from) == ("gradual", "weights", "pretrain", "ones")
        assert (own.optimisation.epochs, own.section) == (epochs, "finetune")
        assert own.prune_share == Fraction(3, 3 + 5)
        assert (own.allocation, erk.allocation) == ("uniform", "erk"), "no shares are learned"
        assert (own.mask_source, erk.mask_source) == ("binary", "binary")
        assert (own.title, erk.title) == ("gradual", "gradual (ERK)")
    assert {stage.mask_source for stage in by_name(recipe_with()).values()} == {"uniform"}


@pytest.mark.parametrize("name", ["flying_bird", "flying_bird_plus"])
def test_flying_bird_needs_no_dense_network_and_has_hydras_epochs(name: str) -> None:
    """And not the objective of a pretrain phase that is clean, as in searches."""
    clean = [
        "phases.pretrain.objective={name: clean}",
        "phases.finetune.objective={name: trades, steps: 2, step_size: 1/15}",
    ]
    for choice in ("same_total_epochs", "finetune_epochs"):
        recipe = recipe_with(f"sparsity.baseline_epochs={choice}", f"sparsity.baselines=[{name}]", *clean)
        stage = by_name(recipe)[f"keep-0.01/{name}"]
        assert (stage.starts_from, stage.scores_from, stage.first_epoch) == (None, "random", 0)
        assert (stage.trains, stage.mask_source, stage.section) == ("weights", "binary", "pretrain")
        assert (stage.optimisation.epochs, stage.objective.name) == (7 + 3 + 5, "trades")
        assert stage.optimisation.lr == 0.3
        assert stage.measure == "pgd"


def test_hydra_with_another_allocation_has_stages_of_its_own() -> None:
    recipe = recipe_with("sparsity.baselines=[{name: hydra, allocation: erk}, {name: magnitude, allocation: global}]")
    stages = by_name(recipe)
    names = ["prune", "finetune", "hydra-erk/prune", "hydra-erk/finetune", "magnitude-global"]
    assert list(stages) == ["pretrain", *(f"keep-{keep}/{name}" for keep in ("0.1", "0.01") for name in names)]
    for part in ("prune", "finetune"):
        own, other = stages[f"keep-0.01/{part}"], stages[f"keep-0.01/hydra-erk/{part}"]
        assert (own.title, other.title, own.allocation, other.allocation) == ("HYDRA", "HYDRA (ERK)", "uniform", "erk")
        source = other.starts_from if part == "prune" else own.starts_from
        assert replace(other, name=own.name, method=own.method, allocation="uniform", starts_from=source) == own
    assert stages["keep-0.1/hydra-erk/finetune"].starts_from == "keep-0.1/hydra-erk/prune"
    assert stages["keep-0.1/magnitude-global"].title == "magnitude (global)"


def test_harp_and_s2ap_prune_and_finetune_as_hydra_does() -> None:
    stages = by_name(
        recipe_with("sparsity.baselines=[{name: hydra, allocation: harp}, s2ap, {name: s2ap, allocation: harp}]")
    )
    titles = {"hydra-harp": "HARP", "s2ap": "S2AP", "s2ap-harp": "S2AP (HARP)"}
    for label, title in titles.items():
        for part in ("prune", "finetune"):
            own, other = stages[f"keep-0.01/{part}"], stages[f"keep-0.01/{label}/{part}"]
            assert (other.title, other.label) == (title, label)
            assert other.allocation == ("harp" if "harp" in label else "uniform")
            source = other.starts_from if part == "prune" else own.starts_from
            assert replace(other, name=own.name, method=own.method, allocation="uniform", starts_from=source) == own
        assert stages[f"keep-0.01/{label}/finetune"].starts_from == f"keep-0.01/{label}/prune"


@pytest.mark.parametrize(
    ("objective", "extra"),
    [("name: pgd, step_size: 1/20", 1), ("name: trades, step_size: 1/20", 2), ("name: clean", 1)],
)
def test_s2ap_repeats_the_passes_of_an_update_while_scores_train(objective: str, extra: int) -> None:
    stages = by_name(recipe_with("sparsity.baselines=[s2ap]", f"objective={{{objective}}}"))
    passes = {name: stage.extra_passes for name, stage in stages.items() if stage.extra_passes}
    assert passes == {f"keep-{keep}/s2ap/prune": extra for keep in ("0.1", "0.01")}


def test_methods_without_a_further_key_are_written_as_their_name() -> None:
    """As in recipes from before there were others, so that their hashes stay valid."""
    written = [{"name": "magnitude"}, "snip", {"name": "hydra", "allocation": "erk"}]
    values = to_flat(recipe_with(f"sparsity.baselines={written}").model_dump(mode="json"))
    assert values["sparsity"]["baselines"] == ["magnitude", "snip", {"name": "hydra", "allocation": "erk"}]


def test_a_structure_changes_the_hash_and_its_default_does_not() -> None:
    """Recipes from before there were structures keep their hashes."""
    other = "{name: hydra, allocation: erk}", "{name: hydra, allocation: erk, structure: 1x4}"
    plain = recipe_with(f"sparsity.baselines=[{other[0]}, magnitude]")
    assert "structure" not in str(to_flat(deciding_values(plain)))
    hashes = {
        recipe_hash(recipe_with(f"sparsity.baselines=[{baseline}, magnitude]", f"sparsity.structure={structure}"))
        for baseline in other
        for structure in ("unstructured", "4x1")
    }
    assert len(hashes) == 4
    assert recipe_hash(plain) in hashes


def test_a_structure_is_written_so_that_every_reader_of_yaml_takes_it_as_text() -> None:
    """2:4 is 124 in YAML 1.1, in which numbers may be in base 60."""
    recipe = recipe_with("sparsity.structure=2:4", "sparsity.keep_fractions=[0.5]")
    assert yaml.safe_load(dump_recipe(recipe))["sparsity"]["structure"] == "2:4"


def test_structures_have_stages_of_their_own_where_they_have_the_sparsity() -> None:
    methods = [
        "{name: hydra, structure: 2:4}",
        "{name: hydra, structure: 1x4, allocation: erk}",
        "{name: snip, structure: 1:4}",
    ]
    fractions = "sparsity.keep_fractions=[0.5, 0.25]"
    stages = by_name(recipe_with(f"sparsity.baselines=[{', '.join(methods)}]", fractions))
    half = [
        "prune",
        "finetune",
        "hydra-2of4/prune",
        "hydra-2of4/finetune",
        "hydra-erk-1x4/prune",
        "hydra-erk-1x4/finetune",
    ]
    quarter = [*half[:2], *half[4:], "snip-1of4"]
    assert list(stages) == ["pretrain", *(f"keep-0.5/{n}" for n in half), *(f"keep-0.25/{n}" for n in quarter)]
    own, other = stages["keep-0.5/finetune"], stages["keep-0.5/hydra-2of4/finetune"]
    assert (own.structure, other.structure, other.title) == ("unstructured", "2:4", "HYDRA (2:4)")
    changed = {"name": own.name, "method": own.method, "structure": own.structure, "starts_from": own.starts_from}
    assert replace(other, **changed) == own
    assert stages["keep-0.25/hydra-erk-1x4/prune"].title == "HYDRA (ERK, 1x4)"
    assert (stages["keep-0.25/snip-1of4"].structure, stages["keep-0.25/snip-1of4"].title) == ("1:4", "SNIP (1:4)")


def test_baselines_have_the_recipes_structure_or_their_own() -> None:
    baselines = (
        "sparsity.baselines=[magnitude, {name: gradual, structure: unstructured}, {name: hydra, allocation: harp}]"
    )
    stages = by_name(recipe_with("sparsity.structure=16x16", baselines))
    structures = {stage.label: stage.structure for stage in stages.values() if stage.keep_fraction}
    expected = {"hydra": "16x16", "magnitude": "16x16", "gradual-unstructured": "unstructured", "hydra-harp": "16x16"}
    assert structures == expected


def test_score_init_applies_to_the_prune_phase_alone() -> None:
    stages = by_name(recipe_with("sparsity.score_init=xavier_normal"))
    assert stages["keep-0.1/prune"].scores_from == "xavier_normal"
    assert stages["keep-0.1/magnitude"].scores_from == "scaled"


def test_no_baseline() -> None:
    names = list(by_name(recipe_with("sparsity.baselines=[]")))
    assert names == ["pretrain", *(f"keep-{k}/{kind}" for k in ("0.1", "0.01") for kind in ("prune", "finetune"))]


def test_a_search_evaluates_the_pruned_network_of_a_clean_one() -> None:
    search = ["phases.finetune=null", "sparsity.baselines=[]"]
    stages = by_name(recipe_with(*search, "phases.pretrain.objective={name: clean}"))
    assert list(stages) == ["pretrain", "keep-0.1/prune", "keep-0.01/prune"]
    assert {stage.measure for stage in stages.values()} == {"pgd"}
    assert [stage.objective.name for stage in stages.values()] == ["clean", "pgd", "pgd"]


def test_contents_of_stage_json() -> None:
    stages = by_name(recipe_with())
    expected: dict[str, Any] = {"stage": "keep-0.01/prune", "phase": "prune", "keep_fraction": "0.01"}
    assert stages["keep-0.01/prune"].describe(11) == {**expected, "total_steps": 33, "steps_per_epoch": 11}
    assert stages["pretrain"].describe(2)["keep_fraction"] is None


def test_every_method_has_the_same_number_of_trials_and_a_stage_that_chooses() -> None:
    baselines = "sparsity.baselines=[magnitude, {name: hydra, allocation: erk}]"
    tune = "sparsity.tune={finetune_lr: [0.05, 0.1, 0.2]}"
    plain, stages = by_name(recipe_with(baselines)), by_name(recipe_with(baselines, tune))
    assert plain.keys() < stages.keys()
    lasts = {name: stage for name, stage in stages.items() if stage.trials}
    ends = ("finetune", "magnitude", "hydra-erk/finetune")
    assert list(lasts) == [f"keep-{keep}/{end}" for keep in ("0.1", "0.01") for end in ends]
    seen: set[str] = set()
    for stage in stages.values():
        assert seen.issuperset(stage.sources), "trained before"
        seen.add(stage.name)
    for name, last in lasts.items():
        folder, _, end = name.rpartition("/")
        names = [f"{folder}/trial-{number}/{end}" for number in (1, 2, 3)]
        assert [trial.stage for trial in last.trials] == names
        assert last == replace(plain[name], starts_from=None, trials=last.trials)
        assert (last.epochs, last.sources) == (0, tuple(names))
        for lr, trial in zip((0.05, 0.1, 0.2), names, strict=True):
            stage, optimisation = stages[trial], plain[name].optimisation.model_copy(update={"lr": lr})
            expected = replace(plain[name], name=trial, optimisation=optimisation, trial_of=name)
            assert stage == replace(expected, measure=None, attacks=()), "but for its learning rate, the usual stage"
            assert stage.random_key == name
            assert stage.epochs == plain[name].epochs
    assert {trial.prune_lr for trial in lasts["keep-0.1/finetune"].trials} == {0.2}, "phases.prune.lr"
    assert {trial.prune_lr for trial in lasts["keep-0.1/magnitude"].trials} == {None}
    assert stages["keep-0.1/prune"] == plain["keep-0.1/prune"], "shared by all trials"


def test_trials_with_the_same_rate_of_the_prune_phase_share_it() -> None:
    stages = by_name(recipe_with("sparsity.tune={finetune_lr: [0.01, 0.03, 0.1], prune_lr: [0.2, 0.3, 0.2]}"))
    names = ["trial-1/prune", "trial-2/prune", *(f"trial-{n}/finetune" for n in (1, 2, 3)), "finetune"]
    names += [*(f"trial-{n}/magnitude" for n in (1, 2, 3)), "magnitude"]
    assert list(stages) == ["pretrain", *(f"keep-{keep}/{name}" for keep in ("0.1", "0.01") for name in names)]
    sources = {number: stages[f"keep-0.1/trial-{number}/finetune"].starts_from for number in (1, 2, 3)}
    assert sources == {n: f"keep-0.1/trial-{source}/prune" for n, source in ((1, 1), (2, 2), (3, 1))}
    prunes = [stages[f"keep-0.1/trial-{number}/prune"] for number in (1, 2)]
    assert [(stage.optimisation.lr, stage.random_key) for stage in prunes] == [
        (0.2, "keep-0.1/prune"),
        (0.3, "keep-0.1/prune"),
    ]
    assert stages["keep-0.1/finetune"].trials[1] == Trial("keep-0.1/trial-2/finetune", 0.03, 0.3)
    assert stages["keep-0.1/magnitude"].trials[1] == Trial("keep-0.1/trial-2/magnitude", 0.03, None)


def test_only_the_chosen_networks_are_evaluated_on_the_test_set() -> None:
    attacks = "evaluation.attacks=[{name: apgd}]"
    tune = "sparsity.tune={finetune_lr: [0.01, 0.1], prune_lr: [0.2, 0.3]}"
    plain, stages = by_name(recipe_with(attacks)), by_name(recipe_with(attacks, tune))
    evaluated = {name: stage.evaluations for name, stage in stages.items() if stage.evaluations}
    assert evaluated == {name: stage.evaluations for name, stage in plain.items() if stage.evaluations}
