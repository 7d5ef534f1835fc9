"""Program that compiles a JSON schema from standard input, so that a hostile schema exhausts only this process.

It prints the compiler's error message, or nothing. `structured_output.py` runs it by its path and imports its limits,
so it must not import the package.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

CPU_SECONDS = 2
MEMORY_BYTES = 4 * 2**30
STACK_BYTES = 32 * 2**20  # the compiler recurses along references
LARGE_STACK_BYTES = 2 * STACK_BYTES  # for compiling a valid schema again in another process
OPTIONS = {  # the whitespace of `json.dumps`, so that a model cannot fill an answer with spaces
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


def compile_schema(schema: str, tokenizer: Any) -> Any:
    """Return an llguidance matcher for JSON that conforms to a schema.

    Raises:
        ValueError: The schema is invalid, unsupported or too complex.
    """
    import llguidance

    # Up to about 4 ms per decoding step, compared with 14 ms by default
    limits = llguidance.LLParserLimits(step_lexer_fuel=50_000, max_lexer_states=50_000, verbose_errors=False)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)  # type: ignore[arg-type]
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _main() -> None:
    import llguidance

    try:
        compile_schema(sys.stdin.buffer.read().decode(), llguidance.LLTokenizer("byte"))
    except ValueError as error:
        sys.stdout.write(str(error) or "invalid schema")


if __name__ == "__main__":
    try:
        import resource
    except ImportError:  # on Windows, only the time limit of the parent process applies
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=_main)
    worker.start()
    worker.join()
