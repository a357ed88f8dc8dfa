"""What a recipe's ``adapter`` section may say: one section a method, told apart by its ``kind``.

Each says of itself whether prompts have to be encoded anew in every step (``trains_text``), because something that
reads them learns, and what it trains in a few words (``summary``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from finetune.config.section import Fraction, Patterns, Probability, Section, Text


class _Weights(Section):
    """What adapters of whole layers have in common: they may train the text encoder as well."""

    text_encoder: bool = False
    """Also train the text encoder."""
    text_encoder_learning_rate: PositiveFloat | None = None
    """Replaces `train.learning_rate` for the text encoder."""

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded anew in every step."""
        return self.text_encoder

    def _where(self, wanted: str | list[str]) -> str:
        count = "" if isinstance(wanted, str) else f"{len(wanted)} pattern{'s' if len(wanted) > 1 else ''}"
        return f"{count or wanted}{' and the text encoder' if self.text_encoder else ''}"


class _Injected(_Weights):
    """What all adapters of single layers have in common."""

    targets: Text | Patterns = "attention"
    """A preset of the family (`attention`, `wide`, `conv`, ...) or regular expressions that match whole module paths
    of the denoiser."""
    module_dropout: Probability = 0.0
    """Share of the layers whose change is left out of a forward pass, while training; from the third step on."""

    @property
    def summary(self) -> str:
        """What is trained: "LoRA of rank 16 on attention"."""
        kind = str(getattr(self, "kind"))  # noqa: B009 - every kind has one
        names = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}
        size = f" of rank {self.rank}" if isinstance(self, _Ranked) else ""
        return f"{names[kind]}{size} on {self._where(self.targets)}"


class _Ranked(_Injected):
    """What adapters of low rank have in common."""

    rank: PositiveInt = 16
    """Inner size of the change; more can hold more, and costs more."""
    alpha: PositiveFloat | None = None
    """The change of a weight is scaled by `alpha / rank`; as large as the rank where it is not set."""


class LoraConfig(_Ranked):
    """Low-rank adaptation, through PEFT."""

    kind: Literal["lora"]
    dropout: Probability = 0.0
    """On the input of A, while training."""
    rank_dropout: Probability = 0.0
    """Share of the ranks that are left out, chosen anew for each sample, while training; from the third step on."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train the length of every weight row apart from its direction (Liu et al. 2024)."""
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    """Of A; B starts at zero. `pissa` starts both at the weight's largest singular vectors (Meng et al. 2024)."""
    ranks: dict[Text, PositiveInt] = {}
    """Ranks of their own for layers whose whole path a regular expression matches, the first that does;
    `alpha / rank` stays what it is."""
    lora_plus_ratio: PositiveFloat | None = None
    """LoRA+ (Hayou et al. 2024): B learns so many times faster than A; 16 is the paper's."""
    max_norm: PositiveFloat | None = None
    """After each step, a layer's change is scaled down to this Frobenius norm where it is longer."""

    @property
    def summary(self) -> str:
        """What is trained."""
        return super().summary.replace("LoRA", "DoRA") if self.use_dora else super().summary


class LokrConfig(_Ranked):
    """Kronecker products, through PEFT (LyCORIS, Yeh et al. 2024)."""

    kind: Literal["lokr"]
    factor: Annotated[int, Field(ge=-1)] = -1
    """How a weight's sides are divided between the two factors; -1 divides them as evenly as it goes."""


class LohaConfig(_Ranked):
    """Hadamard products of two low-rank changes, through PEFT (LyCORIS, Yeh et al. 2024)."""

    kind: Literal["loha"]


class OftConfig(_Injected):
    """Orthogonal fine-tuning: a layer's inputs are rotated, in blocks (Qiu et al. 2023), through PEFT."""

    kind: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)] = 8
    """Side of the rotated blocks; must divide the number of inputs of every target."""
    exact: bool = True
    """Cayley's transform by solving; else its five-term Neumann series, which is faster and only nearly orthogonal."""


class FullConfig(_Weights):
    """Whole weights: all of them or a selection."""

    kind: Literal["full"]
    select: Text | Patterns = "all"
    """A preset (`all`, `attention`, `cross-attention`, `cross-kv`) or regular expressions searched in the names of the
    denoiser's parameters."""
    detach_start: bool = False
    """Of cross-attention, let no gradient pass through key and value of the start token, so that its projection does
    not drift (Custom Diffusion, Kumari et al. 2023)."""

    @property
    def summary(self) -> str:
        """What is trained."""
        return f"weights: {self._where(self.select)}"


class TokenConfig(Section):
    """A new word."""

    token: Annotated[str, Field(pattern=r"^\S+$")]
    """As it stands in captions and prompts, for example `<zib>`."""
    vectors: PositiveInt = 1
    """How many vectors stand for it; more can hold more."""
    initializer: Text | None = None
    """Words that the vectors start at, in turn; random where it is not set."""

    @property
    def names(self) -> list[str]:
        """The tokens of its vectors: `<zib>`, `<zib>_1`, ..."""
        return [self.token, *(f"{self.token}_{place}" for place in range(1, self.vectors))]


class NormConfig(Section):
    """Keeps the new vectors as long as those of ordinary words are."""

    kind: Literal["hard", "decay", "std"]
    """After each step, `hard` scales each vector to the target; `decay` goes `min(1, 100 learning_rate)` of the way
    there (cloneofsimo); `std` pulls the spread of their numbers towards the table's (`(std_table / std)^0.1`)."""
    target: PositiveFloat | None = None
    """Length to keep to; the median length of the table's rows where it is not set."""


class EmbeddingConfig(Section):
    """Textual inversion: new words for a frozen model (Gal et al. 2022)."""

    kind: Literal["embedding"]
    tokens: Annotated[list[TokenConfig], Field(min_length=1)]
    """One or several."""
    templates: Text | None = None
    """Captions around the word: `object`, `style`, or a text file with one template a line, in which `[name]` is the
    word and `[filewords]` the picture's caption. Captions as they are where it is not set."""
    norm: NormConfig | None = None
    """How long vectors may become; as long as they like where it is not set."""
    regularisation: NonNegativeFloat = 0.0
    """Weight of the squared distance from where the vectors started, added to the loss."""
    progressive_steps: PositiveInt | None = None
    """Insert one vector at first, and one more after each so many steps; all from the start where it is not set."""

    @property
    def words(self) -> dict[str, int]:
        """How many vectors stand for each word."""
        return {token.token: token.vectors for token in self.tokens}

    def name(self, trigger: str | None) -> str | None:
        """What a concept's `trigger` makes of `[name]` in templates: itself where it holds a word, else the only one.

        None where there are several and nothing says which.
        """
        if trigger and any(word in trigger for word in self.words):
            return trigger
        return self.tokens[0].token if len(self.tokens) == 1 else None

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded anew in every step."""
        return True

    @property
    def summary(self) -> str:
        """What is trained."""
        count = sum(self.words.values())
        names = ", ".join(token.token for token in self.tokens)
        return f"{count} vector{'s' if count > 1 else ''} for {names}"


Activation = Literal[
    "linear",
    "relu",
    "leakyrelu",
    "elu",
    "swish",
    "tanh",
    "sigmoid",
    "softsign",
    "mish",
    "celu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "logsigmoid",
    "prelu",
    "relu6",
    "rrelu",
    "selu",
    "silu",
    "softplus",
    "softshrink",
    "tanhshrink",
]


class HypernetworkConfig(Section):
    """Small networks before the key and value layers of attention, as in A1111."""

    kind: Literal["hypernetwork"]
    sizes: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    """Widths of keys' and values' inputs that get a pair of networks; all of the model where it is not set. SD 1 has
    768 (the prompt, so cross-attention only), 320, 640 and 1280."""
    layers: Annotated[list[PositiveFloat], Field(min_length=2)] = [1, 2, 1]
    """Widths of a network's layers, as multiples of its input's; first and last are 1."""
    activation: Activation = "linear"
    """After each layer; `swish` is Hardswish, as in A1111. ComfyUI knows `linear`, `relu`, `leakyrelu`, `elu`, `swish`,
    `tanh`, `sigmoid`, `softsign` and `mish`."""
    activate_output: bool = False
    """Also after the last layer."""
    layer_norm: bool = False
    """After every layer."""
    dropout: list[Probability] | None = None
    """After each layer, one number for each entry of `layers`, the first and last 0."""
    init: Literal["normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"] = "normal"
    """Of the weights; `normal` has a standard deviation of 0.01, which begins near the untouched model."""
    zero_last: bool = False
    """Start the last layer at zero, so that training begins at the untouched model; A1111 does not."""

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded anew in every step."""
        return False

    @property
    def summary(self) -> str:
        """What is trained."""
        shape = ", ".join(f"{width:g}" for width in self.layers)
        return f"a hypernetwork of [{shape}] {self.activation}"


class AestheticConfig(Section):
    """Aesthetic gradients: the mean of pictures' CLIP embeddings, towards which a text encoder is moved per prompt."""

    kind: Literal["aesthetic"]
    clip: Text | None = None
    """A CLIP model whose text tower is the base's text encoder; the embedded one's own where it is not set."""
    steps: Annotated[int, Field(ge=0)] = 10
    """Steps of Adam for each prompt."""
    learning_rate: PositiveFloat = 1e-4
    """Of these steps."""
    weight: Fraction = 0.9
    """Share of the adapted encoding."""
    mix: Literal["lerp", "slerp"] = "lerp"
    """How the two encodings are mixed."""
    bake_prompts: list[Text] = []
    """Adapt the encoder to these prompts together, and write the change as a LoRA of the text encoder."""
    bake_rank: PositiveInt = 16
    """Of that LoRA."""

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded anew in every step."""
        return False

    @property
    def summary(self) -> str:
        """What is made."""
        return "an aesthetic embedding"


class PivotalConfig(Section):
    """New words and weights together: pivotal tuning, and Custom Diffusion with `weights: {kind: full}`."""

    kind: Literal["pivotal"]
    embedding: EmbeddingConfig
    """The words."""
    weights: Annotated[LoraConfig | FullConfig, Field(discriminator="kind")]
    """What else trains."""
    mode: Literal["concurrent", "two-phase"] = "concurrent"
    """Both from the first step, or the words first and the weights from the pivot on."""
    pivot: Fraction = 0.5
    """Share of the steps after which the words rest, bit for bit; 1 lets them learn to the end."""
    embedding_learning_rate: PositiveFloat | None = None
    """Replaces `train.learning_rate` for the words."""

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded anew in every step."""
        return True

    @property
    def summary(self) -> str:
        """What is trained."""
        return f"{self.embedding.summary}, and {self.weights.summary}"


def new_words(adapter: AdapterConfig) -> EmbeddingConfig | None:
    """The section of an adapter that brings new words, if it has one."""
    return (
        adapter.embedding
        if isinstance(adapter, PivotalConfig)
        else (adapter if isinstance(adapter, EmbeddingConfig) else None)
    )


InjectedConfig = LoraConfig | LokrConfig | LohaConfig | OftConfig
AdapterConfig = Annotated[
    InjectedConfig | FullConfig | EmbeddingConfig | HypernetworkConfig | AestheticConfig | PivotalConfig,
    Field(discriminator="kind"),
]
