"""Where pictures come from, a file for each kind of source. They find samples, and decode none. No torch.

folder.py    a folder of files, and by mirror.py one behind a URL
shards.py    WebDataset tars, whose members tars.py finds
dataset.py   tables, which tables.py opens and reads; stream.py keeps the first pictures of a stream
"""

from __future__ import annotations

from pathlib import Path

from finetune.config.schema import ConceptConfig
from finetune.data.origins import dataset, folder, shards
from finetune.data.origins.samples import Finds, Sample

__all__ = ["Finds", "Sample", "find"]


def find(config: ConceptConfig, where: str, cache: Path) -> Finds:
    """The samples of a concept.

    Args:
        where: the concept is in the recipe, for messages.
        cache: remote files and indexes are kept below it.

    Raises:
        UserError: the source cannot be read at all, or holds no pictures.
    """
    if config.dataset is not None:
        return dataset.find(config.dataset, config, where, cache)
    if config.shards is not None:
        return shards.find(config, where, cache)
    return folder.find(config, where, cache)
