"""The checks of distributions, without building any (`make release-check` builds them)."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from moondream_cv import __version__
from tests.helpers.scripts import import_file

ROOT = Path(__file__).parents[1]
if not (ROOT / "scripts" / "release_check.py").exists():
    pytest.skip("the script is not part of a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    return import_file("scripts/release_check.py")


def test_changelog_and_citation_name_the_version(checks: ModuleType) -> None:
    assert checks.read_version() == __version__
    checks.check_versions(__version__)
    with pytest.raises(SystemExit, match=r"CHANGELOG.md has no line with '## \[9.9.9\]'"):
        checks.check_versions("9.9.9")


def test_version_must_be_a_whole_line(checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.0] - 2026-12-01\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.1.0\n")
    with pytest.raises(SystemExit, match=r"CITATION.cff has no line with 'version: 1.2.0'"):
        checks.check_versions("1.2.0")


def test_wheel_must_be_installed_somewhere(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PYTHONS", ("2.6",))
    monkeypatch.setattr(checks, "build", lambda folder, version: folder)
    monkeypatch.setattr("sys.argv", ["release_check.py"])
    with pytest.raises(SystemExit, match=r"found none of Python 2\.6"):
        checks.main()


def test_commands_do_not_see_the_checkout(
    checks: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    checks.run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"])
    assert capfd.readouterr().out == "None\n"


def test_citation_has_the_required_keys_and_the_address_of_the_repository(checks: ModuleType) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert f'Repository = "{citation["repository-code"]}"' in (ROOT / "pyproject.toml").read_text()


def test_placeholder_addresses_are_not_published(checks: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if checks.PLACEHOLDER not in (ROOT / "pyproject.toml").read_text():
        checks.check_addresses(publish=True)
        return
    checks.check_addresses(publish=False)
    assert "not yet ready to publish: pyproject.toml, CITATION.cff" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a placeholder"):
        checks.check_addresses(publish=True)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("docs/images/overview.jpg", "relative link"),
        ("https://example.com/moondream-cv/raw/v1.0/docs/images/missing.png", "missing.png, which does not exist"),
        ("https://example.com/moondream-cv/blob/v1.0/docs/models.md#parity", None),
        ("https://example.org/elsewhere", None),
        ("#install", None),
    ],
)
def test_description_links_are_absolute_and_exist(checks: ModuleType, link: str, message: str | None) -> None:
    metadata = f"Name: moondream-cv\n\nText with a [link]({link})."
    if message is None:
        checks.check_description(metadata, "1.0")
    else:
        with pytest.raises(SystemExit, match=message):
            checks.check_description(metadata, "1.0")


def test_source_distributions_contain_only_files_of_the_repository(checks: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "moondream_cv-1.0.tar.gz"
    for extra, names in ((None, ["README.md", "PKG-INFO"]), ("secret.txt", ["README.md", "secret.txt"])):
        with tarfile.open(archive, "w:gz") as file:
            for name in names:
                file.addfile(tarfile.TarInfo(f"moondream_cv-1.0/{name}"), io.BytesIO())
        if extra is None:
            checks.check_source_files(archive)
        else:
            with pytest.raises(SystemExit, match=f"1 files that are not in the repository, such as {extra}"):
                checks.check_source_files(archive)
