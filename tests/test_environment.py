"""What the command changes of its environment, and what importing sdjax does not change of JAX."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import pytest
from test_imports import MODULES, OPTIONAL

from sdjax.commands import environment, installed

DEVICES = """
from sdjax.commands import main

def app(*_, **__):
    import jax
    print(jax.devices()[0].platform)

main.app = app
main.main()
"""
no_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or environment.has_tpu(), reason="libtpu without a TPU"
)


def run(code, **changed):
    own = {"JAX_PLATFORMS", *environment.QUIET}
    environ = {name: value for name, value in os.environ.items() if name not in own} | changed
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)


@no_tpu
def test_libtpu_does_not_complain_where_there_is_no_tpu():
    result = run(DEVICES)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split()


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0", "sys/bus/pci/devices/0000:00:04.0/vendor"])
def test_nothing_is_set_where_there_is_a_tpu(device, tmp_path, monkeypatch):
    for name in environment.QUIET:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / device
    path.parent.mkdir(parents=True)
    path.write_text("0x1ae0\n")
    environment.quiet_libtpu(tmp_path)
    assert not environment.QUIET.keys() & os.environ.keys()


def test_what_the_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "mine")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    environment.quiet_libtpu(tmp_path)
    assert [os.environ[name] for name in environment.QUIET] == ["mine", "localhost"]


IMPORTS = """
import importlib, json, sys
import jax
from jax._src import monitoring

def state():
    listeners = [monitoring.get_event_listeners(), monitoring.get_event_duration_listeners()]
    return {name: repr(value) for name, value in jax.config.values.items()}, [list(map(repr, own)) for own in listeners]

before = state()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name in OPTIONAL, error
assert state() == before, [pair for pair in zip(before[0].items(), state()[0].items()) if len({*pair}) > 1]
assert "sdjax.runtime.programs" in sys.modules
"""


def test_importing_sdjax_changes_no_setting_of_jax_and_adds_no_listener():
    names = [name for name in MODULES if not name.endswith("__main__")]
    code = f"import sys; OPTIONAL = {OPTIONAL!r}; sys.argv[1:] = {names!r}\n{IMPORTS}"
    result = run(code, JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr


PIPELINE = """
import jax
from sdjax import StableDiffusionPipeline
{before}
pipe = StableDiffusionPipeline(None, None, None, None, "ddim")
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
jax.config.update("jax_compilation_cache_dir", None)
StableDiffusionPipeline(None, None, None, None, "ddim")
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("chosen", [True, False])
def test_the_first_pipeline_turns_the_disk_cache_on_once_where_none_is_chosen(chosen, tmp_path):
    before = f'jax.config.update("jax_compilation_cache_dir", "{tmp_path}/mine")' if chosen else ""
    code = "import os\nfor name in [*os.environ]:\n    name.startswith('JAX_') and os.environ.pop(name)\n"
    result = run(code + PIPELINE.format(before=before), XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    folder, seconds, later = result.stdout.split()
    assert folder.endswith("mine" if chosen else "compiled") and folder.startswith(str(tmp_path))
    assert float(seconds) == (1.0 if chosen else 0.0)
    assert later == "None"


def test_an_accelerator_that_jax_does_not_use_is_a_warning(monkeypatch, tmp_path):
    """With what goes with this JAX, by its own metadata; a plug-in of another version that is used is none."""
    monkeypatch.setattr(installed, "has_tpu", lambda: True)
    monkeypatch.setattr(installed, "NVIDIA", tmp_path)
    found = installed.versions() | {"libtpu": "0.0.1"}
    assert found["jax"] == jax.__version__
    tpu, gpu = installed.unused({k: v for k, v in found.items() if "cuda" not in k}, {"cpu"})
    assert re.fullmatch(
        rf"jax \S+ does not use this machine\'s TPU: libtpu 0\.0\.1 is installed, and 0\.[0-9.]+ goes with it; pip "
        rf'install "jax\[tpu\]=={re.escape(jax.__version__)}"',
        tpu,
    )
    assert (
        gpu == f'jax {jax.__version__} does not use this machine\'s GPU: pip install "jax[cuda12]=={jax.__version__}"'
    )
    assert installed.unused(found, {"tpu", "gpu"}) == []
