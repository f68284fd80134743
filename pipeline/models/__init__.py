"""Networks: the paper's, small ones for verification, torchvision's; each with its normalisation inside."""

from pipeline.models.network import Network, build_network, check_size

__all__ = ["Network", "build_network", "check_size"]
