"""The progress bar: prompts done, tokens a second, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fisher_vmap.running.compute import Progress


@contextmanager
def bar(total: int | None) -> Iterator[Callable[[Progress], None]]:
    """A bar over `total` prompts (None: not known); the function it gives takes each step forward."""
    tokens = 0
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, unit="prompt", dynamic_ncols=True, smoothing=0.1, mininterval=0.5) as line,
    ):

        def report(step: Progress) -> None:
            nonlocal tokens
            tokens += step.tokens
            elapsed = line.format_dict["elapsed"]
            if step.tokens and elapsed:
                line.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
            line.update(step.prompts)

        yield report
