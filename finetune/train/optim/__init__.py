"""Optimizers that no library which is needed anyway has, each from its paper."""
