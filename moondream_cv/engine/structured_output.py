"""Structured output: answers whose tokens are constrained so that they conform to a JSON schema."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moondream_cv.engine import schema_check
from moondream_cv.errors import MoondreamError, SchemaError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.tokenizer import control_ids

COMPILER_THREADS = 2
CHECK_SECONDS = 10.0  # wall-clock time limit; the CPU time limit is lower
CHECKED_SCHEMAS = 256


class GrammarMatcher:
    """The state of one constrained answer: which tokens may come next.

    Attributes:
        finished: Whether the answer is complete and nothing can follow.
    """

    def __init__(self, matcher: Any, selectable: np.ndarray) -> None:
        """Wrap a fresh matcher.

        Args:
            matcher: An `llguidance.LLMatcher`.
            selectable: [ceil(vocab_size / 32)] int32 bitmask of the tokens that any answer may contain.
        """
        self._matcher, self._selectable = matcher, selectable
        self.finished = False

    def bitmask(self) -> np.ndarray:
        """Return the tokens that may come next as an [ceil(vocab_size / 32)] int32 bitmask, lowest bit first.

        An error of the matcher is raised by the next `accept`: one sequence must not fail the step of a batch.
        """
        bitmask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        return np.bitwise_and(bitmask, self._selectable)

    def accept(self, token: int) -> None:
        """Advance by a token.

        Args:
            token: ID of the sampled token.

        Raises:
            SchemaError: The schema is too complex to continue.
        """
        if self._matcher.is_error() or not self._matcher.consume_token(token):
            raise _rejected(self._matcher.get_error())
        self.finished = self._matcher.is_stopped()


class GrammarCompiler:
    """Compiles JSON schemas for the tokenizer of a model, in background threads."""

    def __init__(self, tokenizer: Tokenizer, config: MoondreamConfig) -> None:
        """Create a compiler. The tokenizer's table is built and threads are started for the first schema.

        Args:
            tokenizer: Tokenizer of the checkpoint.
            config: Configuration of the checkpoint.
        """
        self._tokenizer, self._config = tokenizer, config
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._table: tuple[Any, np.ndarray] | None = None
        self._checked: OrderedDict[str, str] = OrderedDict()  # schema → error message, empty if it compiles

    def submit(self, schema: str) -> Future[GrammarMatcher]:
        """Compile a schema in the background.

        Args:
            schema: JSON schema as text.

        Returns:
            A future that raises `SchemaError` for an invalid, unsupported or too complex schema, and `MoondreamError`
            if llguidance is not installed.
        """
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(COMPILER_THREADS, thread_name_prefix="moondream-cv schema")
            before = threading.stack_size(schema_check.LARGE_STACK_BYTES)  # for a thread that `submit` may start
            try:
                return self._pool.submit(self.compile, schema)
            finally:
                threading.stack_size(before)

    def compile(self, schema: str) -> GrammarMatcher:
        """Compile a schema in the calling thread.

        Args:
            schema: JSON schema as text.

        Raises:
            SchemaError: The schema is invalid, unsupported or too complex.
            MoondreamError: llguidance is not installed.
        """
        tokenizer, selectable = self._tokenizer_table()
        message = self._check(schema)
        if message:
            raise _rejected(message)
        try:
            return GrammarMatcher(schema_check.compile_schema(schema, tokenizer), selectable)
        except ValueError as error:
            raise _rejected(str(error)) from error

    def close(self) -> None:
        """Stop the background threads after their current schemas."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None

    def _tokenizer_table(self) -> tuple[Any, np.ndarray]:
        """Return llguidance's tokenizer, and the bitmask of tokens that are text or the end of an answer."""
        try:
            import llguidance
        except ImportError as error:
            raise MoondreamError(
                'structured output (json_schema) needs llguidance; pip install "moondream-cv[server]"'
            ) from error
        with self._lock:
            if self._table is None:
                size, tokens = self._config.text.vocab_size, self._config.tokenizer
                selectable = np.zeros(-(-size // 32) * 32, bool)
                selectable[list(self._tokenizer.get_vocab().values())] = True
                selectable[list(control_ids(tokens).values())] = False
                selectable[tokens.eos_id] = True
                table = llguidance.LLTokenizer(
                    self._tokenizer.to_str(),
                    n_vocab=size,
                    eos_token=tokens.eos_id,
                    slices=llguidance.LLTokenizer.json_slices(),
                )
                self._table = table, np.packbits(selectable, bitorder="little").view(np.int32)
            return self._table

    def _check(self, schema: str) -> str:
        """Compile a schema in a process with resource limits and return the error message, empty if it compiles.

        Compilation has no time limit: the intersection of a few regular expressions can take minutes.
        """
        with self._lock:
            known = self._checked.get(schema)
        if known is not None:
            return known
        try:
            done = subprocess.run(
                [sys.executable, schema_check.__file__],
                input=schema.encode(),
                capture_output=True,
                timeout=CHECK_SECONDS,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            message = done.stdout.decode("utf-8", "replace") if not done.returncode else "it takes too long to compile"
        except subprocess.TimeoutExpired:
            message = "it takes too long to compile"
        with self._lock:
            self._checked[schema] = message
            while len(self._checked) > CHECKED_SCHEMAS:
                self._checked.popitem(last=False)
        return message


def _rejected(message: str) -> SchemaError:
    first = message.strip().splitlines()[0] if message.strip() else "unknown error"
    if "regex parse error" in first:
        first = message.strip().splitlines()[-1]
    return SchemaError(f"the JSON schema is invalid, unsupported or too complex: {first:.300}")
