"""Read all of a cache in two processes and say what had to be made; run by test_shared_cache.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from finetune.config import read_recipe
from finetune.data import prepare
from finetune.distributed import start
from finetune.families import load_family
from finetune.files import write_json

recipe = read_recipe(Path(sys.argv[1]))
processes = start(recipe.train)
family = load_family(recipe.model)
batches = prepare(recipe, family, processes)
for entry in batches.entries:
    for flipped in (False, True):
        batches.latents.get(entry.picture, entry.crop, flipped)
taken = itertools.islice(batches, 10)
said = {
    "made": [batches.counts["latents_made"], batches.counts["prompts_made"]],
    "sums": [batch.posterior.mean.double().sum((1, 2, 3)).tolist() for batch in taken],
    "networks": sorted(family.networks),
}
write_json(Path(sys.argv[2]) / f"rank {processes.rank}.json", said)
