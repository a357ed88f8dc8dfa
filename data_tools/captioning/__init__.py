"""Captions for pictures, written by models that look at them; ranked and scored by models that compare."""
