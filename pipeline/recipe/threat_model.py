"""The threat model of a recipe. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.recipe.fields import Pixels, Section


class ThreatModel(Section):
    """Norm and radius of the ball of allowed perturbations, in [0, 1] pixel units."""

    norm: Literal["linf", "l2"]
    eps: Pixels

    @model_validator(mode="after")
    def _eps_positive(self) -> ThreatModel:
        if self.eps <= 0:
            raise ValueError(f"eps {self.eps} must be positive; use objective={{name: clean}} to train without attack")
        if self.norm == "linf" and self.eps >= 1:
            raise ValueError(
                f"eps {self.eps} lets every pixel take any value; pixels are in [0, 1]: write 4/255, not 4"
            )
        return self
