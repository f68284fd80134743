"""Measures: one verdict per image, from an attack, a certificate or a proof."""
