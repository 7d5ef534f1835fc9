"""`SamMasks`: masks of objects in boxes, with SAM and SAM 2 of transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moondream_cv.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEFAULT_SAM = "facebook/sam2.1-hiera-small"

_CLASSES = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}
"""Class of transformers for each model type. Published checkpoints of SAM 2 have the type of its video model."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_PROMPTS = 64  # in one pass of the mask decoder, to limit its memory


class SamMasks:
    """Mask function that runs SAM or SAM 2.

    The image is encoded once per call, and its boxes are decoded together. The model predicts three masks for a box,
    and the one with the highest predicted IoU is returned. A box without area is a point on the object. Thread-safe.

    Examples:
        >>> detector = Detector("moondream2", masks=SamMasks())  # doctest: +SKIP
        >>> detector(frame, "dog").mask  # doctest: +SKIP

    Attributes:
        model: `SamModel` or `Sam2Model` of transformers.
    """

    def __init__(
        self, model: str | os.PathLike[str] | PreTrainedModel = DEFAULT_SAM, *, device: str | None = None
    ) -> None:
        """Load a model, or use a loaded one.

        Args:
            model: Repository on the hub, folder of a checkpoint, or a loaded `SamModel` or `Sam2Model`. A name may
                start a download.
            device: Device for a model given by name, such as "cuda:1". None selects the best available. On a CUDA
                device, the data type is bfloat16.

        Raises:
            CheckpointError: The model cannot be loaded, is neither SAM nor SAM 2, or needs a newer transformers.
            ValueError: The device is not available, or `model` is neither a name nor a model with weights.
        """
        if isinstance(model, (str, os.PathLike)):
            self.model = _load(os.path.expanduser(os.fspath(model)), device)
        elif getattr(getattr(model, "config", None), "model_type", None) not in ("sam", "sam2"):
            raise ValueError(
                f"model must be the name or folder of a SAM or SAM 2 checkpoint, a SamModel or a Sam2Model, got "
                f"{type(model).__name__}"
            )
        elif device is not None:
            raise ValueError(f"device applies to a model given by name only, got {device!r}; move the model instead")
        elif model.device.type == "meta":
            raise ValueError(f"model must have weights, got a {type(model).__name__} on the device meta; load it first")
        else:
            self.model = model
        self._keeps_aspect_ratio = self.model.config.model_type == "sam"
        self._size = int(self.model.config.prompt_encoder_config.image_size)

    def __call__(self, image: npt.NDArray[np.uint8], xyxy: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return the masks of the objects in boxes.

        Args:
            image: RGB pixels [H, W, 3].
            xyxy: Boxes [n, 4] in pixels of the image; boxes without area are points.

        Returns:
            Masks [n, H, W].
        """
        import torch

        height, width = image.shape[:2]
        boxes = np.asarray(xyxy, dtype=np.float32).reshape(-1, 4)
        masks = np.zeros((len(boxes), height, width), dtype=np.bool_)
        if not len(boxes):
            return masks
        is_point = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
        with torch.inference_mode():
            # Encode the image
            pixels, input_hw = self._preprocess(image)
            embeddings = self.model.get_image_embeddings(pixels)
            scale = np.array([input_hw[1] / width, input_hw[0] / height] * 2, dtype=np.float32)

            # Decode boxes and points, a limited number at a time
            for indices, as_points in ((np.flatnonzero(~is_point), False), (np.flatnonzero(is_point), True)):
                for first in range(0, len(indices), _MAX_PROMPTS):
                    chosen = indices[first : first + _MAX_PROMPTS]
                    logits = self._decode(embeddings, boxes[chosen] * scale, as_points)
                    for index, logit in zip(chosen, logits, strict=True):  # one at a time, to save memory
                        masks[index] = self._resize(logit, input_hw, (height, width)).cpu().numpy()
        return masks

    def _preprocess(self, image: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return an image as the model's input, and its (height, width) there.

        SAM 2 stretches the image to a square. SAM scales its longer side, and pads below and on the right. The image
        processors of transformers do the same, but those of SAM 2 require torchvision.
        """
        import torch
        from torch.nn.functional import interpolate, pad

        height, width = image.shape[:2]
        scale = self._size / max(height, width)
        size = (self._size, self._size)
        if self._keeps_aspect_ratio:
            size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        device = self.model.device if self.model.device.type == "cuda" else "cpu"  # MPS may lack the resize kernel
        pixels = torch.tensor(np.ascontiguousarray(image), dtype=torch.float32, device=device)
        pixels = pixels.permute(2, 0, 1)[None]  # [1, 3, H, W]
        resized = interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).round()
        constants = torch.tensor((_MEAN, _STD), dtype=torch.float32, device=pixels.device)
        mean, std = constants.view(2, 3, 1, 1)
        normalized = (resized / 255 - mean) / std
        padded = pad(normalized, (0, self._size - size[1], 0, self._size - size[0]))
        return padded.to(self.model.device, self.model.dtype), size

    def _decode(self, embeddings: Any, boxes: npt.NDArray[np.float32], as_points: bool) -> torch.Tensor:
        """Return the best mask of each box as low-resolution logits [n, h, w], float32.

        Args:
            embeddings: Image embeddings of the model.
            boxes: Boxes [n, 4] in pixels of the model's input.
            as_points: Use the upper left corners of the boxes as points.
        """
        import torch

        prompts = torch.tensor(boxes, dtype=torch.float32, device=self.model.device)[None]  # [1, n, 4]
        if as_points:
            labels = torch.ones((1, len(boxes), 1), dtype=torch.int32, device=prompts.device)
            inputs = {"input_points": prompts[:, :, None, :2], "input_labels": labels}
        else:
            inputs = {"input_boxes": prompts}
        output = self.model(image_embeddings=embeddings, multimask_output=True, **inputs)
        best = output.iou_scores[0].argmax(dim=-1)  # [n]
        return output.pred_masks[0][torch.arange(len(boxes), device=best.device), best].float()

    def _resize(self, logits: torch.Tensor, input_hw: tuple[int, int], image_hw: tuple[int, int]) -> torch.Tensor:
        """Return logits [h, w] as a mask of the image size [H, W]."""
        from torch.nn.functional import interpolate

        logits = logits[None, None]
        if self._keeps_aspect_ratio:
            logits = interpolate(logits, (self._size, self._size), mode="bilinear", align_corners=False)
            logits = logits[..., : input_hw[0], : input_hw[1]]
        return interpolate(logits, image_hw, mode="bilinear", align_corners=False)[0, 0] > 0


def is_sam_folder(name: str) -> bool:
    """Return whether a name is that of a folder with a checkpoint of SAM or SAM 2."""
    try:
        return json.loads((Path(name).expanduser() / "config.json").read_text())["model_type"] in _CLASSES
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return False


def _load(name: str, device: str | None) -> PreTrainedModel:
    """Load a model for inference.

    Raises:
        CheckpointError: The model cannot be loaded, is neither SAM nor SAM 2, or needs a newer transformers.
        ValueError: The device is not available.
    """
    import torch
    import transformers
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from moondream_cv.loading import choose_device

    # Check the device and the name
    chosen = choose_device(device)
    if os.path.isfile(name):
        raise _load_error(name, "it is a file")
    if not os.path.isdir(name):
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise _load_error(name, "there is no such folder, and it is not the name of a repository") from None

    try:
        # Find the class
        content = transformers.PretrainedConfig.get_config_dict(name)[0]
        kind = content.get("model_type")
        if kind not in _CLASSES:
            raise CheckpointError(
                f"{name} is not a SAM or SAM 2 checkpoint: its model type is {kind!r}; use {DEFAULT_SAM}"
            )
        model_class = getattr(transformers, _CLASSES[kind], None)
        if model_class is None:
            raise CheckpointError(
                f"{name} needs a transformers with {_CLASSES[kind]}, and {transformers.__version__} does not have it; "
                "pip install -U transformers"
            )

        # Load the weights
        config = model_class.config_class.from_dict({**content, "model_type": model_class.config_class.model_type})
        model: PreTrainedModel
        model, report = model_class.from_pretrained(name, config=config, use_safetensors=True, output_loading_info=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise errors of several libraries
        raise _load_error(name, str(error).strip().partition("\n")[0] or type(error).__name__) from error
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random values
        raise _load_error(name, f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    return model.eval().to(chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32)


def _load_error(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot load the segmentation model {name}: {reason.rstrip('.:')}; use a folder, or a repository such as "
        f"{DEFAULT_SAM}"
    )
