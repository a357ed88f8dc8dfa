"""SAM and SAM 2 with random weights, against the processors and the forward passes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.masking.guidance import guided_attention
from data_tools.masking.models import kind_of, load
from data_tools.masking.prompts import Prompt
from data_tools.masking.sam import Prompted, Sam
from data_tools.masking.view import Guide, View
from data_tools.masking.way import Photo
from finetune.errors import UserError

CPU = torch.device("cpu")
PROMPT = Prompt(((10, 12), (40, 5)), (1, 0), (4, 6, 30, 28))


def sam_of(folder: Path) -> Sam:
    found = load([str(folder)], CPU).sam
    assert found is not None
    return found


@pytest.fixture(params=["tiny_sam", "tiny_sam2"])
def sam(request: pytest.FixtureRequest) -> Sam:
    return sam_of(request.getfixturevalue(request.param))


def test_the_first_sam_is_asked_as_its_processor_asks(tiny_sam: Path, noise: Image.Image) -> None:
    from transformers import SamImageProcessorPil, SamModel, SamProcessor

    images = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    processor = SamProcessor(images)
    x0, y0, x1, y1 = PROMPT.box or (0, 0, 0, 0)
    given = processor(
        images=noise,
        input_points=[[[list(point) for point in PROMPT.points]]],
        input_labels=[[list(PROMPT.labels)]],
        input_boxes=[[[x0, y0, x1, y1]]],
        return_tensors="pt",
    )
    sizes = given.pop("original_sizes"), given.pop("reshaped_input_sizes")
    with torch.inference_mode():
        found = SamModel.from_pretrained(tiny_sam)(**given, multimask_output=False)
    masks = processor.post_process_masks(found.pred_masks, *sizes, binarize=False)
    ours = sam_of(tiny_sam)
    view = ours.look(noise)
    logits = ours.predict(view, PROMPT)
    torch.testing.assert_close(logits, found.pred_masks[0, 0, 0], rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.05
    expected = masks[0][0, 0].sigmoid().numpy()
    np.testing.assert_allclose(ours.whole(view, logits), expected, rtol=1e-4, atol=1e-5)


def test_the_second_sam_is_asked_as_its_own_forward_pass_does(tiny_sam2: Path, noise: Image.Image) -> None:
    """Its processor scales the picture to the square and places with it; without torchvision it cannot be loaded."""
    from transformers import Sam2Model

    scaled = torch.from_numpy(np.array(noise.resize((64, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    factors = torch.tensor([64 / noise.width, 64 / noise.height])
    with torch.inference_mode():
        found = Sam2Model.from_pretrained(tiny_sam2)(
            pixel_values=((scaled - mean) / std)[None],
            input_points=(torch.tensor(PROMPT.points) * factors)[None, None],
            input_labels=torch.tensor([[PROMPT.labels]]),
            input_boxes=(torch.tensor(PROMPT.box) * factors.repeat(2))[None, None],
            multimask_output=False,
        )
    ours = sam_of(tiny_sam2)
    logits = ours.predict(ours.look(noise), PROMPT)
    torch.testing.assert_close(logits, found.pred_masks[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_files_of_sam_2_that_say_they_are_for_video_are_read(
    tiny_sam2: Path, noise: Image.Image, tmp_path: Path
) -> None:
    import json
    import shutil

    shutil.copytree(tiny_sam2, tmp_path / "video")
    config = tmp_path / "video" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "sam2_video"}))
    assert kind_of(str(tmp_path / "video")) == "sam2_video"
    one, other = sam_of(tiny_sam2), sam_of(tmp_path / "video")
    assert torch.equal(one.predict(one.look(noise), PROMPT), other.predict(other.look(noise), PROMPT))


def test_cells_lie_where_they_are_in_the_picture(sam: Sam) -> None:
    """The grid covers the picture and no more than a part of a cell beyond it."""
    for size in ((50, 30), (30, 50), (64, 64), (200, 10)):
        view = sam.look(Image.new("RGB", size))
        rows, columns = view.features.shape[1:]
        assert size[0] <= columns * view.cell[0] < size[0] + view.cell[0] + 1e-6
        assert size[1] <= rows * view.cell[1] < size[1] + view.cell[1] + 1e-6
        covered = view.coverage(Image.new("L", size, 255))
        assert covered.shape == (rows, columns)
        torch.testing.assert_close(covered[:-1, :-1], torch.ones(rows - 1, columns - 1), rtol=0, atol=1e-4)


def test_coverage_and_middles_by_hand() -> None:
    view = View((10, 6), torch.zeros(1, 3, 4), (3.0, 2.0))  # the last column is the picture's by a third
    mask = Image.new("L", (10, 6))
    mask.paste(255, (3, 1, 10, 4))
    expected = torch.tensor([[0, 0.5, 0.5, 1 / 6], [0, 1, 1, 1 / 3], [0, 0, 0, 0]])
    torch.testing.assert_close(view.coverage(mask), expected, rtol=0, atol=1e-5)
    assert view.middle(0) == (1.5, 1.0) and view.middle(5) == (4.5, 3.0) and view.middle(11) == (9, 5.0)


def test_one_point_leaves_open_what_is_meant(sam: Sam, noise: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    forward = sam.model.forward

    def watched(**given: Any) -> Any:
        asked.append(given["multimask_output"])
        return forward(**given)

    monkeypatch.setattr(sam.model, "forward", watched)
    view = sam.look(noise)
    for prompt in (Prompt(((3, 3),), (1,)), PROMPT, Prompt(box=(1, 1, 9, 9))):
        sam.predict(view, prompt)
    assert asked == [True, False, False]
    found = sam.model(image_embeddings=view.encoded, input_points=torch.ones(1, 1, 1, 2), multimask_output=True)
    best = found.iou_scores[0, 0].argmax()
    scale = [side / inner for side, inner in zip(noise.size, sam._inner(noise.size), strict=True)]
    ours = sam.predict(view, Prompt(((scale[0], scale[1]),), (1,)))
    torch.testing.assert_close(ours, found.pred_masks[0, 0, best].float(), rtol=1e-4, atol=1e-5)


def test_masks_and_guidance_are_prompts_too(sam: Sam, noise: Image.Image) -> None:
    view = sam.look(noise)
    plain = sam.predict(view, PROMPT)
    again = sam.predict(view, PROMPT, previous=plain)
    guide = Guide(
        torch.rand(view.features.shape[1:], generator=torch.Generator().manual_seed(0)), view.features[:, 0, 0]
    )
    guided = sam.predict(view, PROMPT, guide=guide)
    assert plain.shape == again.shape == guided.shape
    assert not torch.allclose(plain, again) and not torch.allclose(plain, guided)
    assert torch.equal(plain, sam.predict(view, PROMPT))


def test_guided_attention_is_two_softmaxes() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 4, generator=draw) for tokens in (3, 5, 5))
    bias = torch.rand(1, 1, 1, 5, generator=draw)
    inner = torch.softmax(torch.einsum("bhqc,bhkc->bhqk", query, key) * 0.5, -1)
    outer = (inner + bias).exp() / (inner + bias).exp().sum(-1, keepdim=True)
    found, weights = guided_attention(None, query, key, value, bias, scaling=0.5, dropout=0.0)
    torch.testing.assert_close(weights, outer)
    torch.testing.assert_close(found, torch.einsum("bhqk,bhkc->bqhc", outer, value))
    plain, _ = guided_attention(None, query, key, value, None, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(plain, expected)


def test_a_picture_has_its_own_prompt_or_that_of_all(sam: Sam, noise: Image.Image) -> None:
    own, otherwise = Prompt(((5, 5),), (1,)), Prompt(((0.9, 0.9),), (1,))
    a, b = (Photo(Path(name), noise) for name in ("a.png", "b.png"))
    way = Prompted(sam, {"a.png": own}, otherwise)
    assert way(a).shape == (30, 50) and not np.array_equal(way(a), way(b))
    assert np.array_equal(way(b), Prompted(sam, {}, Prompt(((45, 27),), (1,)))(a))
    with pytest.raises(UserError, match=r"b.png: has no line in --prompts"):
        Prompted(sam, {"a.png": own}, None)(b)


def test_a_model_that_is_none_is_said(tmp_path: Path, tiny_sam: Path) -> None:
    with pytest.raises(UserError, match=r"--model .*: has no config.json that says what it is"):
        load([str(tmp_path)], CPU)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"its config.json says 'vit'; expected sam, sam2 or clipseg"):
        load([str(tmp_path)], CPU)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(UserError, match=r"--model .*: cannot be loaded"):
        load([str(tmp_path)], CPU)
    with pytest.raises(UserError, match=r"is a second model of its kind"):
        load([str(tiny_sam), str(tiny_sam)], CPU)
