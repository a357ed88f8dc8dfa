"""Aesthetic gradients: METHODS 5.3 (pitfalls) and 5.4 (acceptance tests)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from finetune.aesthetic import Aesthetic, adapt, alignment, attach, bake, blend, mean_embedding, shared_space
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.families.clip import encoder_digest
from finetune.families.clip import shared_space as space_of
from finetune.families.tiny import write_tiny_clip, write_tiny_sd
from finetune.family import SharedSpace, Unsupported

PROMPT = "a red star on grass"


@pytest.fixture(scope="module")
def clip(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "clip", tiny_sd)


@pytest.fixture
def pipeline(tiny_sd: Path) -> Any:
    torch.set_num_threads(1)
    loaded: Any = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def space(pipeline: Any, clip: Path) -> SharedSpace:
    return space_of(pipeline.text_encoder, str(clip))


@pytest.fixture
def aesthetic(space: SharedSpace) -> Aesthetic:
    return Aesthetic(mean_embedding(space.embed(pictures())), space.projection, steps=4, learning_rate=1e-3)


def pictures() -> list[Image.Image]:
    noise = torch.randint(256, (24, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(noise.numpy()), Image.new("RGB", (40, 20), (200, 30, 90))]


def ids(pipeline: Any, *texts: str) -> Tensor:
    return pipeline.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids


def encode(pipeline: Any, *prompts: str, **more: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return pipeline.encode_prompt(list(prompts), "cpu", 1, True, **more)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_no_steps_change_no_bit(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.4: T = 0 gives a bit-equal conditioning; so does weight 0."""
    plain, away = encode(pipeline, PROMPT)
    for off in (replace(aesthetic, steps=0), replace(aesthetic, weight=0.0)):
        with attach(pipeline, off):
            got, guided = encode(pipeline, PROMPT)
        assert torch.equal(got, plain)
        assert torch.equal(guided, away)


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_cosine_grows_in_each_of_the_first_three_steps(pipeline: Any, aesthetic: Aesthetic, rate: float) -> None:
    """METHODS 5.4: cosine(g, e) strictly grows over the first 3 steps."""
    end, tokens = pipeline.tokenizer.eos_token_id, ids(pipeline, PROMPT)
    cosines = []
    for steps in range(4):
        moved = adapt(pipeline.text_encoder, tokens, end, replace(aesthetic, steps=steps, learning_rate=rate))
        cosines.append(float(alignment(moved, tokens, end, aesthetic)))
    assert cosines == sorted(set(cosines))


def test_steps_are_those_of_plain_adam_on_minus_the_cosine(pipeline: Any, aesthetic: Aesthetic, clip: Path) -> None:
    """METHODS 5.1: the loss is -g e with both normalised, Adam's defaults, on the text transformer alone."""
    tokens = ids(pipeline, PROMPT)
    moved = adapt(pipeline.text_encoder, tokens, pipeline.tokenizer.eos_token_id, aesthetic)
    model: Any = CLIPModel.from_pretrained(clip)
    optimizer = torch.optim.Adam(model.text_model.parameters(), lr=1e-3)
    e = aesthetic.embedding / aesthetic.embedding.norm()
    for _ in range(4):
        g = model.get_text_features(input_ids=tokens).pooler_output
        loss = -(g / g.norm(dim=-1, keepdim=True) @ e.T).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reference = dict(model.text_model.named_parameters())
    for name, value in moved.named_parameters():
        # Adam's first steps are +-rate wherever a gradient is not zero, so where it is nearly zero signs may differ
        torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=2e-5, msg=name)


def test_pictures_leave_the_encoder_and_the_projection_as_they_were(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.4: after sampling, encoder weights are bit-equal to the originals; the projection gets no update."""
    before, projection = state(pipeline.text_encoder), aesthetic.projection.clone()
    own = pipeline.text_encoder
    settings = {"num_inference_steps": 2, "output_type": "np"}
    plain = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images
    with attach(pipeline, aesthetic):
        drawn = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images
    again = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images
    assert (drawn != plain).any()
    assert (again == plain).all()
    assert pipeline.text_encoder is own
    assert equal(state(own), before)
    assert torch.equal(aesthetic.projection, projection)
    assert not any(parameter.requires_grad for parameter in adapt(own, ids(pipeline, "a"), 0, aesthetic).parameters())
    assert [parameter.grad for parameter in own.parameters()].count(None) == len(list(own.parameters()))


def test_what_guides_away_stays(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.4: the unconditional conditioning is unchanged; so are a negative prompt and the empty prompt."""
    for negative in (None, ["a blue heart"]):
        _, away = encode(pipeline, PROMPT, negative_prompt=negative)
        with attach(pipeline, aesthetic):
            _, guided = encode(pipeline, PROMPT, negative_prompt=negative)
        assert torch.equal(away, guided)
    plain, _ = encode(pipeline, "", PROMPT)
    with attach(pipeline, aesthetic):
        moved, _ = encode(pipeline, "", PROMPT)
    assert torch.equal(moved[0], plain[0])
    assert not torch.equal(moved[1], plain[1])


def test_the_same_prompt_is_the_same_whatever_came_before_and_stands_beside_it(
    pipeline: Any, aesthetic: Aesthetic
) -> None:
    """METHODS 5.4 and 5.3: the same prompt twice gives an identical conditioning; prompts do not accumulate."""
    with attach(pipeline, aesthetic):
        first, _ = encode(pipeline, PROMPT)
        encode(pipeline, "a blue heart at night")
        second, _ = encode(pipeline, PROMPT)
        beside, _ = encode(pipeline, "a blue heart at night", PROMPT)
    assert torch.equal(first, second)
    torch.testing.assert_close(beside[1:], first)


def test_copies_of_one_picture_have_its_embedding(space: SharedSpace) -> None:
    """METHODS 5.4: the embedding of k copies of one image is that image's embedding, its length included."""
    one = space.embed(pictures()[:1])
    assert torch.equal(mean_embedding(one.repeat(7, 1)), one)
    torch.testing.assert_close(mean_embedding(space.embed(pictures()[:1] * 3)), one)
    assert abs(float(one.norm()) - 1) > 0.05  # METHODS 5.1: features are not normalised


def test_weights_of_pictures_are_those_of_the_mean() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(mean_embedding(vectors, [3.0, 1.0]), torch.tensor([[0.75, 1.0]]))


def test_it_works_where_no_gradients_are_wanted(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.3: under no_grad and inference_mode, as pipelines run, steps are taken all the same."""
    with attach(pipeline, aesthetic):
        moved, _ = encode(pipeline, PROMPT)
        with torch.inference_mode():
            inferred, _ = pipeline.encode_prompt([PROMPT], "cpu", 1, True)
    assert torch.equal(moved, inferred)


def test_half_precision_encoders_are_adapted_in_float32(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.3: Adam at 1e-4 loses updates in fp16; the conditioning comes back in the pipeline's precision."""
    pipeline.text_encoder.half()
    small = replace(aesthetic, learning_rate=1e-5, steps=1)
    tokens = ids(pipeline, PROMPT)
    moved = adapt(pipeline.text_encoder, tokens, pipeline.tokenizer.eos_token_id, small)
    name = "encoder.layers.0.mlp.fc1.weight"
    change = (moved.get_parameter(name) - pipeline.text_encoder.get_parameter(name).float()).detach()
    assert float(change.abs().median()) == pytest.approx(1e-5, rel=0.05)
    with attach(pipeline, small):
        assert encode(pipeline, PROMPT)[0].dtype == torch.float16


def test_a_text_is_read_at_its_first_end_whatever_ids_new_words_have(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.3 and 0.2.2: words that were added have ids above the end token's and settings may say end = 2."""
    pipeline.tokenizer.add_tokens(["<new>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    end, tokens = pipeline.tokenizer.eos_token_id, ids(pipeline, "a <new> star")
    assert int(tokens.max()) > end
    states = pipeline.text_encoder(tokens).last_hidden_state
    read = states[:, tokens[0].tolist().index(end)] @ aesthetic.projection.T
    wanted = torch.cosine_similarity(read, aesthetic.embedding)
    torch.testing.assert_close(alignment(pipeline.text_encoder, tokens, end, aesthetic), wanted)
    pipeline.text_encoder.config.eos_token_id = 2
    torch.testing.assert_close(alignment(pipeline.text_encoder, tokens, end, aesthetic), wanted)


def test_mixtures_end_at_the_two_encodings(aesthetic: Aesthetic) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, moved = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    for mix in ("lerp", "slerp"):
        assert torch.equal(blend(plain, moved, replace(aesthetic, weight=0.0, mix=mix)), plain)
        assert torch.equal(blend(plain, moved, replace(aesthetic, weight=1.0, mix=mix)), moved)
    half = replace(aesthetic, weight=0.5)
    torch.testing.assert_close(blend(plain, moved, half), (plain + moved) / 2)
    unit = [part / part.norm(dim=-1, keepdim=True) for part in (plain, moved)]
    arc = blend(unit[0], unit[1], replace(half, mix="slerp"))
    torch.testing.assert_close(arc.norm(dim=-1), torch.ones(2, 3))  # the arc stays on the sphere, the chord does not
    assert torch.equal(blend(plain, plain, replace(half, mix="slerp")), plain)


def test_several_pictures_of_several_prompts_keep_their_order(pipeline: Any, aesthetic: Aesthetic) -> None:
    with attach(pipeline, aesthetic), torch.no_grad():
        alone = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in (PROMPT, "a blue heart")]
        both, _ = pipeline.encode_prompt([PROMPT, "a blue heart"], "cpu", 2, False)
    torch.testing.assert_close(both, torch.cat([alone[0], alone[0], alone[1], alone[1]]))


def test_encodings_that_a_caller_brings_along_are_left_alone(pipeline: Any, aesthetic: Aesthetic) -> None:
    plain, away = encode(pipeline, PROMPT)
    with attach(pipeline, aesthetic), torch.no_grad():
        got, _ = pipeline.encode_prompt(None, "cpu", 1, True, None, prompt_embeds=plain, negative_prompt_embeds=away)
    assert torch.equal(got, plain)


def test_a_pipeline_has_one_embedding_at_a_time(pipeline: Any, aesthetic: Aesthetic) -> None:
    attached = attach(pipeline, aesthetic)
    with pytest.raises(UserError, match="already"):
        attach(pipeline, aesthetic)
    attached.remove()
    attached.remove()
    with attach(pipeline, aesthetic):
        pass
    with pytest.raises(UserError, match="is for a text encoder 5 wide, this one is 16 wide"):
        attach(pipeline, replace(aesthetic, projection=torch.zeros(8, 5)))
    with pytest.raises(UserError, match="one CLIP text encoder"):
        attach(object(), aesthetic)


def test_a_baked_lora_of_full_rank_is_the_whole_change(pipeline: Any, aesthetic: Aesthetic) -> None:
    """METHODS 5.2: T steps over a list of prompts, kept as a LoRA of the text encoder."""
    encoder, before = pipeline.text_encoder, state(pipeline.text_encoder)
    tokens, end = ids(pipeline, PROMPT, "a blue heart"), pipeline.tokenizer.eos_token_id
    baked = bake(encoder, tokens, end, aesthetic, 99, "text_encoder")
    assert equal(state(encoder), before)
    assert baked.kept == pytest.approx(1.0, abs=1e-5)
    assert 0 < baked.linear < 1
    moved = adapt(encoder, tokens, end, aesthetic)
    linears = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    assert len(baked.weights.tensors) == 3 * len(linears) == 3 * 12
    for name in linears:
        parts = [baked.weights.tensors[f"text_encoder.{name}.{part}"] for part in ("lora_A.weight", "lora_B.weight")]
        change = moved.get_parameter(f"{name}.weight") - encoder.get_parameter(f"{name}.weight")
        torch.testing.assert_close(parts[1] @ parts[0], change, rtol=1e-4, atol=1e-6)
        assert float(baked.weights.tensors[f"text_encoder.{name}.alpha"]) == len(parts[0])


def test_a_smaller_rank_keeps_less_and_still_moves_prompts(pipeline: Any, aesthetic: Aesthetic) -> None:
    tokens, end = ids(pipeline, PROMPT, "a blue heart"), pipeline.tokenizer.eos_token_id
    small, large = (bake(pipeline.text_encoder, tokens, end, aesthetic, rank, "text_encoder") for rank in (1, 4))
    assert small.kept < large.kept < 1
    assert small.before < small.after < large.after
    assert small.moved == large.moved


def test_a_clip_sees_pictures_as_transformers_does(pipeline: Any, clip: Path, space: SharedSpace) -> None:
    from transformers import CLIPImageProcessorPil

    model: Any = CLIPModel.from_pretrained(clip)
    side = {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
    pixels = processor(images=pictures(), return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(space.embed(pictures()), wanted, rtol=1e-3, atol=1e-3)


def test_another_clip_is_refused(pipeline: Any, tmp_path: Path) -> None:
    """METHODS 5.2: the text tower must be the diffusion model's encoder."""
    other = write_tiny_clip(tmp_path / "clip", write_tiny_sd(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="is not the base's text encoder"):
        space_of(pipeline.text_encoder, str(other))
    with pytest.raises(UserError, match=r"adapter\.clip is missing"):
        space_of(pipeline.text_encoder, None)
    with pytest.raises(UserError, match="cannot be loaded"):
        space_of(pipeline.text_encoder, str(tmp_path / "nothing"))


def test_a_digest_knows_an_encoder_in_other_clothes(pipeline: Any, clip: Path) -> None:
    encoder = pipeline.text_encoder
    digest = encoder_digest(encoder)
    assert encoder_digest(CLIPModel.from_pretrained(clip).text_model) == digest
    encoder.resize_token_embeddings(encoder.config.vocab_size + 3, mean_resizing=False)
    assert encoder_digest(encoder) == digest
    from peft import LoraConfig

    encoder.add_adapter(LoraConfig(target_modules=["q_proj", "fc1"], r=2))
    assert encoder_digest(encoder) == digest
    assert encoder_digest(encoder.half()) == digest
    with torch.no_grad():
        encoder.final_layer_norm.bias += 0.01
    assert encoder_digest(encoder) != digest


def test_the_embedded_base_brings_its_own_towers() -> None:
    """METHODS 5.2 and 10.5: pictures and captions of the embedded world are alike where they say the same."""
    from finetune.tinyworld import Scene, compose, render, rng

    family = load_family(ModelConfig())
    space = shared_space(family, None)
    assert space.name == "tinyworld"
    family.require("text_encoder")
    scenes = [Scene.having({"shape": shape, "colour": "red"}, rng("towers", shape)) for shape in ("star", "circle")]
    vectors = space.embed([render(scene)[0] for scene in scenes])
    tokenizer: Any = family.sites.vocabularies[0].tokenizer
    texts = [compose({"shape": shape, "colour": "red"}) for shape in ("star", "circle")]
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    for row, vector in enumerate(vectors):
        found = Aesthetic(vector[None], space.projection)
        with torch.no_grad():
            cosines = alignment(family.networks["text_encoder"], tokens, tokenizer.eos_token_id, found)
        assert int(cosines.argmax()) == row


def test_a_family_without_a_shared_space_says_so(tiny_family: Any) -> None:
    tiny_family.sites = replace(tiny_family.sites, shared_space=Unsupported("it reads no prompts"))
    with pytest.raises(UserError, match="it reads no prompts"):
        shared_space(tiny_family, None)
