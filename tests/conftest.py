"""What the whole suite runs under: the CPU, Keras on JAX, no files of the user, strict JAX."""

import atexit
import dataclasses
import os
import shutil
import tempfile

# Keras reads these when it is imported, JAX when it first runs: before any test module. A folder of
# our own keeps the user's keras.json, which sets the default of `data_format`, out of the tests.
os.environ["JAX_PLATFORMS"] = "cpu"
# The suite compiles thousands of small functions and runs each once: LLVM need not optimize them.
# What XLA makes of the graph, fusion included, stays the same. What LLVM makes of it for users is
# tested in test_lowering_optimized.py, whose functions are compiled at the default level, 3.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["KERAS_BACKEND"] = "jax"
_keras_home = tempfile.mkdtemp(prefix="flax_dwconv_keras_")
atexit.register(shutil.rmtree, _keras_home, ignore_errors=True)
os.environ["KERAS_HOME"] = _keras_home

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same random examples in every run. A first call compiles; fixtures set flags, which stay.
_checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=_checks
)
# Others every time, 50 times as many where a test leaves the number to the profile.
settings.register_profile(
    "overnight", settings.get_profile("ci"), derandomize=False, max_examples=5000
)
settings.load_profile("ci")


def _config(**flags):
    """Yields with JAX's flags set to these values, then puts the old ones back."""
    old = {name: getattr(jax.config, name) for name in flags}
    for name, value in flags.items():
        jax.config.update(name, value)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def strict_jax():
    """No silent promotion of dtypes or ranks. A module that runs Keras overrides this fixture."""
    yield from _config(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise")


@pytest.fixture(scope="session")
def keras():
    """Keras 3 on JAX, as set above; where there is none, its tests are skipped."""
    return pytest.importorskip("keras")


@pytest.fixture
def x64():
    """float64 for one test."""
    yield from _config(jax_enable_x64=True)


@pytest.fixture
def much_effort(monkeypatch):
    """Small convolutions are compiled as large ones are, in what is jitted in the test."""
    from flax_dwconv._lowering import tuning

    always = dict(padded_elements=0, one_by_one_elements=0, unrolled_bodies_elements=0)
    efforts = (dataclasses.replace(tuning.TUNING.efforts[-1], elements=0),)
    constants = dataclasses.replace(tuning.TUNING, efforts=efforts, **always)
    monkeypatch.setattr(tuning, "TUNING", constants)
