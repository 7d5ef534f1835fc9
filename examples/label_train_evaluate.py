"""Label a folder of images, fine-tune the model on the reviewed labels, and compare it before and after.

    python examples/label_train_evaluate.py photos/ dog "red car"
    python examples/label_train_evaluate.py photos/ dog "red car" --reviewed corrected/

The first command labels run/dataset. Correct the labels in a labeling tool (docs/labeling.md). The second command
trains on the split train, selects a checkpoint on valid, and prints AP and F1 on test, which training does not use.
"""

import argparse
from pathlib import Path

import supervision as sv
from supervision.metrics import AveragingMethod, F1Score, MeanAveragePrecision

from moondream_cv import Detector, MoondreamError, load
from moondream_cv.finetune import ft
from moondream_cv.finetune.datasets import load_dataset
from moondream_cv.finetune.training_run import TrainingOptions, run_training
from moondream_cv.labeling import label, merge_review


def evaluate(detector: Detector, folder: Path) -> str:
    """Return AP at IoU 0.50:0.95 and F1 at IoU 0.5 on a split of a COCO dataset."""
    dataset = sv.DetectionDataset.from_coco(str(folder), str(folder / "_annotations.coco.json"))
    ap, f1 = MeanAveragePrecision(), F1Score(averaging_method=AveragingMethod.MICRO)
    for path, _, true in dataset:
        found = detector(path, dataset.classes)
        ap.update(found, true), f1.update(found, true)
    return f"AP {ap.compute().map50_95:.3f}, F1 {f1.compute().f1_50:.3f} on {len(dataset)} images"


def main() -> None:
    """Parse the arguments and label; with reviewed labels, train and evaluate."""
    parser = argparse.ArgumentParser(description="Label a folder, train on the reviewed labels, and evaluate.")
    parser.add_argument("images", metavar="FOLDER", help="folder of images")
    parser.add_argument("classes", nargs="+", metavar="CLASS", help="class name, such as dog")
    parser.add_argument("--reviewed", metavar="FOLDER", help="corrected labels in any layout of docs/labeling.md")
    parser.add_argument("--output", type=Path, default=Path("run"), metavar="FOLDER", help="results (default: run)")
    parser.add_argument("--model", default="moondream2", help="name or folder of a local model (default: moondream2)")
    parser.add_argument("--steps", type=int, default=300, help="maximum number of training steps (default: 300)")
    args = parser.parse_args()
    folder = args.output / "dataset"
    try:
        with load(args.model) as model, ft("run", 8, model=model, root=args.output / "finetunes") as finetune:
            labeled = label(args.images, args.classes, folder, model=model, format="coco", split=(0.6, 0.2, 0.2))
            if args.reviewed is None:
                return print(f"Labeled {labeled.num_images} images; correct the labels, then add --reviewed FOLDER")
            print("Reviewed images:", merge_review(folder, args.reviewed)[0].num_reviewed)
            print("Before:", evaluate(Detector(model), folder / "test"))
            result = run_training(finetune, load_dataset(folder), TrainingOptions(steps=args.steps))
            adapter = result.checkpoint  # None if no checkpoint is better than the model
            print("After:", evaluate(Detector(model, adapter=adapter), folder / "test"), f"with the adapter {adapter}")
    except (MoondreamError, ValueError) as error:
        raise SystemExit(f"label_train_evaluate.py: {error}") from None


if __name__ == "__main__":
    main()
