"""The Dockerfile names what there is. Nothing is built here."""

import json
import re
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import typer

from sdjax.commands.main import app

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
STEPS = re.findall(r"(?m)^([A-Z]+) (.*)$", DOCKERFILE.replace("\\\n", ""))
STARTED = re.compile(r"docker run [^`#]*? sdjax(?![-\w])([^`#\n]*)")


def steps(name: str) -> list[str]:
    """What follows an instruction, each time that it is there."""
    return [rest for instruction, rest in STEPS if instruction == name]


def served(*options: str) -> dict:
    """The values of `sdjax serve` with these options. Raises typer.TyperException where it has none such."""
    name, *arguments = *json.loads(steps("ENTRYPOINT")[0])[1:], *options
    return typer.main.get_command(app).commands[name].make_context(name, arguments).params


def documented() -> list[list[str]]:
    """The options of each start in the document."""
    text = (ROOT / "docs" / "serve.md").read_text("utf-8").replace("\\\n", "")
    return [options.split() for options in STARTED.findall(text)]


def test_the_command_has_the_options():
    values = served(*json.loads(steps("CMD")[0]))
    assert values["api_key_file"] == Path("/run/secrets/sdjax-key")
    assert not values["no_auth"]


def test_the_document_has_the_options():
    assert {"--no-auth", "--places"} <= {name for options in documented() for name in options}
    for options in documented():
        served(*options)


def test_what_is_named_elsewhere_is_the_same():
    values = served()
    folders = {str(values[name]) for name in ("models", "loras", "embeddings", "out")}
    volumes = {*json.loads(steps("VOLUME")[0])}
    assert volumes == folders | {"/cache"}
    assert all(re.search(rf"mkdir [^&]*{folder}\b", DOCKERFILE) for folder in volumes)
    assert [str(values["port"])] == steps("EXPOSE") == re.findall(r"1', (\d+), timeout", DOCKERFILE)
    assert all(re.search(r"=/cache/", setting) for setting in steps("ENV")[0].split())


def test_the_extras_are_there():
    named = re.search(r"EXTRA=(\w+) .*; or (\w+), (\w+)", DOCKERFILE).groups()
    assert {"serve", *named} <= PROJECT["project"]["optional-dependencies"].keys()
    assert '"/source[serve${EXTRA:+,$EXTRA}]"' in steps("RUN")[0]


def test_the_python_is_one_of_the_project():
    version = re.fullmatch(r"python:([\d.]+)-slim", steps("FROM")[0])[1]
    assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]


def test_what_the_build_needs_is_sent():
    kept = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[0] == "!"
    }
    project = PROJECT["project"]
    named = {"pyproject.toml", project["readme"], *PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert kept == named | {name for name in project["license-files"] if not name.startswith("sdjax/")}


def test_it_is_not_run_as_root():
    assert steps("USER") == ["sdjax"]


@pytest.mark.parametrize("status", [200, 500, None])
def test_the_health_check_tells(status):
    """Against a server that answers with the status; None: there is none."""
    command = json.loads(steps("HEALTHCHECK")[0].partition("CMD ")[2])

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace("7860", str(server.server_port))
        if status is None:
            server.shutdown()
            server.server_close()
        done = subprocess.run([sys.executable, *command[1:2], code], stderr=subprocess.DEVNULL)
        assert (done.returncode == 0) == (status == 200)
        if status is not None:
            server.shutdown()
