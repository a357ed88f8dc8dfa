"""A LoRA of the difference of two models, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune import __version__
from finetune.config.schema import ModelConfig
from finetune.errors import GuardError, UserError
from finetune.export.full import weight_files
from finetune.export.layers import Layer
from finetune.export.metadata import OWN
from finetune.export.stream import shapes, tensors
from finetune.export.tools.lowrank import Rule, cut, total_kept
from finetune.export.tools.save import number_type, require_adapter_file, save
from finetune.export.tools.source import groups
from finetune.family import ModelFamily

_TABLES = ("embedding", "embeddings", "embed_tokens", "shared")  # matrices that are looked up and not multiplied


@dataclass(frozen=True)
class Extracted:
    """What was written.

    Attributes:
        ranks: by the names of layers.
        kept: share of the squares of these layers' differences.
        left: names of weights that differ and that a LoRA has no place for: biases, norms, tables.
    """

    path: Path
    ranks: dict[str, int]
    kept: float
    left: list[str]


def extract(
    tuned: str, base: str, out: Path, rule: Rule, *, to: str = "diffusers", dtype: str = "float32"
) -> Extracted:
    """Write what turns ``base`` into ``tuned``, of its linear and convolution layers, as a LoRA.

    Args:
        tuned, base: as in a recipe's ``model.path``, of one architecture.
        rule: the ranks; of a layer of full rank the fraction that is kept is what a LoRA of that rank can hold.
        to: "diffusers" or "kohya".

    Raises:
        UserError: the models are of different architectures or sizes, or do not differ.
        GuardError: a difference is not finite.
    """
    from finetune.families import load_family

    require_adapter_file(out)
    families = [load_family(ModelConfig(path=path)) for path in (tuned, base)]
    if families[0].name != families[1].name:
        raise UserError(f"{tuned} is of family {families[0].name}, {base} of {families[1].name}")
    after, before = (_Model(family) for family in families)
    names = families[1].export_names
    if strange := sorted(after.shapes.items() ^ before.shapes.items()):
        name = strange[0][0]
        said = [str(list(model.shapes[name])) if name in model.shapes else "nothing" for model in (after, before)]
        raise UserError(f"{name} is {said[0]} in {tuned} and {said[1]} in {base}; they are of different sizes")
    layers = [name for name in before.shapes if _low_rank(name, before.shapes[name])]
    left = [name for name in sorted(before.shapes.keys() - set(layers)) if not torch.equal(after[name], before[name])]
    ranks: dict[str, int] = {}
    kept: list[tuple[float, float]] = []

    def blocks() -> Iterator[list[Layer]]:
        for block in groups(layers):
            made = []
            for name in block:
                difference = after[name].float() - before[name].float()
                if not bool(torch.isfinite(difference).all()):
                    raise GuardError(f"{name}: the difference holds numbers that are NaN or infinite")
                if not bool(difference.any()):
                    continue
                network, _, module = name.removesuffix(".weight").partition(".")
                found = cut(network, module, difference, rule)
                ranks[found.layer.name] = found.layer.rank
                kept.append((found.kept, found.squares))
                made.append(found.layer)
            yield made

    header = _header(families[1], base, tuned, rule)
    alpha = float(rule.rank or 1)
    save(out, to, (block for block in blocks() if block), names, number_type(dtype), header, alpha)
    return Extracted(out, ranks, total_kept(kept), left)


class _Model(Mapping[str, Tensor]):
    """The weights of a family's networks on disk by canonical name, each read when it is asked for."""

    def __init__(self, family: ModelFamily) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for network, called in family.export_names.items():
            for file in weight_files(family.folder / called.diffusers):
                for key, (dtype, shape) in shapes(file).items():
                    if dtype.is_floating_point:
                        name = f"{network}.{key.removeprefix(called.missing_level)}"
                        self._places[name], self.shapes[name] = (file, key), tuple(shape)

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        return tensors(file, [key])[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _low_rank(name: str, shape: tuple[int, ...]) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and len(shape) in (2, 4) and not module.endswith(_TABLES)


def _header(family: ModelFamily, base: str, tuned: str, rule: Rule) -> dict[str, str]:
    architecture = family.published.architecture
    return {
        f"{OWN}version": __version__,
        f"{OWN}family": family.name,
        f"{OWN}base": base,
        f"{OWN}recipe": "extract",
        f"{OWN}settings": json.dumps({"tuned": tuned, "ranks": str(rule)}, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": Path(tuned).name,
        **({"ss_base_model_version": family.published.version} if family.published.version else {}),
    }
