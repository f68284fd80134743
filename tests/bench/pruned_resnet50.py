"""A ResNet-50 with random weights, and with the 1 % of each layer that is largest in magnitude, as files to benchmark.

python -m tests.bench.pruned_resnet50 FOLDER
python -m launch benchmark FOLDER/dense.safetensors FOLDER/pruned.safetensors
"""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path

from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state
from pipeline.recipe.sections import Model

KEEP, IMAGE_SIZE = Decimal("0.01"), 224


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    model = Model(arch="resnet50", num_classes=1000, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    network = build_network(model, seed=0, image_size=IMAGE_SIZE)
    write_model(folder / "dense.safetensors", effective_state(network), model, {"image_size": IMAGE_SIZE})
    Scores.attach(network, KEEP)
    write_model(folder / "pruned.safetensors", effective_state(network), model, {"image_size": IMAGE_SIZE})


if __name__ == "__main__":
    main()
