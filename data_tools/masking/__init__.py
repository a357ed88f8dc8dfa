"""Masks for pictures: ways to get one, what is done to its shape, the files, and a sheet to look at."""
