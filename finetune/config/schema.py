"""What a recipe may say. Every key is listed here, with its default and its unit; an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finetune.config.adapters import AdapterConfig
from finetune.config.buckets import BucketsConfig
from finetune.config.crop import CropConfig
from finetune.config.memory import Dtype, QuantizeConfig
from finetune.config.objective import ObjectiveConfig
from finetune.config.optimizer import AdamWConfig, OptimizerConfig
from finetune.config.origin import EMBEDDED, DatasetConfig
from finetune.config.rates import last_step
from finetune.config.schedule import ScheduleConfig
from finetune.config.section import Fraction, Probability, Section, Text
from finetune.config.tools import Tool
from finetune.config.wording import FolderName, WordingConfig


class ModelConfig(Section):
    """The base model."""

    path: Text = "tinyworld"
    """A diffusers folder, a single-file checkpoint (`.safetensors`), a hub name, or a small model that is shipped with
    the toolkit: `tinyworld` in the layout of Stable Diffusion 1, `tinyworld-flow` in that of Stable Diffusion 3."""
    family: Text | None = None
    """The architecture; read from the model's own files where it is not set."""
    revision: Text | None = None
    """Commit or tag of a hub model."""
    like: Text | None = None
    """Of a single file: a diffusers folder or hub name of the same kind of model, of which settings, tokenizers and the
    networks that the file lacks are taken. SD 1, 2 and XL can do without: docs/models.md."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """Of a single file of SD 1, 2 or XL: what it predicts, where it does not say so itself."""
    prompt_chunks: PositiveInt = 1
    """How many times the text encoder's 77 tokens a prompt may fill, in training and in pictures; it takes as many as
    it needs. 1 cuts what is longer."""
    dtype: Dtype = "float32"
    """Of the frozen denoiser and text encoders in memory. What trains is float32 in any case."""
    vae_dtype: Dtype = "float32"
    """Of the autoencoder."""
    vae_tiling: bool = False
    """Encode and decode large pictures in overlapping tiles: less memory, and latents that are a little different."""
    quantize: QuantizeConfig | None = None
    """Keep the linear layers of the denoiser's blocks in 8 or 4 bits; what trains is added on top."""
    block_swap: NonNegativeInt = 0
    """How many of the denoiser's blocks lie in the host's memory and come to the device when they are due. Needs
    `train.gradient_checkpointing`."""

    def dtype_of(self, network: str) -> Dtype:
        """Of a family's network."""
        return self.vae_dtype if network == "vae" else self.dtype

    def format_of(self, network: str) -> QuantizeConfig | None:
        """What the layers of a family's network are packed in; None where they are not."""
        chosen = self.quantize
        packed = chosen and (network == "denoiser" or (chosen.text_encoders and network != "vae"))
        return chosen if packed else None


class ConceptConfig(Section):
    """Pictures that belong together: a subject, a style."""

    folder: Text | None = None
    """Pictures, with captions beside them or in `metadata.jsonl`, `.csv` or `.parquet`. A URL such as `s3://bucket/rex`
    is mirrored into the cache folder; `tinyworld:subject/N` and `tinyworld:style/N` draw one of the embedded
    world's."""
    shards: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """Tar files of pictures and captions, as WebDataset has them, in place of a folder: `data/{000..009}.tar`,
    `data/*.tar`, a list, or URLs."""
    dataset: DatasetConfig | None = None
    """A table of pictures in place of a folder: of the Hugging Face hub, `datasets` or Parquet."""
    prompt: Text | None = None
    """For pictures that have no caption of their own: "a photo of zib star"."""
    captions: Literal["auto", "sidecar", "metadata", "prompt", "filename", "folder"] = "auto"
    """Where captions come from; `auto` takes metadata, then a text file beside the picture, then the prompt. `filename`
    takes the picture's name, `folder` the folder's where it is called as kohya has it: `10_zib star`."""
    caption_lines: Literal["join", "choose", "first"] = "join"
    """Of a text file beside a picture: `join` makes its lines one caption, `choose` a caption each, of which every draw
    takes one, `first` leaves out all but the first."""
    class_prompt: Text | None = None
    """What the subject is, without the rare token: "a star". Needed by prior preservation."""
    trigger: Text | None = None
    """The rare token of the prompt: "zib"."""
    masks: Text | None = None
    """Folder of masks with the pictures' names (white counts), or its URL; `alpha` takes the pictures' own, `shards`
    the members `….mask.png` beside them."""
    repeats: PositiveInt = 1
    """How often each picture appears in an epoch; with `captions: folder` the folder's number where it is not set."""
    weight: PositiveFloat = 1.0
    """How much each picture counts in the loss."""
    timestep_bias: float | None = None
    """Positive to learn more from noisy times (composition), negative from clear ones (texture); that of
    `objective.timesteps` where it is not set."""

    @property
    def source(self) -> str:
        """Where the pictures come from, as messages and plans call it."""
        if self.dataset is not None:
            return self.dataset.path
        shards = self.shards if isinstance(self.shards, list) else [self.shards] if self.shards else []
        more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
        return self.folder or f"{shards[0]}{more}"

    @property
    def embedded(self) -> bool:
        """Whether the embedded world draws the pictures."""
        return self.folder is not None and self.folder.startswith(EMBEDDED)

    @property
    def folder_name(self) -> FolderName | None:
        """What the folder's name says; None where it is not called like `10_zib star`."""
        return FolderName.of(Path(self.folder).name) if self.folder else None

    @model_validator(mode="before")
    @classmethod
    def _repeats_of_folder(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("captions") == "folder" and isinstance(keys.get("folder"), str):
            name = FolderName.of(Path(keys["folder"]).name)
            return {"repeats": name.repeats, **keys} if name else keys
        return keys


class CacheConfig(Section):
    """What is encoded once and kept. Entries are keyed by content, so a stale one is never read."""

    folder: Text = ".cache/finetune"
    """May be shared by runs and may be removed at any time."""
    latents: bool = True
    """What the autoencoder makes of each picture."""
    text: bool = True
    """Only while no text encoder trains; it is off otherwise."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of latents. 16 bits take half the space; a run then learns from rounded latents, whether they are kept or not."""


class DataConfig(Section):
    """Pictures and captions."""

    concepts: Annotated[list[ConceptConfig], Field(min_length=1)]
    """One or several; draws are shared among them by their pictures and repeats."""
    balance: bool = False
    """Draw every concept equally often, however many pictures it has."""
    resolution: PositiveInt = 512
    """Side of the square that pictures are scaled and cropped to, in pixels; with `buckets` the root of their area."""
    more_resolutions: list[PositiveInt] = []
    """Every picture is also drawn at these, as often as at the first. Class images keep to the first."""
    buckets: BucketsConfig | None = None
    """Several shapes in place of the square, each picture in the nearest."""
    crop: CropConfig = CropConfig()
    flip: bool = False
    """Mirror half of the draws."""
    caption_dropout: Probability = 0.0
    """Share of draws that see the empty caption."""
    caption_dropout_every_n_epochs: Annotated[int, Field(ge=2)] | None = None
    """All draws of every n-th epoch see the empty caption, besides."""
    wording: WordingConfig | None = None
    """What is done to the other draws' captions; they stay as they are where it is not set."""
    unmasked_weight: Fraction = 0.0
    """How much places outside a mask count."""
    strict: bool = False
    """Refuse what is doubtful of pictures and captions, and would be a line of the log otherwise: docs/data.md."""
    unmasked_probability: Probability = 0.0
    """Share of draws in which all places count, as if there were no mask."""
    cache: CacheConfig = CacheConfig()


class SamplerConfig(Section):
    """How pictures are drawn from a model."""

    steps: PositiveInt = 25
    """Denoising steps of a picture."""
    guidance: NonNegativeFloat = 5.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_rescale: Fraction = 0.0
    """Keeps strong guidance from overexposing (Lin et al. 2023): about 0.7 with `objective.zero_terminal_snr`."""
    scheduler: Text | None = None
    """A scheduler class of diffusers; the model's own where it is not set."""


class ImagesPrior(Section):
    """Prior preservation by pictures of the class, drawn once by the untouched model."""

    kind: Literal["images"]
    layout: Literal["pairwise", "mixed"] = "pairwise"
    """`pairwise`: as many class images as subject pictures in every step. `mixed`: class images are ordinary samples of
    the batch, weighted."""
    weight: NonNegativeFloat = 1.0
    """Lambda of the paper."""
    count: PositiveInt = 100
    """Class images per class prompt."""
    folder: Text | None = None
    """Where class images are kept, or your own pictures of the class; below the cache folder where it is not set."""
    sampler: SamplerConfig = SamplerConfig()
    batch_size: PositiveInt = 8
    """Class images drawn at a time."""


class ModelPrior(Section):
    """Prior preservation by the untouched model's own predictions for the class prompt; needs no pictures."""

    kind: Literal["model"]
    weight: NonNegativeFloat = 1.0
    """Lambda of the paper."""


class NoPrior(Section):
    """No prior preservation."""

    kind: Literal["none"]


PriorConfig = Annotated[ImagesPrior | ModelPrior | NoPrior, Field(discriminator="kind")]


class EmaConfig(Section):
    """A moving average of the trained weights; it is what is exported."""

    decay: Probability
    """Share of the average that each step keeps: 0.999."""
    warmup: bool = True
    """Rise to `decay` as (1 + step) / (10 + step)."""


class TrainConfig(Section):
    """The loop."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 1
    """Subject pictures per process and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    learning_rate: PositiveFloat = 1e-4
    """The highest that the schedule reaches. With `prodigy` it multiplies a rate that is found, and is 1 by default."""
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm where they are longer."""
    max_grad_value: PositiveFloat | None = None
    """Every number of a gradient is cut to this size, instead of scaling by `max_grad_norm`."""
    ema: EmaConfig | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the forward and backward pass; trained weights stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer: slower, less memory."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the accelerator that launched processes are given, else the CPU."""
    threads: PositiveInt | None = None
    """CPU threads of each process; the cores divided among the processes of this machine where it is not set."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_prodigy(cls, keys: Any) -> Any:
        """The default of a rate that is only a factor."""
        optimizer = keys.get("optimizer") if isinstance(keys, dict) else None
        named = optimizer.get("name") if isinstance(optimizer, dict) else getattr(optimizer, "name", None)
        return {"learning_rate": 1.0, **keys} if named == "prodigy" else keys

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: ``steps``, or fewer where ``schedule.rates`` end before."""
        return min(self.steps, last_step(self.schedule.pairs) or self.steps)

    @property
    def peak_learning_rate(self) -> float:
        """The highest that the schedule reaches."""
        return max((pair.rate for pair in self.schedule.pairs), default=self.learning_rate)


class CheckpointConfig(Section):
    """What a run can be continued from."""

    every: PositiveInt | None = None
    """Optimizer steps between checkpoints; only at the end and on a signal where it is not set."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many are kept. At least two: the last one may be the one being written."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the output folder, where it holds the same run."""


class SamplesConfig(Section):
    """Pictures drawn while training."""

    every: PositiveInt | None = None
    """Optimizer steps between them; none where it is not set."""
    prompts: list[str] = []
    """What to draw; some of the concepts' own prompts where there are none."""
    per_prompt: PositiveInt = 1
    """Pictures per prompt."""
    strength: float = 1.0
    """How much what was trained counts in them: 0 is the base, 1 all of it. Whole weights, words and rotations have 1
    alone."""
    sampler: SamplerConfig = SamplerConfig()


class ExportConfig(Section):
    """What is written at the end. Every file is loaded again and compared before the run counts as done."""

    formats: (
        Annotated[
            list[Literal["diffusers", "kohya", "peft", "a1111", "delta", "bundle", "single-file"]], Field(min_length=1)
        ]
        | None
    ) = None
    """Layouts of the files; all that the method has where it is not set: docs/formats.md."""
    tools: Annotated[list[Tool], Field(min_length=1)] | None = Field(default=None, alias="for")
    """In place of `formats` the tools that shall read them: each gets the layout that it reads best."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the tensors in the files."""


class ReportConfig(Section):
    """The page that shows what a run did."""

    enabled: bool = True
    """Write `report.html` at the end."""
    prompts: list[str] = []
    """New scenes for the subject; the embedded world brings its own."""
    per_prompt: PositiveInt = 4
    """Pictures per prompt."""
    sampler: SamplerConfig = SamplerConfig()


class Recipe(Section):
    """Everything that decides a run."""

    recipe: Literal[
        "dreambooth",
        "lora",
        "full",
        "textual_inversion",
        "hypernetwork",
        "pivotal",
        "custom_diffusion",
        "aesthetic",
    ]
    """Which page under recipes/ runs it."""
    output: Text
    """Folder of the run."""
    seed: NonNegativeInt = 0
    """Of everything random in the run: two runs of one recipe and seed are the same."""
    profile: Literal["8gb", "12gb", "16gb", "24gb", "80gb"] | None = None
    """Memory of the GPU: fills what this recipe leaves unset of the keys that decide about memory (docs/memory.md)."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig
    data: DataConfig
    prior: PriorConfig = NoPrior(kind="none")
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
