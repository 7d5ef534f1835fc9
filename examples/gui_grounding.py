"""Find an element of a user interface in a screenshot by its description, and print where to click.

    python examples/gui_grounding.py screenshot.png "search button" --output marked.png

Prints x and y of the most confident point in pixels, from the top left corner. Describe one element by its text or
symbol and its type ("submit button", "trash icon"), without an action. docs/prompts.md has advice on screenshots.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from moondream_cv import MoondreamError, Pointer
from moondream_cv.images import to_rgb


def mark(image: Image.Image, x: float, y: float) -> None:
    """Draw a crosshair around a point, in red on white lines, so that it is visible on any background."""
    draw, radius = ImageDraw.Draw(image), max(8, min(image.size) // 30)
    for color, width in ("white", radius // 2), ("red", radius // 4):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
        for dx, dy in (1, 0), (-1, 0), (0, 1), (0, -1):
            start, end = (x + dx * radius, y + dy * radius), (x + dx * 2 * radius, y + dy * 2 * radius)
            draw.line((start, end), fill=color, width=width)


def main() -> None:
    """Parse the arguments, find the element, print its point and save the marked screenshot."""
    parser = argparse.ArgumentParser(description="Find an element of a user interface in a screenshot.")
    parser.add_argument("screenshot", type=Path, help="image file")
    parser.add_argument("element", help='description of the element, such as "search button"')
    parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
    parser.add_argument("--confidence", type=float, default=0.3, help="minimum confidence, 0 to 1 (default: 0.3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="image file for the screenshot with a marker")
    args = parser.parse_args()
    try:
        image = Image.fromarray(to_rgb(args.screenshot))
        with Pointer(args.model, confidence=args.confidence) as pointer:
            found = pointer(image, args.element)
        if not len(found):
            raise ValueError(f"{args.screenshot} has no {args.element!r}; use other words, or a crop of the window")
        best = int(found.confidence.argmax())
        x, y = found.xyxy[best, :2].tolist()
        print(f"{x:.0f} {y:.0f} (confidence {found.confidence[best]:.2f}, {len(found)} found)")
        if args.output is not None:
            mark(image, x, y)
            image.save(args.output)
    except (MoondreamError, ValueError, OSError) as error:
        raise SystemExit(f"gui_grounding.py: {error}") from None


if __name__ == "__main__":
    main()
