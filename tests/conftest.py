"""The environment that JAX must find when it is first imported, and what all tests share."""

import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Tests that run a program in a process of its own hand the same environment on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Four CPU devices make a mesh. One thread an operation, since every core has a worker. Most of the
# time goes into compilation, and much of that into optimisation that small arrays do not need.
FLAGS = ["--xla_force_host_platform_device_count=4", "--xla_cpu_multi_thread_eigen=false"]
if os.environ["JAX_PLATFORMS"] == "cpu":
    FLAGS.append("--xla_backend_optimization_level=0")
    # The older emitters compile in half the time. XLA ends a process for a flag it does not know.
    if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in FLAGS:
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
for library in ("MKL", "OMP", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# Programs need not know which line of Python they come from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# JAX names a stored program after its text, the versions, the flags and the machine, so that a
# stale one is never taken.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Shapes and dtypes of annotations are checked in all calls, if asked for. This imports JAX.
if os.environ.get("CHECK_SHAPES"):
    install_import_hook("coreset_jax", "tests.typechecking.check")
    importlib.import_module("tests.typechecking")

# The first example compiles; and the same examples are drawn in every run.
settings.register_profile("coreset", deadline=None, derandomize=True)
settings.load_profile("coreset")


# Examples of docstrings that compile as long as the slow tests.
SLOW_EXAMPLES = (
    "coreset_jax.baselines.attention_matching.attention_matching",
    "coreset_jax.baselines.quantized.quantized",
    "coreset_jax.baselines.wildcat.wildcat",
    "coreset_jax.budgets.adaptive.adaptive",
    "coreset_jax.budgets.energy.by_energy",
    "coreset_jax.budgets.pyramid.pyramid",
    "coreset_jax.combinators.chunked",
    "coreset_jax.combinators.keep_ends",
    "coreset_jax.compression.compress_to_error",
    "coreset_jax.guarantees.adversary.adversary",
    "coreset_jax.guarantees.hard_instances.index_game",
    "coreset_jax.nn.cache.CoresetCache",
    "coreset_jax.nn.linen.CoresetAttention",
    "coreset_jax.nn.nnx.CoresetAttention",
    "coreset_jax.nn.rotary.rotate",
    "coreset_jax.refit.attention_matching",
    "coreset_jax.refit.matching",
    "coreset_jax.refit.move_keys",
    "coreset_jax.refit.nystrom",
    "coreset_jax.streaming.merge_and_reduce",
)


# Variants of tests that compile as long, one a line. Others of a test, or tests of the parts,
# hold the same property in the fast tier.
SLOW_VARIANTS = frozenset((ROOT / "tests" / "slow_variants.txt").read_text().splitlines())


class _EverywhereToo:
    """What examples in the library's modules need as well.

    Compiled programs are let go before there are too many; the cache on disk has most of them.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.name in SLOW_EXAMPLES or item.nodeid in SLOW_VARIANTS:
                item.add_marker(pytest.mark.slow)
        # A name that no test has any more would be slow in nobody's eyes. Files whose tests were
        # asked for one by one do not tell.
        found = {item.nodeid for item in items}
        whole = {item.nodeid.partition("::")[0] for item in items}
        if not items or any("::" in each for each in items[0].config.args):
            return
        gone = [name for name in SLOW_VARIANTS - found if name.partition("::")[0] in whole]
        if gone:
            raise pytest.UsageError(f"tests/slow_variants.txt names no test: {sorted(gone)}")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        # After every test: one alone may take ten thousand.
        from experiments.common import programs

        programs.forget_if_many()


def pytest_configure(config: pytest.Config) -> None:
    """Registers what doctests need as well: hooks of this file would only see its own folder."""
    config.pluginmanager.register(_EverywhereToo())
    # Traces are large graphs that are not garbage: looking through them takes a tenth of the time.
    gc.set_threshold(200_000, 50, 100)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One worker a core that this process may use, and no more than memory surely holds."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 8)
    return min(os.cpu_count() or 1, 8)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session")
def programs() -> Callable[[], int]:
    """How many XLA programs were compiled so far, or taken from the cache on disk."""
    import jax

    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **more: names.append(name))
    return lambda: names.count("/jax/core/compile/backend_compile_duration")
