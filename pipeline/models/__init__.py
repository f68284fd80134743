"""Networks: the paper's architectures, small ones for verification, and torchvision's. Normalisation is built in."""

from pipeline.models.network import Network, build_network, check_micro_batch, check_size, head_names

__all__ = ["Network", "build_network", "check_micro_batch", "check_size", "head_names"]
