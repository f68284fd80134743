"""Networks: torchvision's ResNets and a small CNN, each with its normalisation inside."""

from pipeline.models.network import Network, build_network

__all__ = ["Network", "build_network"]
