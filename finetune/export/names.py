"""What kohya's files call layers: the network's prefix and the module's path as one word, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from finetune.family import ExportNames
from finetune.originals import Place

# words of module paths that contain an underscore themselves, longest first where one begins another
_WORDS = (
    "transformer_blocks",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "time_emb_proj",
    "time_embedding",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
    "proj_in",
    "proj_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "text_model",
    "text_projection",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "wi_0",
    "wi_1",
)
_PARTS = re.compile("|".join((*(rf"{word}(?=_|$)" for word in _WORDS), r"[^_]+")))


def joined(path: str) -> str:
    """A module path as one word: every dot becomes an underscore.

    Raises:
        ValueError: the path could not be read back from it.
    """
    word = path.replace(".", "_")
    if parted(word) != path:
        raise ValueError(f"module {path} has no underscored name that can be read back")
    return word


def parted(word: str) -> str:
    """The module path that ``joined`` made ``word`` of."""
    return ".".join(_PARTS.findall(word))


class Stems:
    """What stands before the dot in a network's keys, both ways."""

    def __init__(self, called: ExportNames) -> None:
        self._called = called
        self._own = {module.replace(".", "_"): module for module in called.places}
        self._originals: dict[str, dict[str, Place]] = {}
        for module, place in called.places.items():
            self._originals.setdefault(place.path.replace(".", "_"), {})[module] = place

    def of(self, module: str) -> tuple[str, Place]:
        """The stem under which a layer is written, and where in the tensors there.

        Raises:
            ValueError: it has no name that could be read back.
        """
        if not self._called.places:
            path = self._called.missing_level + module
            return f"{self._called.kohya}_{joined(path)}", Place(path)
        if module not in self._called.places:
            raise ValueError(f"module {module} has no name in the code that the model was published with")
        place = self._called.places[module]
        return f"{self._called.kohya}_{place.path.replace('.', '_')}", place

    def layers(self, stem: str) -> Mapping[str, Place]:
        """The layers that a stem means and where in its tensors they are: under the names that are written, or
        diffusers' own.
        """
        word = stem.removeprefix(f"{self._called.kohya}_")
        if word in self._originals:
            return self._originals[word]
        path = self._own.get(word) or parted(word)
        return {path.removeprefix(self._called.missing_level): Place(path)}


def network_of(stem: str, names: Mapping[str, ExportNames]) -> str | None:
    """The network that a stem is about."""
    return next((network for network, called in names.items() if stem.startswith(f"{called.kohya}_")), None)


def expected_stem(names: Mapping[str, ExportNames]) -> str:
    """What stems look like, for messages."""
    return f"<{'|'.join(sorted(called.kohya for called in names.values()))}>_<module>"


def fuses(names: Mapping[str, ExportNames]) -> bool:
    """Whether kohya's files have layers of a family together that diffusers has apart."""
    return any(place.of > 1 for called in names.values() for place in called.places.values())
