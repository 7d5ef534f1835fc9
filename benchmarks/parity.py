"""Compare this package with a checkout of the published implementation on fresh random weights.

    python benchmarks/parity.py --reference PATH/TO/moondream --seeds 3
    python benchmarks/parity.py --reference PATH/TO/moondream --golden tests/data/golden/mha

PATH is a checkout of github.com/vikhyat/moondream (2025-06), which is imported from there. Both implementations run in
float32 with greedy decoding on the same weights, tokenizer and crops. All objects, points, answers, captions and
reasoning are compared. The published code has no conversations, so its prefill and generation run on their tokens one
after another, in the layout of its authors' inference engine (kestrel 0.9.1). Crop size (378 pixels), grid (27) and
head size (64) are fixed, because the published code hard-codes them.

With `--golden`, the weights are those of a golden set, and its `conversations.json` is written: answers, and for each
step the token with the highest logit and its lead over the second highest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from moondream_cv.engine.crops import cut_crops, normalize
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.images import to_rgb
from moondream_cv.loading import load
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.requests import Chat, Turn
from moondream_cv.training.tokenizer import build_tokenizer

RESOLUTIONS = ((378, 378), (640, 480), (1280, 720), (200, 900), (50, 40))  # width, height
TEXT = {"temperature": 0, "max_tokens": 24}
GOLDEN_IMAGES = ("1_640x480.png", "0_378x378.png")
LOGIT_DECIMALS = 4


def random_config(arguments: argparse.Namespace, vocab_size: int) -> MoondreamConfig:
    """Return a config with the requested sizes and templates of ordinary tokens."""
    heads, kv_heads = arguments.heads, arguments.kv_heads or arguments.heads
    dim = 64 * heads
    return MoondreamConfig.from_dict(
        {
            "text": {
                "dim": dim,
                "ff_dim": 2 * dim,
                "n_layers": arguments.layers,
                "vocab_size": vocab_size,
                "n_heads": heads,
                "n_kv_heads": kv_heads,
            },
            "vision": {
                "enc_dim": arguments.vision_dim,
                "enc_ff_dim": 2 * arguments.vision_dim,
                "enc_n_heads": arguments.vision_heads,
                "proj_out_dim": dim,
                "proj_inner_dim": 2 * dim,
            },
            "region": {"dim": dim, "coord_feat_dim": 32, "size_feat_dim": 64, "inner_dim": 2 * dim},
            "tokenizer": {
                "templates": {
                    "caption": {"short": [1, 20, 2, 21, 3], "normal": [1, 20, 2, 22, 3], "long": [1, 20, 2, 23, 3]},
                    "query": {"prefix": [1, 24, 2], "suffix": [3]},
                    "detect": {"prefix": [1, 25, 26, 2], "suffix": [3]},
                    "point": {"prefix": [1, 27, 2], "suffix": [3]},
                }
            },
        }
    )


def random_network(config: MoondreamConfig, seed: int) -> MoondreamNetwork:
    """Return a network with random weights that give diverse replies of various lengths."""
    network = MoondreamNetwork(config)
    network.initialize(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        network.text.lm_head.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(seed + 1))
        network.region.coord_decoder.fc2.weight.mul_(4)
        network.region.size_decoder.fc2.weight.mul_(4)
    return network.eval()


def published(folder: Path, config: MoondreamConfig, network: MoondreamNetwork, tokenizer: Tokenizer) -> Any:
    """Return the published model with the same weights, tokenizer and float32 crops."""
    sys.path.insert(0, str(folder))
    from moondream.torch import moondream as module  # type: ignore[import-not-found]
    from moondream.torch.config import MoondreamConfig as PublishedConfig  # type: ignore[import-not-found]

    class LocalTokenizer:
        @staticmethod
        def from_pretrained(_: str) -> Tokenizer:
            return tokenizer

    def prepare_crops(image: Image.Image, _: Any, device: Any) -> tuple[torch.Tensor, tuple[int, int]]:
        crops = cut_crops(np.asarray(image.convert("RGB")), config.vision)
        return normalize(torch.from_numpy(crops.pixels).to(device), torch.float32), crops.tiling

    module.Tokenizer = LocalTokenizer
    module.prepare_crops = prepare_crops  # the published function rounds to bfloat16
    model = module.MoondreamModel(PublishedConfig.from_dict(config.to_dict()), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(network.state_dict(), strict=False)
    if unexpected or [k for k in missing if "cache" not in k]:
        raise SystemExit(f"the weights do not fit the reference: missing {missing}, unexpected {unexpected}")
    return model


def replies(model: Any, image: Image.Image) -> dict[str, Any]:
    """Return the replies of all skills to an image, without keys that only this package adds."""
    encoded = model.encode_image(image)
    found: dict[str, Any] = {}
    for name in ("dog", "red circle"):
        found[f"detect {name}"] = model.detect(encoded, name, settings={"max_objects": 6})["objects"]
        found[f"point {name}"] = model.point(encoded, name, settings={"max_objects": 8})["points"]
    found["query"] = model.query(encoded, "What color is the car?", settings=TEXT)
    found["spatial"] = model.query(
        encoded, "What is this?", spatial_refs=[(0.25, 0.75), (0.1, 0.2, 0.6, 0.9)], settings=TEXT
    )
    found["reasoning"] = model.query(encoded, "How many dogs are there?", reasoning=True, settings=TEXT)
    for length in ("short", "normal", "long"):
        found[f"caption {length}"] = model.caption(encoded, length, settings=TEXT)
    return {key: _plain(value) for key, value in found.items()}


def conversations(first: Any, second: Any) -> dict[str, tuple[Turn, ...]]:
    """Return conversations about two images, by name."""
    color, count = Turn("What color is the car?"), "How many dogs are there?"
    return {
        "one turn": (Turn(color.question, images=(first,)),),
        "two turns": (Turn(count, "two", (first,)), color),
        "without an image": (Turn(count, "two"), Turn("Are you sure?", "yes"), color),
        "two images in a turn": (Turn(count, "two", (first, second)), color),
        "an image in each turn": (Turn(count, "two", (first,)), Turn(color.question, images=(second,))),
        "an image in the second turn": (Turn(count, "none"), Turn(color.question, images=(first,))),
        "a greeting and a question without an answer": (Turn(None, "Hello"), Turn(count, None, (first,)), color),
    }


def published_conversation(model: Any, turns: tuple[Turn, ...], reasoning: bool = False) -> dict[str, Any]:
    """Return the published model's answer to the last question of a conversation.

    Args:
        model: The published model.
        turns: Turns with PIL images.
        reasoning: Generate reasoning before the answer.
    """
    # Lay out the tokens: the images of a turn, the prefix of the template, the question, the suffix twice, the answer
    config = model.config.tokenizer
    prefix, suffix = config.templates["query"]["prefix"], config.templates["query"]["suffix"]
    segments: list[Any] = [[config.bos_id]]
    for turn in turns:
        for image in turn.images:
            segments += [image, []]
        question = [] if turn.question is None else prefix + model.tokenizer.encode(turn.question).ids
        answer = [] if turn.answer is None else suffix + suffix + model.tokenizer.encode(turn.answer).ids
        segments[-1] += question + answer
    segments[-1] += [*suffix, config.thinking_id] if reasoning else suffix + suffix

    # Prefill all segments but the last
    size = model.config.text.max_context
    causal = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
    position = 0
    with torch.inference_mode():
        for segment in segments[:-1]:
            is_text = isinstance(segment, list)
            embeddings = model.text.wte[segment] if is_text else model._run_vision_encoder(segment)
            after_start = not is_text and position == 1
            if is_text and position == 0 and len(segment) == 1 and len(segments) > 1:
                start, position = embeddings, 1  # the beginning of the sequence attends to an image behind it
                continue
            if after_start:
                embeddings, position = torch.cat((start, embeddings)), 0
            positions = torch.arange(position, position + len(embeddings))
            mask = causal[:, :, positions].clone()
            if not is_text:
                mask[..., positions] = True
            if len(embeddings):
                model._prefill(embeddings[None], mask, positions, None)
            position += len(embeddings)

    # Generate the answer
    last, found = torch.tensor([segments[-1]]), {}
    if reasoning:
        position, text, grounding = model._generate_reasoning(last, position, TEXT, None, attn_mask=causal)
        found["reasoning"] = {"text": text, "grounding": grounding}
        last = torch.tensor([suffix])
    found["answer"] = "".join(model._generate_answer(last, position, TEXT, None, attn_mask=causal))
    return found


def record_golden(folder: Path, reference: Path) -> None:
    """Write the published model's answers to conversations about the images of a golden set."""
    ours = load(str(folder), device="cpu", dtype="float32")
    theirs = published(reference, ours.config, ours.network, ours.tokenizer)
    steps: list[torch.Tensor] = []
    theirs.text.lm_head.register_forward_hook(lambda _module, _inputs, logits: steps.append(logits.clone()))
    named = zip(
        conversations(*GOLDEN_IMAGES).items(),
        conversations(*(Image.fromarray(to_rgb(folder / "images" / name)) for name in GOLDEN_IMAGES)).values(),
        strict=True,
    )
    recorded: dict[str, Any] = {}
    for (name, turns), with_images in named:
        steps.clear()
        answer = published_conversation(theirs, with_images)["answer"]
        best = [logits[0].topk(2) for logits in steps]
        recorded[name] = {
            "turns": [[turn.question, turn.answer, list(turn.images)] for turn in turns],
            "answer": answer,
            "tokens": [int(top.indices[0]) for top in best],
            "leads": [round(float(top.values[0] - top.values[1]), LOGIT_DECIMALS) for top in best],
            "reasoning": published_conversation(theirs, with_images, reasoning=True),
        }
    (folder / "conversations.json").write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(recorded)} conversations written to {folder / 'conversations.json'}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in ("confidence", "truncated", "logprob")}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of the published implementation")
    parser.add_argument("--golden", type=Path, help="golden set to record conversations of")
    parser.add_argument("--seeds", type=int, default=1, help="number of random weight sets (default: 1)")
    for name, default in (("layers", 3), ("heads", 2), ("kv-heads", 0), ("vision-dim", 32), ("vision-heads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.golden is not None:
        record_golden(arguments.golden, arguments.reference)
        return
    tokenizer = build_tokenizer()
    differences = compared = 0
    for seed in range(arguments.seeds):
        config = random_config(arguments, tokenizer.get_vocab_size())
        network = random_network(config, seed)
        theirs = published(arguments.reference, config, network, tokenizer)
        ours = LocalModel(network, tokenizer, name="random")
        rng = np.random.default_rng(seed)
        for width, height in RESOLUTIONS:
            coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            expected, got = replies(theirs, image), replies(ours, image)
            flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for name, turns in conversations(image, flipped).items():
                for reasoning in (False, True):
                    key = f"{name}, reasoning" if reasoning else name
                    (result,) = ours.run([Chat(turns, reasoning, TEXT)])  # type: ignore[arg-type]
                    got[key] = _plain(result.to_dict())  # type: ignore[union-attr]
                    expected[key] = _plain(published_conversation(theirs, turns, reasoning))
            for key, value in expected.items():
                compared += 1
                if got[key] != value:
                    differences += 1
                    print(f"seed {seed}, {width}x{height}, {key}:\n  published {value}\n  ours      {got[key]}")
    print(f"{compared} replies compared, {differences} differ")
    raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
