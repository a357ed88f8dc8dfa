"""What of a word learns and within which bounds, and how it comes back (METHODS 2)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from new_words import attached, config, encoded, loss, rows, spread
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from finetune.adapters.embedding import GROUP, Embedding, Extended
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.families.tiny import WIDTH
from finetune.family import Vocabulary
from finetune.tinyworld.tokenizer import build

# METHODS 2.9


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
