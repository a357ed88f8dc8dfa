"""The page, in Gradio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image
from pydantic import ValidationError

from finetune.config.schema import SamplerConfig
from finetune.demo.columns import Columns, Settings, strengths_of
from finetune.errors import UserError

Gallery = list[tuple[Image.Image, str]]


def gradio() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gradio as found
    except ImportError as error:
        raise UserError("finetune demo needs Gradio: pip install 'finetune[demo]'") from error
    return found


def page(gr: Any, columns: Columns, strengths: str | None = None) -> Any:
    """The page of an adapter, to be launched.

    Args:
        gr: the module ``gradio``.
        strengths: filled in, with commas; what fits the adapter where it is not given.
    """
    filled = strengths or ",".join(f"{one:g}" for one in columns.strengths)

    def show(prompt: str, negative: str, seed: float, steps: float, guidance: float, asked: str) -> Iterator[Gallery]:
        shown: Gallery = []
        try:
            settings = Settings(
                strengths=strengths_of(asked),
                negative=negative.strip(),
                seed=int(seed),
                sampler=SamplerConfig(steps=int(steps), guidance=guidance),
            )
            for strength, picture in columns(prompt, settings):
                shown.append((picture, f"strength {strength:g}"))
                yield shown
        except (UserError, ValidationError) as error:
            raise gr.Error(str(error)) from error

    defaults = SamplerConfig()
    with gr.Blocks(title=columns.title) as blocks:
        gr.Markdown(f"# {columns.title}")
        prompt = gr.Textbox(value=columns.prompt, label="Prompt")
        negative = gr.Textbox(value="", label="Negative prompt")
        with gr.Row():
            asked = gr.Textbox(value=filled, label="Strengths")
            seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
            steps = gr.Slider(1, 100, value=defaults.steps, step=1, label="Steps")
            guidance = gr.Slider(0, 20, value=defaults.guidance, step=0.5, label="Guidance")
        button = gr.Button("Draw", variant="primary")
        gallery = gr.Gallery(columns=len(strengths_of(filled)), label="The same noise in all columns")
        button.click(show, inputs=[prompt, negative, seed, steps, guidance, asked], outputs=gallery)
    return blocks
