"""Models and processors by name or path: offline for paths, safetensors only, no code of strangers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available, logging

from finetune.data.folders import nearest_folder
from finetune.errors import UserError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = ("*.json", "*.txt", "*.csv", "*.model", "*.jinja")  # what describes a model, of some megabytes at most
TAGS = "selected_tags.csv"
NETWORK = "model.onnx"
CPU = torch.device("cpu")
_FILMS = "; processors that read films too, as Qwen-VL's, need torchvision: pip install 'finetune[caption]'"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies, and how it is loaded.

    Attributes:
        option: that names it, for messages.
        name: as the user gave it.
        folder: that holds its files.
        device: where it computes.
        dtype: of its weights.
    """

    option: str
    name: str
    folder: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def kind(self) -> str | None:
        """The ``model_type`` of its config.json; None where there is none."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{path}: is not JSON: {error}") from None
        return config.get("model_type") if isinstance(config, dict) else None

    def model(self, kind: Any) -> Any:
        """The network, to read only, as class ``kind`` of transformers has it.

        Raises:
            UserError: it cannot be loaded, or its file lacks weights, which would have been random ones.
        """
        logging.disable_progress_bar()
        try:
            model, found = kind.from_pretrained(
                self.folder,
                dtype=self.dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"{self.option} {self.name}: cannot be loaded: {_first_line(error)}") from error
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{self.option} {self.name}: {len(missing)} weights that transformers expects are not in its files, "
                f"such as {missing[0]}; its layout may need code of its own, which is never run"
            )
        return model.to(self.device).eval().requires_grad_(False)

    def processor(self) -> Any:
        """What makes tensors of pictures and words.

        Raises:
            UserError: it cannot be loaded.
        """
        try:
            return AutoProcessor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a missing torchvision shows itself in many ways, AttributeError among them
            hint = "" if is_torchvision_available() else _FILMS
            raise UserError(
                f"{self.option} {self.name}: its processor cannot be loaded: {_first_line(error)}{hint}"
            ) from error

    def put(self, inputs: Any) -> Any:
        """A processor's tensors where the network is, those of pictures in its precision."""
        return inputs.to(self.device, self.dtype)


def find(
    name: str,
    revision: str | None = None,
    device: torch.device = CPU,
    precision: Precision = "auto",
    option: str = "--model",
) -> Source:
    """The model of that name: a folder, or a repository of the Hugging Face hub, which is fetched if need be.

    Args:
        revision: of a repository; its newest where it is not given.
        precision: "auto" is float32 on a CPU, bfloat16 on a GPU that has it and else float16.
        option: that names the model, for messages.

    Raises:
        UserError: there is no such folder, or it cannot be fetched.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or not _HUB_NAME.fullmatch(name) or folder.parent.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"{option}: {name} {found}; expected a folder or a name of the hub{nearest_folder(folder)}")
        folder = _fetch(name, revision, option)
    return Source(option, name, folder, device, _dtype(precision, device))


def _fetch(name: str, revision: str | None, option: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_SMALL)))
        weights = [NETWORK] if (folder / TAGS).is_file() else ["*.safetensors"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL, *weights]))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {name} is no folder and could not be fetched: {_first_line(error)}") from error


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
