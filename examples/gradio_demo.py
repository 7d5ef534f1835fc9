"""Try detect, point, query and caption on a web page of this machine, with Gradio.

    python examples/gradio_demo.py --model moondream2

Then open http://127.0.0.1:7860. Requires `pip install "moondream-cv[examples]"`.
"""

import argparse
from collections.abc import Iterator
from itertools import accumulate

import gradio as gr
from PIL import Image

from moondream_cv import Detector, MoondreamError, Pointer
from moondream_cv.drawing import annotate
from moondream_cv.loading import open_model

SKILLS = ["Detect", "Point", "Query", "Caption"]
parser = argparse.ArgumentParser(description="Serve a page for images, class names and questions.")
parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")


def create_page(model) -> gr.Interface:
    """Return the page. The model decodes the requests of up to 16 browsers in one batch; others wait in a queue."""

    def run(image: Image.Image | None, skill: str, text: str) -> Iterator[tuple]:
        if image is None:
            raise gr.Error("Select an image.", print_exception=False)
        try:
            if skill in ("Detect", "Point"):
                find = (Detector if skill == "Detect" else Pointer)(model)
                detections = find(image, [name.strip() for name in text.split(",")])
                yield annotate(image, detections, has_scores=model.has_scores), f"{len(detections)} found"
                return
            yield image, ""
            reply = model.query(image, text, stream=True) if skill == "Query" else model.caption(image, stream=True)
            chunks = next(iter(reply.values()))
            yield from ((gr.skip(), shown) for shown in accumulate(chunks))  # the image is sent once
        except (MoondreamError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return gr.Interface(
        run,
        [gr.Image(type="pil"), gr.Radio(SKILLS, value="Detect"), gr.Textbox(label="class names or question")],
        [gr.Image(label="result", format="png"), gr.Textbox(label="answer")],
        concurrency_limit=16,
        flagging_mode="never",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    args = parser.parse_args()
    try:
        create_page(open_model(args.model)).launch(server_name="127.0.0.1", server_port=args.port)
    except (MoondreamError, ValueError, OSError) as error:  # OSError: another program uses the port
        raise SystemExit(f"gradio_demo.py: {error}") from None
