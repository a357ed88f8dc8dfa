"""Textual inversion: new rows learn, nothing else does, and prompts hold what they should (METHODS 2)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from finetune.adapters import attach
from finetune.adapters.embedding import GROUP, Embedding, Extended
from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.families.tiny import WIDTH
from finetune.family import ModelFamily, Vocabulary
from finetune.randomness import generator
from finetune.tinyworld.tokenizer import build

GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)


def config(*tokens: dict[str, Any], **changes: Any) -> EmbeddingConfig:
    return EmbeddingConfig.model_validate(
        {"kind": "embedding", "tokens": list(tokens) or [{"token": "<t>", "initializer": "star"}], **changes}
    )


def attached(folder: Path, *tokens: dict[str, Any], seed: int = 0, **changes: Any) -> tuple[ModelFamily, Embedding]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(config(*tokens, **changes), family, seed)
    assert isinstance(adapter, Embedding)
    adapter.begin_step(0)
    return family, adapter


def rows(adapter: Embedding) -> nn.Parameter:
    (parameter,) = adapter.groups()[0].parameters.values()
    return parameter


def loss(family: ModelFamily, captions: list[str]) -> Tensor:
    noisy = torch.randn(len(captions), 4, 8, 8, generator=generator(0, "noisy"))
    steps = torch.full((len(captions),), 500)
    answer = family.predict(noisy, steps, family.encode_prompt(captions), GEOMETRY[: len(captions)])
    return (answer - torch.randn(answer.shape, generator=generator(0, "target"))).square().mean()


def encoded(family: ModelFamily, *captions: str) -> Tensor:
    return family.encode_prompt(captions).tokens


# METHODS 2.9


def test_a_word_of_three_vectors_is_three_tokens(tiny_sd: Path) -> None:
    """METHODS 2.9: "a <t> <t>_1 <t>_2 x" encodes to [bos, a, id0, id1, id2, x, eos]; 0.2 fact 12."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3})
    (vocabulary,) = family.sites.vocabularies
    tokenizer, known = vocabulary.tokenizer, len(build())
    ids = tokenizer.convert_tokens_to_ids
    expected = [ids("a</w>"), known, known + 1, known + 2, ids("star</w>")]
    assert tokenizer("a <t> <t>_1 <t>_2 star").input_ids == [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id]
    assert vocabulary.expand("a <t> star") == "a <t> <t>_1 <t>_2 star"
    assert adapter.tables["text_encoder"].first == known


@pytest.mark.parametrize("token", ["<t>", "<t>_1", "star", "<|endoftext|>"])
def test_a_word_that_is_known_is_refused(tiny_sd: Path, token: str) -> None:
    """METHODS 2.9 and 2.8: adding a token twice, or a word of the model, is an error."""
    family, _ = attached(tiny_sd, {"token": "<t>", "vectors": 2})
    size = len(family.sites.vocabularies[0].tokenizer)
    with pytest.raises(UserError, match="is a word that the model knows"):
        attach(config({"token": token}), family, 0)
    assert len(family.sites.vocabularies[0].tokenizer) == size


def test_a_word_that_is_part_of_another_is_refused(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    attach(config({"token": "<t>"}), family, 0)
    with pytest.raises(UserError, match="cannot be told from"):
        attach(config({"token": "a<t>b"}), family, 0)


def test_only_new_rows_learn(tiny_sd: Path) -> None:
    """METHODS 2.9: only new rows get gradient; after 20 steps of AdamW with decay all else is bit-equal."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 2, "initializer": "star"})
    family.require("vae")
    base = {name: value.clone() for name, value in family.networks.named_parameters() if not name.endswith(".new")}
    fresh = family.fresh("text_encoder").state_dict()
    parameter = rows(adapter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    start = parameter.detach().clone()
    for _ in range(20):
        loss(family, ["a <t>", "a red star"]).backward()
        assert [name for name, value in family.networks.named_parameters() if value.grad is not None] == [
            "text_encoder.embeddings.token_embedding.new"
        ]
        optimizer.step()
        optimizer.zero_grad()
    after = dict(family.networks.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(torch.equal(base[f"text_encoder.{name}"], value) for name, value in fresh.items())
    assert bool((parameter != start).any(1).all())


def test_before_training_a_word_is_its_initializer(tiny_sd: Path) -> None:
    """METHODS 2.9: the encoder's output is bit-equal to that of the initializer's prompt."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("text_encoder")
    before = encoded(family, "a red star on grass")
    attach(config({"token": "<t>", "initializer": "star"}), family, 0)
    assert torch.equal(encoded(family, "a red <t> on grass"), before)
    assert torch.equal(encoded(family, "a red star on grass"), before)


def test_every_vector_counts(tiny_sd: Path) -> None:
    """METHODS 2.9: outputs differ where only the second vector is perturbed."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3, "initializer": "red star"})
    before = encoded(family, "a <t>", "a star")
    with torch.no_grad():
        rows(adapter)[1] += 0.1
    after = encoded(family, "a <t>", "a star")
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("stored_end", [2, None])
def test_the_pooled_output_is_that_of_the_end(tiny_sd: Path, tmp_path: Path, stored_end: int | None) -> None:
    """METHODS 2.9 and 0.2 fact 2: also where the settings say eos_token_id 2, as Stable Diffusion's do."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("text_encoder")
    encoder: Any = family.networks["text_encoder"]
    if stored_end is not None:
        encoder.eos_token_id = encoder.config.eos_token_id = stored_end
    attach(config({"token": "<t>", "vectors": 2}), family, 0)
    tokenizer = family.sites.vocabularies[0].tokenizer
    ids = tokenizer("a <t> <t>_1 star", return_tensors="pt", padding="max_length").input_ids
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    output = encoder(ids)
    assert end == 5
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])
    assert encoder.config.eos_token_id == tokenizer.eos_token_id


def spread(values: Tensor) -> float:
    return float(values.detach().std())


@pytest.mark.parametrize("target", [None, 0.3])
def test_hard_norm(tiny_sd: Path, target: float | None) -> None:
    """METHODS 2.9 and 2.4: every length equals the table's median, or what is asked for, to 1e-6."""
    norm = {"kind": "hard", "target": target}
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 5}, norm=norm)
    parameter, table = rows(adapter), family.networks["text_encoder"].get_input_embeddings().weight
    direction = parameter / parameter.norm(dim=1, keepdim=True)
    adapter.end_step({GROUP: 1e-3})
    wanted = torch.full((5,), target or float(table.norm(dim=1).median()))
    torch.testing.assert_close(parameter.norm(dim=1), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(parameter / parameter.norm(dim=1, keepdim=True), direction)


@pytest.mark.parametrize(("rate", "share"), [(1e-3, 0.1), (0.5, 1.0)])
def test_decay_to_norm(tiny_sd: Path, rate: float, share: float) -> None:
    """METHODS 2.9 and 2.4: n' = n + min(1, 100 lr) (n* - n), the direction stays."""
    _, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3}, norm={"kind": "decay", "target": 0.4})
    parameter = rows(adapter)
    before = parameter.detach().clone()
    adapter.end_step({GROUP: rate})
    lengths = before.norm(dim=1)
    wanted = before / lengths[:, None] * (lengths + share * (0.4 - lengths))[:, None]
    torch.testing.assert_close(parameter.detach(), wanted)


def test_std_pull(tiny_sd: Path) -> None:
    """METHODS 2.9 and 2.4: V *= (std of the table / std of V)^0.1, both over all numbers."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3}, norm={"kind": "std"})
    parameter, table = rows(adapter), family.networks["text_encoder"].get_input_embeddings().weight
    with torch.no_grad():
        parameter *= 5
    before = parameter.detach().clone()
    adapter.end_step({GROUP: 1e-3})
    torch.testing.assert_close(parameter.detach(), before * (spread(table) / spread(before)) ** 0.1)


def test_words_grow(tiny_sd: Path) -> None:
    """METHODS 2.9 and 2.2: one vector in steps < K, two in K to 2K - 1, and so on; also in previews, also resumed."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3}, progressive_steps=4)
    (vocabulary,), pipeline = family.sites.vocabularies, family.pipeline()
    for step in (0, 1, 3, 4, 7, 8, 11, 100, 5):
        adapter.begin_step(step)
        count = min(3, 1 + step // 4)
        text = "a " + " ".join(["<t>", "<t>_1", "<t>_2"][:count])
        assert vocabulary.expand("a <t>") == text
        assert pipeline.maybe_convert_prompt("a <t>", pipeline.tokenizer) == text
        shown = pipeline.encode_prompt(["a <t>", "a star"], torch.device("cpu"), 1, False)[0]
        assert torch.equal(shown, encoded(family, "a <t>", "a star"))


def test_rows_that_no_caption_holds_yet_stay(tiny_sd: Path) -> None:
    _, adapter = attached(
        tiny_sd, {"token": "<t>", "vectors": 3}, {"token": "<u>"}, progressive_steps=2, norm={"kind": "hard"}
    )
    parameter = rows(adapter)
    start = parameter.detach().clone()
    adapter.begin_step(2)
    with torch.no_grad():
        parameter *= 0.9  # weight decay
    adapter.end_step({GROUP: 1e-3})
    assert (parameter != start).any(1).tolist() == [True, True, False, True]


# METHODS 2.1


def test_initializers_are_taken_in_turn(tiny_sd: Path) -> None:
    """METHODS 2.1: ids[i % len] over the vectors."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 5, "initializer": "red star"})
    tokenizer, encoder = family.sites.vocabularies[0].tokenizer, family.fresh("text_encoder")
    ids = tokenizer.convert_tokens_to_ids(["red</w>", "star</w>"])
    assert torch.equal(rows(adapter), encoder.get_input_embeddings().weight[[ids[i % 2] for i in range(5)]])


@pytest.mark.parametrize(("words", "hint"), [("red stra", "'star'"), ("labradoodle", "la"), (" ", "no word")])
def test_unknown_initializers_are_refused(tiny_sd: Path, words: str, hint: str) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    with pytest.raises(UserError, match=hint):
        attach(config({"token": "<t>", "initializer": words}), family, 0)


def test_random_starts_are_named_and_spread_like_the_table(tiny_sd: Path) -> None:
    family, one = attached(tiny_sd, {"token": "<t>", "vectors": 8}, {"token": "<u>", "vectors": 8})
    _, alone = attached(tiny_sd, {"token": "<u>", "vectors": 8})
    _, other = attached(tiny_sd, {"token": "<u>", "vectors": 8}, seed=1)
    state = torch.random.get_rng_state()
    attached(tiny_sd, {"token": "<u>", "vectors": 8})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(rows(one)[8:], rows(alone))  # whatever other words there are
    assert not torch.equal(rows(alone), rows(other))
    table = family.networks["text_encoder"].get_input_embeddings().weight
    assert spread(rows(one)) == pytest.approx(spread(table), rel=0.15)


@pytest.mark.parametrize("caption", ["a <t> star", "<t>", "a <t> and <t> <u>", "<u><t>", "a star", ""])
def test_captions_are_expanded_as_diffusers_does(tiny_sd: Path, caption: str) -> None:
    """METHODS 2.1: what is trained is what a pipeline of diffusers draws with."""
    family, _ = attached(tiny_sd, {"token": "<t>", "vectors": 3}, {"token": "<u>", "vectors": 2})
    (vocabulary,), pipeline = family.sites.vocabularies, family.pipeline()
    inherited = type(pipeline).maybe_convert_prompt(pipeline, caption, vocabulary.tokenizer)
    assert vocabulary.expand(caption) == inherited
    assert torch.equal(pipeline.encode_prompt(caption, torch.device("cpu"), 1, False)[0], encoded(family, caption))


@pytest.mark.parametrize("vectors", [1, 5])
def test_the_count_of_tokens_is_right_before_and_after_the_word_is_known(tiny_sd: Path, vectors: int) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    words = {"<t>": vectors}
    captions = ["a <t> " + "red " * count for count in (3, 16, 17, 20, 21, 40)] + ["<t> and <t>", "<t><t>"]
    before = [family.caption_overflow(caption, words) for caption in captions]
    attach(config({"token": "<t>", "vectors": vectors}), family, 0)
    (vocabulary,) = family.sites.vocabularies
    for caption, lost in zip(captions, before, strict=True):
        count = len(vocabulary.tokenizer(vocabulary.expand(caption)).input_ids)
        assert lost == family.caption_overflow(caption, words) == max(0, count - 24)
    assert before[-3] > 0


# METHODS 2.2, 2.3


def test_regularisation_is_the_mean_squared_way_from_the_start(tiny_sd: Path) -> None:
    """METHODS 2.2: lambda |V - V0|^2 / n, with gradient."""
    _, without = attached(tiny_sd)
    assert without.penalty() is None
    _, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3}, regularisation=0.5)
    parameter = rows(adapter)
    start = parameter.detach().clone()
    assert float(adapter.penalty().detach()) == 0.0
    with torch.no_grad():
        parameter[1] += 0.2
    penalty = adapter.penalty()
    assert float(penalty.detach()) == pytest.approx(0.5 * WIDTH * 0.04 / 3, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(parameter.grad, 0.5 * 2 * (parameter.detach() - start) / 3)


def test_optimizer_state_is_of_the_new_rows_alone() -> None:
    """METHODS 2.3: at most 1 % of what the whole table would need, on a table of CLIP's proportion."""
    table = nn.Embedding(49408, 32).requires_grad_(False)
    extended = Extended(table, 49408, torch.zeros(8, 32))

    def state(parameters: list[nn.Parameter]) -> int:
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return sum(v.numel() for held in optimizer.state.values() for v in held.values() if torch.is_tensor(v))

    trained = [value for value in extended.parameters() if value.requires_grad]
    assert state(trained) <= 0.01 * state([nn.Parameter(table.weight.clone())])


def test_tables_that_are_longer_than_the_vocabulary() -> None:
    """Ids of new words may lie inside a padded table: its rows there are not read."""
    table = nn.Embedding(12, 4)
    extended = Extended(table, 10, torch.ones(3, 4))
    ids = torch.tensor([[9, 10, 12]])
    assert torch.equal(extended(ids)[0], torch.stack([table.weight[9], torch.ones(4), torch.ones(4)]))
    assert extended.weight is table.weight


def test_disabled_is_the_word_as_it_began(tiny_sd: Path) -> None:
    """Prior preservation by the model: class captions are the untouched model's inside and outside."""
    family, adapter = attached(tiny_sd)
    before = encoded(family, "a <t>", "a red star")
    with torch.no_grad():
        rows(adapter).add_(0.1)
    trained = encoded(family, "a <t>", "a red star")
    assert torch.equal(trained[1], before[1]) and not torch.equal(trained[0], before[0])
    with adapter.disabled():
        assert torch.equal(encoded(family, "a <t>", "a red star"), before)
    assert torch.equal(encoded(family, "a <t>", "a red star"), trained)


def test_a_batch_without_the_word_gives_no_gradient_and_no_error(tiny_sd: Path) -> None:
    """Class images, and captions that were dropped."""
    family, adapter = attached(tiny_sd)
    loss(family, ["a star", ""]).backward()
    assert torch.equal(rows(adapter).grad, torch.zeros(1, WIDTH))


def test_weights_come_back_bit_for_bit(tiny_sd: Path) -> None:
    tokens = {"token": "<t>", "vectors": 2}, {"token": "<u.x>"}
    _, adapter = attached(tiny_sd, *tokens)
    with torch.no_grad():
        rows(adapter)[:2].add_(0.1)
    weights = adapter.weights()
    assert {key: list(value.shape) for key, value in weights.tensors.items()} == {
        "text_encoder.<t>": [2, WIDTH],
        "text_encoder.<u.x>": [1, WIDTH],
    }
    assert all(value.dtype == torch.float32 for value in weights.tensors.values())
    assert '"text_encoder.<u.x>": 0.0' in weights.settings["moved"]
    _, other = attached(tiny_sd, *tokens, seed=1)
    other.load(weights.tensors)
    assert torch.equal(rows(other), rows(adapter))
    with pytest.raises(UserError, match="1 tensors are missing"):
        other.load({"text_encoder.<t>": weights.tensors["text_encoder.<t>"]})


# METHODS 2.8


def test_gradient_checkpointing_acts_although_the_denoiser_does_not_train(tiny_sd: Path) -> None:
    """METHODS 2.8: memory is saved in the denoiser, which stays in eval(), and the gradient is the same."""
    family, adapter = attached(tiny_sd)
    family.networks["text_encoder"].train()
    loss(family, ["a <t>", "a red <t>"]).backward()
    plain = rows(adapter).grad.clone()
    rows(adapter).grad = None
    family.enable_gradient_checkpointing()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hook = family.networks["denoiser"].up_blocks[-1].resnets[-1].register_forward_pre_hook(count)
    loss(family, ["a <t>", "a red <t>"]).backward()
    hook.remove()
    assert runs == 2  # forwards, and again on the way back
    assert not family.networks["denoiser"].training
    torch.testing.assert_close(rows(adapter).grad, plain)


def test_rows_stay_float32_beside_a_half_precision_table() -> None:
    """METHODS 2.8: rows of a word are float32 whatever the encoder is; what it reads is its own dtype."""
    extended = Extended(nn.Embedding(10, 4).bfloat16(), 10, torch.ones(1, 4))
    answer = extended(torch.tensor([3, 10]))
    assert answer.dtype == torch.bfloat16 and extended.new.dtype == torch.float32
    answer.float().sum().backward()
    assert extended.new.grad.dtype == torch.float32


def test_train_and_eval_are_the_same(tiny_sd: Path) -> None:
    """METHODS 2.8: CLIP has no dropout, so that previews show what trains."""
    family, _ = attached(tiny_sd)
    before = encoded(family, "a <t>")
    family.networks["text_encoder"].train()
    assert torch.equal(encoded(family, "a <t>"), before)


# METHODS 2.5


def test_two_text_encoders_have_vectors_of_their_own(tiny_sd: Path) -> None:
    """METHODS 2.5 and 0.2 fact 1: both tokenizers and tables, also of an encoder with the level ``text_model``."""
    small = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(build()),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=24,
            projection_dim=8,
            eos_token_id=2,
        )
    ).eval()
    networks = nn.ModuleDict(
        {"clip_l": load_family(ModelConfig(path=str(tiny_sd))).fresh("text_encoder"), "clip_g": small}
    )
    vocabularies = [Vocabulary(build(), "clip_l"), Vocabulary(build(), "clip_g")]
    family: Any = SimpleNamespace(
        networks=networks.requires_grad_(False),
        sites=SimpleNamespace(vocabularies=vocabularies),
        require=lambda *_: None,
    )
    adapter = Embedding(config({"token": "<t>", "vectors": 2}), family, 0)
    assert {key: list(value.shape) for key, value in adapter.weights().tensors.items()} == {
        "clip_l.<t>": [2, WIDTH],
        "clip_g.<t>": [2, 8],
    }
    assert adapter.networks() == {"clip_l", "clip_g"}
    (group,) = adapter.groups()
    assert list(group.parameters) == [
        "clip_l.embeddings.token_embedding.new",
        "clip_g.text_model.embeddings.token_embedding.new",
    ]
    assert small.text_model.eos_token_id == small.config.eos_token_id == vocabularies[1].tokenizer.eos_token_id
    ids = (
        vocabularies[1].tokenizer(vocabularies[1].expand("a <t>"), return_tensors="pt", padding="max_length").input_ids
    )
    hidden = small.text_model(ids)
    assert torch.equal(hidden.pooler_output[0], hidden.last_hidden_state[0, 4])
