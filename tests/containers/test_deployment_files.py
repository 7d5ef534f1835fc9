"""compose.yaml, the systemd unit, the Kubernetes manifest and docs/deployment.md are valid and agree with the server.

tests/containers/test_container_image.py builds and runs the image.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import moondream_cv
from moondream_cv.cli import app
from moondream_cv.model.hub import hub_cache
from moondream_cv.model.variants import finetunes_root
from moondream_cv.server.middleware import PROBE_PATHS
from moondream_cv.server.settings import ServerSettings

ROOT = Path(moondream_cv.__file__).parents[1]
PAGE = ROOT / "docs" / "deployment.md"
UNIT = ROOT / "docs" / "deployment" / "moondream-cv.service"
MANIFEST = ROOT / "docs" / "deployment" / "kubernetes.yaml"
STOPPING = 10  # seconds that the server takes to stop its processes after `drain`
PORT = 2020
if not UNIT.exists():
    pytest.skip("the files are not part of a source distribution", allow_module_level=True)


def compose(text: str | None = None, **variables: str) -> dict[str, Any]:
    """Return the services of a compose file after a strict validation.

    Args:
        text: Content of the file; None: compose.yaml.
        **variables: Variables of the environment.
    """
    substitution = pytest.importorskip("podman_compose", reason="needs podman-compose")
    schema = pytest.importorskip("compose_spec", reason="needs compose-spec")
    document = substitution.rec_subs(yaml.safe_load(text or (ROOT / "compose.yaml").read_text()), variables)
    text = yaml.dump(document, Dumper=_WithoutAliases, sort_keys=False)
    schema.PyCompose.from_yaml(text).validate()
    return document["services"]


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dockerfile(instruction: str) -> str:
    """Return the arguments of the last instruction of this kind in the Dockerfile."""
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", "")
    return re.findall(rf"^{instruction} (.*)$", text, re.MULTILINE)[-1]


def unit() -> dict[str, list[str]]:
    """Return the values of each setting of the unit, with the state folder of system units."""
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text().replace("%S", "/var/lib").splitlines():
        name, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


def manifest() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def pod() -> dict[str, Any]:
    return manifest()["Deployment"]["spec"]["template"]["spec"]


def test_compose_publishes_the_server_on_loopback_unless_an_address_is_set() -> None:
    services = compose()
    assert {*services} == {"cpu", "gpu"}
    assert {port for service in services.values() for port in service["ports"]} == {f"127.0.0.1:{PORT}:{PORT}"}
    services = compose(MOONDREAM_CV_ADDRESS="0.0.0.0", MOONDREAM_CV_PORT="80", MOONDREAM_CV_API_KEYS="first second")
    for service in services.values():
        assert service["ports"] == [f"0.0.0.0:80:{PORT}"]
        assert service["environment"]["MOONDREAM_CV_API_KEYS"] == "first second"


def test_compose_builds_cuda_only_for_the_gpu() -> None:
    services = compose()
    assert services["cpu"]["build"]["args"]["TORCH_INDEX"].endswith("/cpu")
    assert "args" not in services["gpu"]["build"]
    assert "profiles" not in services["cpu"]
    assert services["gpu"]["profiles"] == ["gpu"]


def test_compose_page_lists_every_variable() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE.read_text(), re.MULTILINE))


def page_blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return found


def test_compose_override_of_the_page_is_valid() -> None:
    (text,) = page_blocks("yaml")
    override, services = compose(text), compose()
    assert {*override} <= {*services}
    for service in override.values():
        assert serve_options(service["command"][1:])["quantize"] == "int8"


def test_container_commands_of_the_page_are_valid() -> None:
    lines = [line for block in page_blocks("sh") for line in block.splitlines() if line.startswith("docker ")]
    builds = [shlex.split(line) for line in lines if " build " in line]
    assert {build[build.index("-f") + 1] for build in builds} == {"docker/Dockerfile"}
    tags = {build[build.index("-t") + 1] for build in builds}
    assert tags == {service["image"] for service in compose().values()}
    for words in (shlex.split(line) for line in lines if " run " in line):
        (image,) = tags & {*words}
        name, *arguments = words[words.index(image) + 1 :]
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def verify(folder: Path, drop_in: str = "") -> Path:
    """Return a copy of the unit with a drop-in, after `systemd-analyze verify`, with a program that exists here."""
    copy = folder / UNIT.name
    extra = folder / f"{UNIT.name}.d" / "override.conf"
    extra.parent.mkdir()
    for file, text in ((copy, UNIT.read_text()), (extra, drop_in)):
        file.write_text(text.replace("/opt/moondream-cv/bin/moondream-cv", sys.executable))
    result = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return copy


@needs_systemd
def test_drop_in_of_the_page_is_valid(tmp_path: Path) -> None:
    (drop_in,) = page_blocks("ini")
    verify(tmp_path, drop_in)
    program, command, *arguments = shlex.split(drop_in.splitlines()[-1].removeprefix("ExecStart="))
    assert [program, command] == shlex.split(unit()["ExecStart"][0])[:2]
    assert serve_options(arguments)["host"] == "0.0.0.0"


@needs_systemd
def test_unit_is_valid_and_confined(tmp_path: Path) -> None:
    copy = verify(tmp_path)

    # An exposure of 10 means unconfined, and the threshold is in tenths
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", copy]
    result = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized option" in result.stderr:
        pytest.skip("needs systemd 250")
    assert result.returncode == 0, result.stdout


def test_state_of_the_unit_is_in_its_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = unit()
    state = Path("/var/lib") / settings["StateDirectory"][0]
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "MOONDREAM_CV_FINETUNES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for assignment in settings["Environment"]:
        monkeypatch.setenv(*assignment.split("=", 1))
    for folder in (hub_cache(), finetunes_root(), Path.home(), Path(settings["WorkingDirectory"][0])):
        assert folder.is_relative_to(state)


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_manifest_matches_the_schemas_of_kubernetes(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    assert {*manifest()} == {"PersistentVolumeClaim", "Service", "Deployment"}
    for document in manifest().values():
        kubernetes_validate.validate(document, version, strict=True)


def test_manifest_refers_to_its_own_objects() -> None:
    documents, spec = manifest(), pod()
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert documents["Service"]["spec"]["selector"].items() <= labels.items()
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "emptyDir" not in volume}
    assert claims == {documents["PersistentVolumeClaim"]["metadata"]["name"]}


def test_servers_have_time_to_finish_running_requests() -> None:
    needed = ServerSettings().drain + STOPPING
    (container,) = pod()["containers"]
    before_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] - before_stop >= needed
    assert int(unit()["TimeoutStopSec"][0]) >= needed
    for service in compose().values():
        assert int(service["stop_grace_period"].removesuffix("s")) >= needed


def test_probes_and_ports_are_those_of_the_server() -> None:
    (container,) = pod()["containers"]
    probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    assert {probe["path"] for probe in probes.values()} == PROBE_PATHS
    assert probes["readinessProbe"]["path"] == "/ready"
    assert probes["livenessProbe"]["path"] == "/health"  # a server that loads its model is not restarted
    (port,) = container["ports"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert manifest()["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert {port["containerPort"], int(dockerfile("EXPOSE")), serve_options([])["port"]} == {PORT}


def test_command_lines_are_valid_and_listen_outside_of_containers_on_loopback() -> None:
    (container,) = pod()["containers"]
    commands = [json.loads(dockerfile("CMD")), container["args"], *(s["command"] for s in compose().values())]
    for command in commands:
        assert command[0] == "serve"
        assert serve_options(command[1:])["host"] == "0.0.0.0"
    program, command, *arguments = shlex.split(unit()["ExecStart"][0])
    assert (Path(program).name, command) == ("moondream-cv", "serve")
    assert serve_options(arguments)["host"] == "127.0.0.1"


def serve_options(arguments: list[str]) -> dict[str, Any]:
    """Return the values of the options of `moondream-cv serve`; invalid arguments raise an error of click."""
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return command.make_context("serve", list(arguments)).params
