"""The command ``coreset-jax``, which runs models that the library itself knows nothing of."""

import sys


def main() -> None:
    """Runs the command of the experiments, or says what it lacks."""
    try:
        from experiments.questions import prefix
    except ModuleNotFoundError as error:
        sys.exit(
            f"coreset-jax: no module {error.name}. The command runs pretrained models with the "
            "code and packages of the repository: there, make models installs it."
        )
    prefix.main()
