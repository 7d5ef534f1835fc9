"""The tokenizer of the tiny model: byte-level BPE over the vocabulary of the synthetic scenes.

Every word of the vocabulary, with its leading space, becomes one token, because names of several tokens are learned
more slowly. Other text is encoded byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moondream_cv.scenes.world import ALL_NAMES, COLORS, plural, with_article
from moondream_cv.training.prompts import COLUMNS, ROWS

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|prompt|>",
    "<|input|>",
    "<|answer|>",
    "<|thinking|>",
    "<|coord|>",
    "<|size|>",
    "<|start_ground|>",
    "<|reserved|>",
    "<|end_ground|>",
)


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer. The result is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _corpus() -> Iterator[str]:
    """Yield the training text: each word four times, names with articles, and sentence fragments."""
    # Words, with a leading space
    names = [*ALL_NAMES, "object"]
    words = [
        *names,
        *(plural(n) for n in names),
        *COLORS,
        *ROWS,
        *COLUMNS,
        "point",
        "detect",
        "caption",
        "query",
        "short",
        "normal",
        "long",
    ]
    for word in words:
        for _ in range(4):
            yield f" {word}"

    # Names with articles
    for name in names:
        article = with_article(name)
        yield from (article, f" {article}", article.capitalize())

    # Fragments of questions and answers
    sentences = (
        "How many are there? how many are there? Count the",
        "What colour is the? What color is the? what colour is this? What is this? what is this?",
        "Is there a? is there an? yes no",
        "There is 1 object: and a, an, There are objects. An empty picture. at the",
        " 0 1 2 3 4 5 6 7 8 9 10",
        " I see",
    )
    for sentence in sentences:
        for _ in range(4):
            yield sentence
