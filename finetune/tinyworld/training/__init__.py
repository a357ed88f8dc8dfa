"""How the shipped base and judge were trained: one module a stage, all on the loop of ``fit.py``."""
