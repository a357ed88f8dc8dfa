"""What families have in common whose denoiser reads prompt and picture as one sequence, after blocks that refine each
alone (Qin et al. 2025, https://arxiv.org/abs/2503.21758): Lumina 2, Z-Image.
"""

from __future__ import annotations

from finetune.families import patterns

BLOCK = r"(noise_refiner|context_refiner|layers)\.\d+"


def linears(attention: str, feed_forward: str, modulation: str) -> patterns.Patterns:
    """``Sites.linears`` of such a transformer.

    Args:
        attention: what its attention is called within a block.
        feed_forward: pattern of a block's layers of that name.
        modulation: pattern of the whole names of layers that time goes through.
    """
    inner = [rf"{BLOCK}\.{attention}\.to_(q|k|v|out\.0)"]
    wide = [*inner, rf"{BLOCK}\.{feed_forward}"]
    return patterns.linears({"attention": inner, "wide": wide, "blocks": [*wide, modulation]}, clips=(), wide=())


def selections(attention: str) -> patterns.Patterns:
    """``Sites.selections`` of such a transformer."""
    transformer = {
        "all": [""],
        "attention": [rf"\.{attention}\."],
        "norm-bias": patterns.NORMS,
        "blocks": [rf"^{BLOCK}\."],
    }
    return patterns.selections(transformer, clips=())
