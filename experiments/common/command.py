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

    def run(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unexpected arguments {arguments[1:]}")
        progress.start_logging()
        try:
            job(flags.FLAGS.config)
        except refusals as error:
            sys.exit(f"{pathlib.Path(arguments[0]).stem}: {error}")

    # Here and not at the top: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", config)
    app.run(run)
