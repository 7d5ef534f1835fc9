"""Small files in the layouts of published benchmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(shade: int, suffix: str = "png") -> bytes:
    """Return an image file of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(buffer, "jpeg" if suffix == "jpg" else suffix)
    return buffer.getvalue()


def write_image(path: Path, shade: int = 0) -> None:
    """Write an image of one color, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(shade, path.suffix[1:]))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> None:
    """Write rows with an image column of the `datasets` library. The shade of an image is the index of its row.

    Args:
        path: Parquet file.
        rows: Other columns of each row.
        group: Number of rows per row group.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": encoded(index), "path": f"{index}.png"} for index in range(len(rows))]
    columns: dict[str, Any] = {"image": pictures}
    columns.update({name: [row[name] for row in rows] for name in rows[0]})
    pq.write_table(pa.table(columns), path, row_group_size=group)


def text_entry(image: str, answers: list[str]) -> dict[str, Any]:
    """Return a question of TextVQA."""
    return {"question": "what brand?", "image_id": image, "question_id": 34602, "answers": answers, "set_name": "val"}
