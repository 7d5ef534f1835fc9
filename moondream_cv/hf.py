"""Moondream 2 for transformers: after `register()`, `AutoModelForCausalLM.from_pretrained` gives this implementation.

Weights are read by this package's own loader, so every published layout works and every key is accounted for. What
transformers adds is the saving, and whatever builds on `PreTrainedModel`.

Leave out `trust_remote_code=True`: before version 5, transformers then runs the code published with the checkpoint
instead. A `config.json` needs `"model_type": "moondream1"`, as published files and those that this package
writes have; by it transformers finds this implementation.
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
from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.local import LocalModel
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
# What transformers hands on to every model, or what changes nothing here.
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
    """Make `AutoConfig` and `AutoModelForCausalLM` know this implementation; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, MoondreamHfConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoondreamHfConfig, MoondreamForCausalLM, exist_ok=True)


class MoondreamHfConfig(PretrainedConfig):
    """What a `config.json` says: the sections `text`, `vision`, `region` and `tokenizer`, or none of them.

    Published files have none; the release, or the sizes of the weights, then say what they are.
    """

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        # The pointers to published code, and the place that it keeps its own config in.
        kwargs.pop("auto_map", None)
        nested = kwargs.pop("config", None)
        if isinstance(nested, Mapping):
            kwargs = {**nested, **kwargs}
        super().__init__(**kwargs)

    @property
    def explicit(self) -> MoondreamConfig | None:
        """The config that the sections spell out, or None.

        Raises:
            CheckpointError: The sections are incomplete or wrong.
        """
        return explicit_config(vars(self))

    def take(self, config: MoondreamConfig) -> None:
        """Set the sections."""
        for name, section in config.to_dict().items():
            setattr(self, name, section)


class MoondreamForCausalLM(PreTrainedModel, PublishedMethods):
    """Moondream 2 as a `PreTrainedModel`, with the published methods.

    The first call of a method switches the weights to inference: they take no gradients from then on.

    Attributes:
        model: The weights, under the published key names.
        tokenizer: None in a model that was made from a config alone.
        calibration: What turns scores into probabilities; with other weights it is no longer right, and None is.
    """

    config_class = MoondreamHfConfig
    has_scores = True
    _supports_sdpa = True
    _no_split_modules = ("VisionBlock", "TextBlock")

    def __init__(self, config: MoondreamHfConfig) -> None:
        super().__init__(config)
        sizes = config.explicit or MoondreamConfig()
        config.take(sizes)
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
            config: Overrides what the checkpoint says of itself.
            revision: Of the repository; of a folder that says no sizes, the release that it is of.
            device_map: A device, {"": device}, or "auto" for the best device; None: where torch makes tensors.
            dtype: None and "auto": as the checkpoint was saved, or the best for the device.
            torch_dtype: The older name of `dtype`.
            output_loading_info: Give back (model, {}): there never are missing or unexpected keys.
            kwargs: `cache_dir`, `token`, `local_files_only`, `force_download`, for the hub.

        Raises:
            CheckpointError: It is missing or damaged, of an unknown release, or a weight is missing, unexpected or of a
                wrong shape.
            ValueError: An argument is not supported, or the device is not there.
        """
        options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        unsupported = sorted(k for k, v in kwargs.items() if k not in (*_HUB_OPTIONS, *_IGNORED) and v is not None)
        if unsupported or model_args:
            raise ValueError(
                f"from_pretrained takes no {', '.join(unsupported) or 'further positional arguments'} here"
            )
        device = _device(device_map)
        path, fetched = Path(pretrained_model_name_or_path).expanduser(), None
        if not path.exists():
            fetched = hub_source(os.fspath(pretrained_model_name_or_path), revision and str(revision), **options)
            path = fetched.folder
        if config is None:
            has_config = fetched is None or (path / "config.json").is_file()
            config = MoondreamHfConfig.from_pretrained(path) if has_config else MoondreamHfConfig()
        source = fetched or _local_source(path, revision, config)
        chosen = _dtype(dtype if dtype is not None else torch_dtype, device, config, source.config)
        tokenizer = source.tokenizer()
        network = load_network(source.weights, source.config, device, chosen)
        config.take(source.config)
        with torch.device("meta"):
            model = cls(config)
        model.model, model.tokenizer = network, tokenizer
        model.calibration = Calibration.from_folder(source.folder)
        model.eval()
        info: dict[str, Any] = {k: set() for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained` and `moondream_cv.load` read, tokenizer and calibration with it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.calibration is not None:
            self.calibration.write(folder / FILE_NAME)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def engine(self) -> LocalModel:
        """The model that runs requests on these weights, wherever they are now.

        Raises:
            CheckpointError: The model has no tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError("this model was made from a config and has no tokenizer; set model.tokenizer to one")
        now = (self.model.device, self.model.dtype)
        if self._engine is None or self._engine_on != now or self._engine.tokenizer is not self.tokenizer:
            tokenizer = prepare_tokenizer(self.tokenizer, self.model.config)
            self._engine = LocalModel(self.model, tokenizer, name=self.config.name_or_path)
            self._engine_on = now
        self._engine.calibration = self.calibration
        return self._engine

    @property
    def skills(self) -> frozenset[str]:  # type: ignore[override]
        """What the checkpoint can do."""
        return self.engine.skills

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """As `LocalModel.run`."""
        return self.engine.run(requests)

    def stream(self, request: Request) -> Iterator[Any]:
        """As `LocalModel.stream`."""
        return self.engine.stream(request)

    def encode_image(
        self,
        image: Any,
        settings: SettingsLike = None,
        previous: EncodedImage | None = None,
        tolerance: float = 0.0,
    ) -> EncodedImage:
        """As `LocalModel.encode_image`."""
        return self.engine.encode_image(image, settings, previous, tolerance)

    def generate(
        self, image_embeds: Any, prompt: str, tokenizer: Any, max_new_tokens: int = 128, **kwargs: Any
    ) -> list[str]:
        """Return a list with one answer; `query` is the newer method.

        As in the published model, `tokenizer`, `max_new_tokens` and further keyword arguments are accepted and do not
        affect the answer.

        Args:
            image_embeds: As `image` in `query`.
            prompt: The question in the form "<image>\\n\\nQuestion: ...\\n\\nAnswer:".

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
        """As `LocalModel.compile`; the arguments of `nn.Module.compile` are not used."""
        return self.engine.compile()

    def close(self) -> None:
        """As `LocalModel.close`."""
        self.engine.close()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as `__init__` made them."""

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
            raise ValueError(f'device_map must put everything on one device, as in {{"": "cuda"}}, not {device_map!r}')
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
        saved = None  # half precision saves space in files; CPUs are slow at it
    return choose_dtype(saved, device, sizes)
