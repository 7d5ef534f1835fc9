"""Moondream 2 for transformers: after `register()`, `AutoModelForCausalLM.from_pretrained` returns this implementation.

Weights are read by the loader of this package, which supports every published layout and checks every key. Saving, and
everything that builds on `PreTrainedModel`, comes from transformers.

Omit `trust_remote_code=True`: with it, transformers before version 5 runs the code published with the checkpoint
instead. The `config.json` must contain `"model_type": "moondream1"`, as published files and those written by this
package do; transformers selects this implementation by it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moondream_cv.engine.calibration import FILE_NAME, Calibration
from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import CheckpointError
from moondream_cv.loading import choose_device, choose_dtype
from moondream_cv.model.checkpoints import MODEL_TYPE, load_network
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.releases import DEFAULT_REPO, explicit_config, find_release
from moondream_cv.model.sources import Source, hub_source, local_source
from moondream_cv.model.tokenizer import prepare_tokenizer
from moondream_cv.requests import Request, Result
from moondream_cv.vision_model import PublishedMethods, SettingsLike

_HUB_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")
# Arguments that transformers passes to every model, and arguments without an effect here
_IGNORED = (
    "_commit_hash",
    "_from_auto",
    "adapter_kwargs",
    "attn_implementation",
    "code_revision",
    "low_cpu_mem_usage",
    "proxies",
    "trust_remote_code",
    "use_safetensors",
)
_QUESTION = re.compile(r"<image>\n\nQuestion: (.*)\n\nAnswer:", re.DOTALL)
_WHOLE_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def register() -> None:
    """Register this implementation with `AutoConfig` and `AutoModelForCausalLM`. Repeated calls have no effect."""
    AutoConfig.register(MODEL_TYPE, MoondreamHfConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoondreamHfConfig, MoondreamForCausalLM, exist_ok=True)


class MoondreamHfConfig(PretrainedConfig):
    """Content of a `config.json`: the sections `text`, `vision`, `region` and `tokenizer`, or none of them.

    Published files have no sections. In this case, the release or the sizes of the weights determine the configuration.
    """

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        # References to published code, and the nested config that it uses
        kwargs.pop("auto_map", None)
        nested = kwargs.pop("config", None)
        if isinstance(nested, Mapping):
            kwargs = {**nested, **kwargs}
        super().__init__(**kwargs)

    @property
    def explicit(self) -> MoondreamConfig | None:
        """Configuration in the sections; None without sections.

        Raises:
            CheckpointError: Sections are missing or have invalid values.
        """
        return explicit_config(vars(self))

    def set_sections(self, config: MoondreamConfig) -> None:
        """Set the sections to a configuration."""
        for name, section in config.to_dict().items():
            setattr(self, name, section)


class MoondreamForCausalLM(PreTrainedModel, PublishedMethods):
    """Moondream 2 as a `PreTrainedModel`, with the published methods.

    The first call of a method sets the weights to inference: they require no gradients from then on.

    Attributes:
        model: Network with the published key names.
        tokenizer: Tokenizer; None in a model that was created from a config alone.
        calibration: Maps scores to probabilities; set it to None after changing the weights.
    """

    config_class = MoondreamHfConfig
    has_scores = True
    _supports_sdpa = True
    _no_split_modules = ("VisionBlock", "TextBlock")

    def __init__(self, config: MoondreamHfConfig) -> None:
        super().__init__(config)
        sizes = config.explicit or MoondreamConfig()
        config.set_sections(sizes)
        self.model = MoondreamNetwork(sizes)
        if self.model.device.type != "meta":
            self.model.initialize()
        self.tokenizer: Tokenizer | None = None
        self.calibration: Calibration | None = None
        self._engine: LocalModel | None = None
        self._engine_on: tuple[torch.device, torch.dtype] | None = None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: MoondreamHfConfig | None = None,
        revision: str | None = None,
        device_map: Any = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint.

        Args:
            pretrained_model_name_or_path: A local folder, or a repository on the hub.
            config: Configuration that replaces that of the checkpoint.
            revision: Revision of the repository; for a folder without sizes, its release.
            device_map: A device, {"": device}, or "auto" for the best device; None: torch's default device.
            dtype: Data type of the weights; None or "auto": as saved in the checkpoint, or the best for the device.
            torch_dtype: Older name of `dtype`.
            output_loading_info: Return (model, info); its lists of keys are empty, because other keys are errors.
            kwargs: `cache_dir`, `token`, `local_files_only` and `force_download`, for the hub.

        Raises:
            CheckpointError: The checkpoint is missing, damaged or of an unknown release, or a weight is missing,
                unexpected or of a wrong shape.
            ValueError: An argument is not supported, or the device is not available.
        """
        # Check the arguments
        options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        unsupported = sorted(k for k, v in kwargs.items() if k not in (*_HUB_OPTIONS, *_IGNORED) and v is not None)
        if unsupported or model_args:
            names = ", ".join(unsupported) or "further positional arguments"
            raise ValueError(f"from_pretrained does not support {names} for this model")
        device = _device(device_map)

        # Find the checkpoint and its config
        path, fetched = Path(pretrained_model_name_or_path).expanduser(), None
        if not path.exists():
            fetched = hub_source(os.fspath(pretrained_model_name_or_path), revision and str(revision), **options)
            path = fetched.folder
        if config is None:
            has_config = fetched is None or (path / "config.json").is_file()
            config = MoondreamHfConfig.from_pretrained(path) if has_config else MoondreamHfConfig()
        source = fetched or _local_source(path, revision, config)
        chosen = _dtype(dtype if dtype is not None else torch_dtype, device, config, source.config)

        # Load the weights
        tokenizer = source.tokenizer()
        network = load_network(source.weights, source.config, device, chosen)
        config.set_sections(source.config)
        with torch.device("meta"):
            model = cls(config)
        model.model, model.tokenizer = network, tokenizer
        model.calibration = Calibration.from_folder(source.folder)
        model.eval()
        info: dict[str, Any] = {k: set() for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained` and `moondream_cv.load` can read, including tokenizer and calibration.

        Args:
            save_directory: Folder to write; it is created if it does not exist.
            args: Positional arguments of `PreTrainedModel.save_pretrained`.
            kwargs: Keyword arguments of `PreTrainedModel.save_pretrained`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.calibration is not None:
            self.calibration.write(folder / FILE_NAME)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def engine(self) -> LocalModel:
        """Model that runs requests with these weights on their current device.

        Raises:
            CheckpointError: The model has no tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError("this model was created from a config and has no tokenizer; set model.tokenizer")
        now = (self.model.device, self.model.dtype)
        if self._engine is None or self._engine_on != now or self._engine.tokenizer is not self.tokenizer:
            tokenizer = prepare_tokenizer(self.tokenizer, self.model.config)
            self._engine = LocalModel(self.model, tokenizer, name=self.config.name_or_path)
            self._engine_on = now
        self._engine.calibration = self.calibration
        return self._engine

    @property
    def skills(self) -> frozenset[str]:  # type: ignore[override]
        """Skills of the checkpoint."""
        return self.engine.skills

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests; see `LocalModel.run`."""
        return self.engine.run(requests)

    def stream(self, request: Request) -> Iterator[Any]:
        """Stream one reply; see `LocalModel.stream`."""
        return self.engine.stream(request)

    def encode_image(
        self,
        image: Any,
        settings: SettingsLike = None,
        previous: EncodedImage | None = None,
        tolerance: float = 0.0,
    ) -> EncodedImage:
        """Encode an image; see `LocalModel.encode_image`."""
        return self.engine.encode_image(image, settings, previous, tolerance)

    def generate(
        self, image_embeds: Any, prompt: str, tokenizer: Any, max_new_tokens: int = 128, **kwargs: Any
    ) -> list[str]:
        """Return a list with one answer; `query` is the newer method.

        As in the published model, `tokenizer`, `max_new_tokens` and further keyword arguments are accepted and do not
        affect the answer.

        Args:
            image_embeds: Image, as in `query`.
            prompt: Question in the form "<image>\\n\\nQuestion: ...\\n\\nAnswer:".

        Raises:
            ImageError: The image cannot be read.
            ValueError: The prompt has another form.
        """
        match = _QUESTION.fullmatch(prompt)
        if match is None:
            form = "<image>\n\nQuestion: ...\n\nAnswer:"
            raise ValueError(f"prompt must have the form {form!r}, got {prompt!r:.200}; or use query(image, question)")
        return [self.query(image_embeds, match[1])["answer"]]

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings [vocab_size, dim] as a module that shares their memory."""
        # On the meta device, because nn.Embedding would fill its own weights first.
        vocab_size, dim = self.model.text.wte.shape
        embeddings = nn.Embedding(vocab_size, dim, device="meta", dtype=self.model.dtype)
        embeddings.weight = self.model.text.wte
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings.

        Args:
            value: A module with a `weight` of the same shape [vocab_size, dim].

        Raises:
            ValueError: The shape differs.
        """
        weight, expected = value.weight, self.model.text.wte.shape
        if not isinstance(weight, torch.Tensor) or weight.shape != expected:
            raise ValueError(
                f"the embeddings must have the shape {list(expected)}, got {list(getattr(weight, 'shape', ()))}; "
                "the size of the vocabulary is fixed by the checkpoint"
            )
        self.model.text.wte = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self._engine = None

    def input_embeds(
        self, input_ids: torch.Tensor | Sequence[int], *, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return the embeddings [..., dim] of token IDs [...].

        Args:
            input_ids: A tensor of integers, or a list or tuple.
            device: Device of the IDs before the lookup; None: the device of the model.
        """
        ids = torch.as_tensor(input_ids, device=self.model.device if device is None else device)
        return self.model.text.embed(ids)

    def compile(self, *args: Any, **kwargs: Any) -> float:
        """Compile the vision encoder; see `LocalModel.compile`. The arguments of `nn.Module.compile` are ignored."""
        return self.engine.compile()

    def close(self) -> None:
        """Free the weights; see `LocalModel.close`."""
        self.engine.close()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that `__init__` created."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}


def _local_source(path: Path, revision: str | None, config: MoondreamHfConfig) -> Source:
    if config.explicit is not None:
        return Source(path, config.explicit)
    return local_source(path, find_release(DEFAULT_REPO, revision) if revision else None)


def _device(device_map: Any) -> torch.device:
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, Mapping):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise ValueError(f'device_map must name a single device, as in {{"": "cuda"}}, got {device_map!r}')
        (device_map,) = devices
    if isinstance(device_map, str) and device_map in _WHOLE_DEVICE_MAPS:
        device_map = None
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    return choose_device(device_map)


def _dtype(
    asked: str | torch.dtype | None, device: torch.device, config: MoondreamHfConfig, sizes: MoondreamConfig
) -> torch.dtype:
    if asked not in (None, "auto"):
        return choose_dtype(asked, device, sizes)
    saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if device.type == "cpu" and str(saved).endswith("float16") and not str(saved).endswith("bfloat16"):
        saved = None  # float16 saves space in files, but is slow on CPUs
    return choose_dtype(saved, device, sizes)
