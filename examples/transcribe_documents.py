"""Transcribe a folder of page images with a vision-language model: one Markdown file per page.

    python examples/transcribe_documents.py pages transcripts --strips 2

Pages with a transcript are skipped. `--strips` cuts long pages at their emptiest rows. docs/prompts.md has advice.
"""

import argparse
from pathlib import Path

import numpy as np

from moondream_cv import ImageError, MoondreamError, VisionModel
from moondream_cv.images import IMAGE_SUFFIXES, to_rgb
from moondream_cv.loading import open_model


def cut(page: np.ndarray, strips: int) -> list[np.ndarray]:
    """Cut a page [H, W, 3] into strips of similar height, at the rows with the least ink."""
    ink = np.convolve(page.std(axis=(1, 2), dtype=np.float32), np.ones(1 + len(page) // 200), "same")
    unit = max(1, len(page) // (4 * strips))
    starts = range(3 * unit, 4 * (strips - 1) * unit, 4 * unit)
    return np.split(page, [start + int(ink[start : start + 2 * unit].argmin()) for start in starts])


def transcribe(model: VisionModel, page: Path, strips: int, prompt: str) -> str:
    """Return the text of a page image."""
    images, settings = cut(to_rgb(page)[..., ::-1], strips), {"temperature": 0, "max_tokens": 1300}
    answers = [model.query(image, prompt, settings=settings) for image in images]
    print(f"{page}{' (cut short; use more strips)' if any(a['truncated'] for a in answers) else ''}", flush=True)
    return "\n\n".join(answer["answer"].strip() for answer in answers) + "\n"


def main() -> None:
    """Parse the arguments, and transcribe each page without a transcript."""
    parser = argparse.ArgumentParser(description="Transcribe a folder of page images.")
    parser.add_argument("folder", type=Path, help="folder of page images")
    parser.add_argument("output", type=Path, help="folder for the Markdown files")
    parser.add_argument("--strips", type=int, default=1, choices=range(1, 9), help="per page (default: 1)")
    parser.add_argument("--prompt", default="Transcribe the text in natural reading order", help="default: %(default)s")
    parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
    args, failures = parser.parse_args(), []
    try:
        pages = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        args.output.mkdir(parents=True, exist_ok=True)
        model, targets = open_model(args.model), [args.output / f"{page.name}.md" for page in pages]
        for page, target in [pair for pair in zip(pages, targets, strict=True) if not pair[1].exists()]:
            try:
                target.write_text(transcribe(model, page, args.strips, args.prompt), encoding="utf-8")
            except ImageError as error:
                failures.append(f"{page}: {error}")
    except (MoondreamError, ValueError, OSError) as error:
        raise SystemExit(f"transcribe_documents.py: {error}") from None
    if failures or not pages:
        raise SystemExit("\n".join([f"{args.folder}: {len(pages)} pages, {len(failures)} failed", *failures]))


if __name__ == "__main__":
    main()
