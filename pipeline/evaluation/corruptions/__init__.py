"""Common corruptions (ImageNet-C) as a measure."""
