"""One thread of PyTorch, exact float32 in JAX, a disk cache of compiled programs, tiny checkpoints made by PyTorch."""

import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

ORACLES = {"torch", "diffusers", "transformers", "peft"}  # what needs one that is not installed is skipped

MAPPED_REGIONS = 45_000

gc.set_threshold(10_000, 20, 100)  # of the millions of objects that PyTorch and JAX keep, each full search takes 0.3 s

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of what fixtures save while a test reads stderr
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's optimisation is a third of the tests' time, and not what they test; a picture is computed on each device
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

# a shell that starts the tests in the background has them, and what they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # two workers may meet in the cache: what one cannot read, it compiles
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")


def _missing(error: BaseException | None) -> str | None:
    return f"needs {error.name}" if isinstance(error, ModuleNotFoundError) and error.name in ORACLES else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.failed and (reason := _missing(report.call.excinfo.value.__cause__)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if reason := _missing(error):
            pytest.skip(reason)
        raise


pytest_runtest_call = pytest_runtest_setup


@pytest.fixture(scope="module", autouse=True)
def programs_of_files() -> Generator[None, None, None]:
    """Forgets compiled programs after a file where there are many: at the system's limit of mapped regions, 65,530,
    XLA ends the process."""
    yield
    import jax

    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPPED_REGIONS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline like SD 1: convolutional projections, quick_gelu, epsilon prediction, factor 4. Read only."""
    import oracle

    return oracle.save_pipeline(tmp_path_factory.mktemp("sd1"), oracle.SD1)


@pytest.fixture(scope="session")
def one_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `sd1_folder`, with a UNet of one level, for what compiles it many times over. Read only."""
    import oracle

    return oracle.save_pipeline(tmp_path_factory.mktemp("one_level"), oracle.ONE_LEVEL)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline like SD 2: linear projections, heads per level, gelu, v prediction, factor 2. Read only."""
    import oracle

    return oracle.save_pipeline(tmp_path_factory.mktemp("sd2"), oracle.SD2)
