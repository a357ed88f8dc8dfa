"""Aesthetic embedding: what pictures have in common, towards which the text encoder is moved for each prompt.

    python recipes/aesthetic.py --config recipes/configs/aesthetic-tiny.yaml

For a mood or a look, made in seconds: nothing is trained. Drawing takes longer instead, because a copy of the text
encoder takes a few steps for every prompt. For a look that must be met exactly there is `recipes/lora.py`.

Gallego, "Personalizing Text-to-Image Generation via Aesthetic Gradients", 2022, https://arxiv.org/abs/2209.12330
"""

import torch
from torch.nn.functional import cosine_similarity

from finetune.aesthetic import Aesthetic, Baked, bake, mean_embedding, shared_space
from finetune.config import Recipe
from finetune.config.adapters import AestheticConfig
from finetune.config.command import run
from finetune.data import scan
from finetune.data.images import whole
from finetune.data.preparation import check_fit
from finetune.data.sources import refuse_doubts
from finetune.distributed import start
from finetune.evaluation import Answers
from finetune.export.aesthetic import weights_of
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.finish import Shown, report, write
from finetune.train import check_run
from finetune.train.run import open_run


def main(recipe: Recipe) -> None:
    config = recipe.adapter
    assert isinstance(config, AestheticConfig)
    processes = start(recipe.train)
    check_run(recipe, processes)
    family = load_family(recipe.model, device=processes.device)
    check_fit(recipe, family)
    concepts = scan(recipe.data, captioned=False)
    refuse_doubts(recipe.data, [note for concept in concepts for note in concept.notes])
    counts = [(one, concept.config.repeats * one.weight) for concept in concepts for one in concept.pictures]

    space = shared_space(family, config.clip)
    vectors = torch.cat([space.embed([whole(picture)]) for picture, _ in counts])  # one by one: they may be large
    embedding = mean_embedding(vectors, [count for _, count in counts])
    settings = (config.steps, config.learning_rate, config.weight, config.mix)
    aesthetic = Aesthetic(embedding, space.projection, *settings)

    folder = open_run(recipe, processes)
    weights = weights_of(aesthetic, space.name, space.encoder, len(vectors))
    verified = write([weights], family, recipe, processes, folder.adapters)
    likeness = float(cosine_similarity(vectors, embedding).mean())
    notes = [f"the pictures' mean cosine with their embedding is {likeness:.3f}"]
    if config.bake_prompts:
        baked = baked_lora(family, aesthetic, config)
        notes.append(str(baked))
        told = with_steps(recipe, config.steps)
        verified += write([baked.weights], family, told, processes, folder.adapters / "baked")
    processes.say("\n".join(notes))

    def verdict(before: Answers, after: Answers) -> str:
        old, new = (
            float(cosine_similarity(space.embed([one for row in side.scenes for one in row]), embedding).mean())
            for side in (before, after)
        )
        return f"Mean cosine of the drawn pictures and the embedding: {old:.3f} before, {new:.3f} after."

    if recipe.report.enabled:
        family.release(*list(family.networks))
        notes += [note for concept in concepts for note in concept.notes]
        report(recipe, processes, Shown(concepts, notes=notes, verdict=verdict), folder, verified)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe as a LoRA's header tells of it: the steps are those of the adaptation."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def baked_lora(family: ModelFamily, aesthetic: Aesthetic, config: AestheticConfig) -> Baked:
    """The change for all of ``bake_prompts`` together, as a LoRA of the text encoder."""
    vocabulary = family.sites.vocabularies[0]
    tokenizer, network = vocabulary.tokenizer, vocabulary.network
    family.require(network)
    ids = tokenizer(
        config.bake_prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(family.device)
    return bake(family.networks[network], ids, tokenizer.eos_token_id, aesthetic, config.bake_rank, network)


if __name__ == "__main__":
    run(main)
