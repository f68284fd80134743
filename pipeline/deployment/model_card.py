"""README.md of an exported folder: a model card in the format of Hugging Face, made from card.json alone."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.deployment.card import Card
from pipeline.deployment.formats import CHECK_IMAGES, FILES, VERDICTS, Format
from pipeline.evaluation.result import Accuracy
from pipeline.run.layout import CARD
from pipeline.run.printable import printable_line

TITLES: dict[Format, str] = {"onnx": "ONNX, float32", "onnx-int8": "ONNX, int8", "torch": "torch.export program"}

USAGE = """\
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
network = json.loads(session.get_modelmeta().custom_metadata_map["network"])
images = np.load("{check}")["images"].astype(np.float32) / 255  # [n, 3, {size}, {size}], float32 in [0, 1]
(logits,) = session.run(["logits"], {{"images": images}})  # [n, {classes}]
for label in logits.argmax(axis=1):
    print(network.get("class_names", range({classes}))[label])
"""


def model_card(card: Card) -> str:
    """The text of README.md."""
    sections = (_front_matter, _head, _files, _usage, _training, _robustness, _speed, _limits)
    return "\n\n".join(text for section in sections if (text := section(card))) + "\n"


def _text(value: object) -> str:
    """A name inside Markdown: no markup, no line break."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable_line(str(value)))


def _accuracy(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.value:.1f} % ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})"


def _name(card: Card) -> str:
    """HYDRA small_cnn, 99 % pruned"""
    method = card.training.method if card.training else "network"
    keep = float(card.network.get("keep_fraction") or 1)
    pruned = f", {100 * (1 - keep):g} % pruned" if keep < 1 else ""
    return f"{method}, {card.network['arch']}{pruned}"


def _front_matter(card: Card) -> str:
    """YAML; every value is JSON, which YAML includes."""
    values: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "pruning", *(file.format for file in card.files)],
        "metrics": ["accuracy"],
    }
    if card.training:
        values["datasets"] = [card.training.dataset]
    if card.attack and card.training:
        measured = {"clean accuracy": card.attack.clean_accuracy, "robust accuracy": card.attack.robust_accuracy}
        metrics = [{"type": "accuracy", "name": name, "value": a.value} for name, a in measured.items()]
        dataset = {"name": card.training.dataset, "type": card.training.dataset, "split": "test"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": metrics}
        values["model-index"] = [{"name": _name(card), "results": [result]}]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _head(card: Card) -> str:
    threat = card.training.threat_model if card.training else None
    ball = f", trained to withstand any change of an image up to {threat} (pixels in [0, 1])" if threat else ""
    if card.attack is None:
        stamp = "**Not stamped**: these files were not attacked, so how robust they are is not known."
    elif card.attack.doubts:
        stamp = "**Not stamped**:\n\n" + "\n".join(f"- {_text(doubt)}" for doubt in card.attack.doubts)
    else:
        stamp = "**Stamped**: the file itself was attacked, and nothing speaks against the accuracies below."
    return f"# {_text(_name(card))}\n\nAn image classifier{ball}.\n\n{stamp}"


def _files(card: Card) -> str:
    rows = [f"| {file.name} | {TITLES[file.format]} | {file.size:,} | {file.compressed:,} |" for file in card.files]
    return "\n".join(
        [
            "## Files",
            "",
            "| file | format | bytes | bytes of its .gz |",
            "|---|---|---|---|",
            *rows,
            "",
            f"`{CARD}` has their hashes and all numbers of this page. `python -m launch verify FOLDER` checks them, "
            f"and the answers to the images of `{CHECK_IMAGES}`, on another machine.",
        ]
    )


def _usage(card: Card) -> str:
    formats = [file.format for file in card.files]
    if "onnx-int8" not in formats and "onnx" not in formats:
        return (
            "## Use\n\n```python\nimport torch\n\n"
            f'network = torch.export.load("{FILES["torch"]}").module()\n'
            "logits = network(images)  # float32 [n, 3, height, width] in [0, 1]\n```"
        )
    file = FILES["onnx-int8" if "onnx-int8" in formats else "onnx"]
    size, classes = card.image_size, card.network["num_classes"]
    return f"## Use\n\n```python\n{USAGE.format(file=file, check=CHECK_IMAGES, size=size, classes=classes)}```"


def _training(card: Card) -> str:
    training = card.training
    if training is None:
        return "## Training\n\nNot known: the network was exported outside its run."
    data = [f"- {_text(key)}: sha256 `{_text(value)}`" for key, value in training.data_sha256.items()]
    commit = [f"- commit of the project: `{_text(training.commit)}`"] if training.commit else []
    return "\n".join(
        [
            "## Training",
            "",
            f"- run {_text(training.run)}: {_text(training.method)} on {_text(training.dataset)}, objective "
            f"{_text(training.objective)}",
            f"- recipe: sha256 `{_text(training.recipe_sha256)}`",
            f"- network (`model.safetensors`): sha256 `{_text(card.model_sha256)}`",
            *data,
            *commit,
        ]
    )


def _robustness(card: Card) -> str:
    lines = ["## Accuracy", "", "On test images, with 95 % intervals.", ""]
    if (attack := card.attack) is not None:
        file = card.file(attack.file_sha256)
        accuracies = {
            file.name if file else "file": (attack.clean_accuracy, attack.robust_accuracy),
            "the float32 network": (attack.network_clean_accuracy, attack.network_robust_accuracy),
        }
        broken = ", ".join(f"{name} {count}" for name, count in (attack.broken_by or {}).items())
        lines += [
            f"| {attack.images:,} images | clean | robust |",
            "|---|---|---|",
            *(f"| {name} | {_accuracy(clean)} | {_accuracy(robust)} |" for name, (clean, robust) in accuracies.items()),
            f"| difference | {_difference(attack.clean_comparison)} | {_difference(attack.robust_comparison)} |",
            "",
            f"Robust: {_text(attack.title)}. An image counts if the file, run by ONNX Runtime, is right on the clean "
            "image and on every adversarial one; the network is shown the same ones. p: McNemar's exact test. "
            f"`{VERDICTS}` has the verdict of each image.",
            "",
            f"First broken by: {broken}.",
            "",
        ]
    if (evaluation := card.evaluation) is not None:
        lines += [
            f"The float32 network in its run, {evaluation.images:,} images: clean "
            f"{_accuracy(evaluation.clean_accuracy)}, robust {_accuracy(evaluation.robust_accuracy)} "
            f"({_text(evaluation.title)}).",
            "",
        ]
        if evaluation.honesty is not None:
            lines += ["Honesty checks of the network:", ""]
            lines += [f"- {_text(c.name)}: {c.status} ({_text(c.figure)})" for c in evaluation.honesty.checks]
    if len(lines) == 4:
        lines = [*lines[:2], "Not measured."]
    return "\n".join(lines).rstrip()


def _difference(comparison: Any) -> str:
    low, high = 100 * comparison.low, 100 * comparison.high
    return f"{100 * comparison.difference:+.1f} ({low:+.1f} to {high:+.1f}), p = {comparison.p_value:.2g}"


def _speed(card: Card) -> str:
    if not card.speeds:
        return ""
    rows = [f"| {_text(s.name)} | {s.milliseconds:.3g} | {s.times_as_fast:.3g} |" for s in card.speeds]
    machine = _text(card.speeds[0].machine)
    head = ["| | ms per image | times as fast |", "|---|---|---|"]
    return "\n".join(["## Speed", "", f"One image at a time, one thread, {machine}.", "", *head, *rows])


def _limits(card: Card) -> str:
    limits = [
        "Robust accuracy is an upper bound: a stronger attack may lower it.",
        "It holds for the threat model above only, not for other changes of images.",
        "Zeros make a compressed file small and no common runtime faster.",
    ]
    if any(file.format == "onnx-int8" for file in card.files):
        limits.append(
            "The int8 file is another classifier than the network. Processors without VNNI may sum its products in 16 "
            "bits and give other answers: run `verify` there."
        )
    if card.attack is not None and card.attack.settings.get("strength") == "reduced":
        limits.append("The attacks were run with reduced budgets; the standard ones break more images.")
    return "\n".join(["## Limits", "", *(f"- {limit}" for limit in limits)])
