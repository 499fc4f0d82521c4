"""The log of an experiment, and how far along its work is."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import rich.console
import rich.progress
from absl import logging

Item = TypeVar("Item")

# Without a terminal a progress line goes to the log this often, in seconds.
_LOG_EVERY = 15.0


def start_logging() -> None:
    """Shows the log of an experiment, and of JAX only what went wrong."""
    logging.set_verbosity(logging.INFO)
    # JAX tells of every backend that it does not find.
    logging.get_absl_logger().manager.getLogger("jax").setLevel("WARNING")


def track(
    items: Sequence[Item], description: str, *, label: Callable[[Item], str] = str
) -> Iterator[Item]:
    """Yields the items while showing how far along they are and what is left.

    A bar on a terminal, lines in the log elsewhere.

    Args:
      items: what is worked through.
      description: the name of the work.
      label: a few words for the item at hand.
    """
    if not sys.stderr.isatty():
        started = shown = time.monotonic()
        for count, item in enumerate(items):
            now = time.monotonic()
            if count == 0 or now - shown > _LOG_EVERY:
                logging.info(
                    "%s %d/%d, %.0f s: %s",
                    description,
                    count,
                    len(items),
                    now - started,
                    label(item),
                )
                shown = now
            yield item
        elapsed = time.monotonic() - started
        logging.info("%s %d/%d, %.0f s: done", description, len(items), len(items), elapsed)
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[label]}"),
        console=rich.console.Console(stderr=True),
    ) as bar:
        task = bar.add_task(description, total=len(items), label="")
        for item in items:
            bar.update(task, label=label(item))
            yield item
            bar.advance(task)
