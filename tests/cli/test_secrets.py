"""Passwords and tokens on the command line are neither printed nor kept."""

import json
from pathlib import Path

import pytest
from commandline import psenet

from psenet.cli.main import app

URL = "postgresql://user:s3cret@host/db"
TOKEN = "https://host/photos?token=s3cret"
MODEL = "psenet.models:digits_resnet"
START = ("prune", "--model", MODEL, "--data", "digits", "--macs", "50%", "--out", "run")


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["plain", "debug"])
@pytest.mark.parametrize(
    "arguments",
    [
        (*START, "--data", URL),
        (*START, "--data", TOKEN),
        (*START, "--model", f"timm:{URL}"),
        (*START, "--weights", URL),
        (*START, "--macs", URL),
        (*START, "--set", f"storage={URL}"),
        (*START, "--set", f"seed={URL}"),
        (*START, "--set", f"study={TOKEN}"),
        (*START, "--recipe", URL),
        (*START, "--recipe", "recipe.yaml"),
        (*START, "--template", URL),
        ("inspect", f"timm:{URL}"),
        ("bench", URL),
        ("search", URL),
        ("compare", URL, "--data", URL),
        ("report", URL),
        ("train", "run", "--recipe", URL),
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_no_message_holds_a_secret(
    arguments: tuple[str, ...], debug: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"storage: {URL}\nseed: {URL}\n")
    ended = psenet(*debug, *arguments)
    assert ended.code == 2
    assert "s3cret" not in ended.out + ended.err


def test_the_command_that_a_run_keeps_holds_no_secret(monkeypatch: pytest.MonkeyPatch):
    kept: list[object] = []
    monkeypatch.setattr("psenet.cli.main.app", lambda arguments, *, standalone_mode, obj: kept.append(obj))
    from psenet.cli.main import main

    assert app is not None
    main(["prune", "--set", f"study={URL}", "--data", TOKEN])
    assert kept == ["psenet prune --set study=postgresql://user:***@host/db --data 'https://host/photos?token=***'"]


def test_the_environment_tells_no_variable(monkeypatch: pytest.MonkeyPatch):
    for name in ("DATABASE_URL", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPTUNA_STORAGE", "HTTPS_PROXY"):
        monkeypatch.setenv(name, URL)
    for form in ((), ("--json",)):
        ended = psenet("env", *form)
        assert ended.code == 0 and "s3cret" not in ended.out + ended.err
    assert json.loads(ended.out)["psenet"]
