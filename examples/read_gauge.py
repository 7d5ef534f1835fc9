"""Read an analog gauge from points on its needle and scale, and compare the value with the answer to a question.

    python examples/read_gauge.py gauge.jpg 0 10

The scale must run clockwise with equal divisions. Review the drawn points, and readings with a large difference.
"""

import argparse
import re

import numpy as np
from PIL import Image

from moondream_cv import MoondreamError, Pointer
from moondream_cv.drawing import annotate
from moondream_cv.images import to_rgb

PHRASES = ["tip of the needle", "center of the dial", "lowest mark of the scale", "highest mark of the scale"]
QUESTION = "What value does the gauge show? Answer with a number only."


def value_at(points: np.ndarray, minimum: float, maximum: float) -> float:
    """Return the value from the needle's tip, the center, the lowest and the highest mark, [4, 2] in pixels."""
    arms = points[[0, 2, 3]] - points[1]
    turn, start, sweep = np.arctan2(arms[:, 1], arms[:, 0])  # clockwise, because y points down
    turn, sweep = (turn - start) % (2 * np.pi), (sweep - start) % (2 * np.pi)
    if sweep < 0.1 or np.linalg.norm(arms, axis=1).min() < 1:
        raise ValueError(f"the points {np.rint(points).tolist()} are not those of a gauge; use other phrases")
    turn -= 2 * np.pi * (turn > sweep / 2 + np.pi)  # a needle below the lowest mark
    return float(minimum + (maximum - minimum) * turn / sweep)


def main() -> None:
    """Parse the arguments, read the gauge in both ways, and print the values and their difference."""
    parser = argparse.ArgumentParser(description="Read an analog gauge.")
    parser.add_argument("image", help="image file")
    parser.add_argument("scale", nargs=2, type=float, help="values at the lowest and at the highest mark")
    parser.add_argument("--phrases", nargs=4, default=PHRASES, metavar="PHRASE", help=f"default: {', '.join(PHRASES)}")
    parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
    parser.add_argument("--output", default="points.png", help="image file for the points (default: points.png)")
    args = parser.parse_args()
    try:
        image, pointer = Image.fromarray(to_rgb(args.image)), Pointer(args.model, max_objects=1)
        encoded = pointer.model.encode_image(image) if hasattr(pointer.model, "encode_image") else image
        found = pointer(encoded, args.phrases)
        annotate(image, found).save(args.output)
        if missing := sorted({*args.phrases} - {*found.data["class_name"]}):
            raise ValueError(f"no point for {', '.join(missing)} in {args.image}; use other --phrases")
        value = value_at(found.xyxy[:, :2], *args.scale)
        answer = pointer.model.query(encoded, QUESTION, settings={"temperature": 0})["answer"].strip()
        number = re.search(r"-?\d+(?:\.\d+)?", answer)
        print(f"points: {value:.4g} (lowest confidence {found.confidence.min():.2f})\nanswer: {answer or 'none'}")
        print(f"difference: {abs(value - float(number[0])):.4g}" if number else "difference: the answer has no number")
    except (MoondreamError, ValueError, OSError) as error:
        raise SystemExit(f"read_gauge.py: {error}") from None


if __name__ == "__main__":
    main()
