"""Hypernetworks as in A1111's web UI: small networks before the key and value layers of attention.

An attention layer that reads ``c`` computes ``k = to_k(c + m F_k(c))`` and ``v = to_v(c + m F_v(c))``. There is one
pair ``F_k, F_v`` for each width of ``c``, shared by all layers that read this width, self-attention included.
"""

from finetune.hypernet.hooks import attach, widths
from finetune.hypernet.network import ACTIVATIONS, REFUSED, ROLES, Hypernetwork, Structure, initialise

__all__ = ["ACTIVATIONS", "REFUSED", "ROLES", "Hypernetwork", "Structure", "attach", "initialise", "widths"]
