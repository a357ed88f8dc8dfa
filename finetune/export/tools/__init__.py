"""Adapters after training: convert, merge, extract, resize, prune. One layer is in memory at a time."""
