"""Source of the FiftyOne model zoo, which FiftyOne copies to its folder of models.

FiftyOne calls the functions of this file for the models of `manifest.json`. They use the installed package.

FiftyOne finds and deletes a model that is a folder only if its file name in the manifest is that of an archive. So the
names end with ".zip", and the files are in the folder that FiftyOne would extract such an archive to.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiftyone.operators import ExecutionContext
    from fiftyone.operators.types import Property

    from moondream_cv.integrations.fiftyone import MoondreamModel


def download_model(model_name: str, model_path: str) -> None:
    """Download the files of a model to FiftyOne's folder of models, or replace them.

    Args:
        model_name: Name in the zoo: "moondream-cv/" and the name for `moondream_cv.load`.
        model_path: Path in the manifest; the files are written to the folder of this name without ".zip".

    Raises:
        MoondreamError: The files cannot be downloaded.
        OSError: The folder cannot be replaced.
    """
    from moondream_cv.loading import download

    folder = Path(model_path).with_suffix("")
    incomplete = folder.with_suffix(".incomplete")
    download(model_name.removeprefix("moondream-cv/"), to=incomplete)
    if folder.exists():
        shutil.rmtree(folder)
    incomplete.rename(folder)


def load_model(model_name: str, model_path: str, **options: Any) -> MoondreamModel:
    """Load a downloaded model.

    Args:
        model_name: Name in the zoo.
        model_path: Path in the manifest, as for `download_model`.
        options: Arguments of `MoondreamModel` except `model`: `classes`, `skill` and the keyword arguments of
            `Detector`.

    Raises:
        TypeError: `classes` is missing, or an option is unknown.
        ValueError: An option is out of range.
        MoondreamError: The model cannot be loaded.
    """
    from moondream_cv.integrations.fiftyone import MoondreamModel

    return MoondreamModel(model=Path(model_path).with_suffix(""), **options)


def resolve_input(model_name: str, ctx: ExecutionContext) -> Property:
    """Return the inputs of `load_model` for the form in the FiftyOne App.

    Args:
        model_name: Name in the zoo.
        ctx: Context of the form.
    """
    from fiftyone.operators import types

    inputs = types.Object()
    inputs.list("classes", types.String(), required=True, label="Classes")
    inputs.enum("skill", ["detect", "point"], default="detect", label="Skill")
    return types.Property(inputs)
