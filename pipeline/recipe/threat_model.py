"""What a network is to be robust against: the threat_model section of a recipe. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.recipe.fields import Pixels, Section


class ThreatModel(Section):
    """Norm and radius of the ball that an adversary may move an image in."""

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
