"""Sound bounds of networks over Linf balls: interval bound propagation (IBP), CROWN-IBP and symbolic intervals.

graph = trace(network)                               # once
bounds = interval_bounds(graph, linf_box(images, eps))
bounds.interval_margins(labels)                      # IBP
bounds.linear_margins(labels)                        # CROWN-IBP
"""

from pipeline.robustness.bounds.graph import Graph, batch_statistics_of, trace
from pipeline.robustness.bounds.operations import Box
from pipeline.robustness.bounds.propagation import Bounds, interval_bounds, linf_box, proved, symbolic_bounds

__all__ = [
    "Bounds",
    "Box",
    "Graph",
    "batch_statistics_of",
    "interval_bounds",
    "linf_box",
    "proved",
    "symbolic_bounds",
    "trace",
]
