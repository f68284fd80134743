"""Measures: one verdict per image, from one attack, certificate or proof."""
