"""What a denoiser can be asked, and exact conversions between the answers.

A noisy latent is ``x = a x0 + s eps``. With ``a^2 + s^2 = 1``, as in discrete-time diffusion, v is the direction at a
right angle to it (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, appendix D); flow matching has ``a + s = 1``.

=================  ===========  ==================  ====================
prediction         is           the picture x0      the noise eps
=================  ===========  ==================  ====================
epsilon            eps          (x - s eps) / a     itself
v_prediction       a eps - s x0 a x - s v           s x + a v
sample             x0           itself              (x - a x0) / s
flow_prediction    eps - x0     (x - s u) / (a + s) (x + a u) / (a + s)
=================  ===========  ==================  ====================
"""

from __future__ import annotations

from torch import Tensor

from finetune.objective import Prediction


def target(prediction: Prediction, clean: Tensor, noise: Tensor, signal: Tensor, spoiled: Tensor) -> Tensor:
    """What should be answered. ``signal`` (a) and ``spoiled`` (s) are shaped to multiply ``clean`` [B, ...]."""
    match prediction:
        case "epsilon":
            return noise
        case "v_prediction":
            return signal * noise - spoiled * clean
        case "sample":
            return clean
        case "flow_prediction":
            return noise - clean


def picture(prediction: Prediction, answer: Tensor, noisy: Tensor, signal: Tensor, spoiled: Tensor) -> Tensor:
    """The x0 that an answer implies."""
    match prediction:
        case "epsilon":
            return (noisy - spoiled * answer) / signal
        case "v_prediction":
            return signal * noisy - spoiled * answer
        case "sample":
            return answer
        case "flow_prediction":
            return (noisy - spoiled * answer) / (signal + spoiled)


def noise(prediction: Prediction, answer: Tensor, noisy: Tensor, signal: Tensor, spoiled: Tensor) -> Tensor:
    """The eps that an answer implies."""
    match prediction:
        case "epsilon":
            return answer
        case "v_prediction":
            return spoiled * noisy + signal * answer
        case "sample":
            return (noisy - signal * answer) / spoiled
        case "flow_prediction":
            return (noisy + signal * answer) / (signal + spoiled)


def converted(
    answer: Tensor, given: Prediction, wanted: Prediction, noisy: Tensor, signal: Tensor, spoiled: Tensor
) -> Tensor:
    """The answer ``given`` as the answer ``wanted``: both imply the same x0 and eps."""
    if given == wanted:
        return answer
    clean, eps = (imply(given, answer, noisy, signal, spoiled) for imply in (picture, noise))
    return target(wanted, clean, eps, signal, spoiled)
