"""The `main` of every experiment."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from experiments.common import progress


def main(job: Callable[[Any], Any], config: str, *refusals: type[Exception]) -> None:
    """Runs a job with the configuration that the flag `--config` names, as an absl app.

    Args:
      job: takes the configuration.
      config: the default of the flag, a file of configurations.
      refusals: errors by which the job refuses a setting or a file: the program then ends with
        one line in place of a traceback.
    """

    def configured(arguments: Sequence[str]) -> None:
        if arguments:
            raise app.UsageError(f"unexpected arguments {list(arguments)}")
        job(flags.FLAGS.config)

    # Here and not at the top: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", config)
    run(configured, *refusals)


def run(job: Callable[[Sequence[str]], Any], *refusals: type[Exception]) -> None:
    """Runs a job with the words of the command line that are no flags, as an absl app.

    Args:
      job: takes the words behind the program's name.
      refusals: as for `main`.
    """

    def started(arguments: Sequence[str]) -> None:
        progress.start_logging()
        try:
            job(arguments[1:])
        except refusals as error:
            sys.exit(f"{pathlib.Path(arguments[0]).stem}: {error}")

    app.run(started)
