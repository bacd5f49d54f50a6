"""What holds for the project as a whole: version, cleanliness, shipped assets, lean import."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

import vitailor

ROOT = Path(__file__).parents[1]
# Escaped so that this file does not match itself.
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch\.org|conda\.anaconda\.org"
    r"|--(?:extra-)?index[-]url|PIP_(?:EXTRA_)?INDEX[_]URL|--find[-]links"
)
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|opt|home|root|Users|mnt)\b(?!\.)")


def text_files() -> list[tuple[str, str]]:
    """Name and text of every file that is in the repository or could be added to it."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = []
    for name in sorted(set(filter(None, listing.split("\0")))):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            files.append((name, path.read_text("utf-8")))
        except UnicodeDecodeError:
            continue
    assert files
    return files


def found(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_version_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    try:
        installed = importlib.metadata.version("vitailor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vitailor runs from its sources, without package metadata")
    assert installed == vitailor.__version__


def test_files_name_no_package_registry():
    assert found(REGISTRY) == []


def test_files_name_no_path_of_a_machine():
    assert found(MACHINE_PATH) == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (REGISTRY, "pip install --index" + "-url=x"),
        (REGISTRY, "https://pypi" + ".org/simple"),
        (MACHINE_PATH, "cd /" + "tmp/x"),
        (MACHINE_PATH, '"/' + 'home/me"'),
    ],
)
def test_the_checks_above_would_see_a_trespass(pattern, line):
    assert pattern.search(line)


@pytest.mark.parametrize("line", ["https://example.com/home/x", "~/opt/x", "src/work", "a/tmp"])
def test_ordinary_paths_are_no_trespass(line):
    assert not MACHINE_PATH.search(line)


def test_digits_model_reaches_its_recorded_accuracy():
    import safetensors.torch
    import timm
    import torch
    from PIL import Image

    from vitailor.digits import digit_images
    from vitailor.preprocessing import Preprocessing

    assets = resources.files("vitailor") / "assets"
    facts = json.loads((assets / "digits_vit.json").read_text("utf-8"))
    weights = (assets / "digits_vit.safetensors").read_bytes()
    assert len(weights) < 1 << 20
    model = timm.create_model(**facts["architecture"]).eval()
    model.load_state_dict(safetensors.torch.load(weights))
    transform = Preprocessing.from_json(json.dumps(facts["preprocessing"])).transform()
    images, labels = digit_images("test")
    x_BCHW = torch.stack([transform(Image.fromarray(i).convert("RGB")) for i in images])
    with torch.inference_mode():
        correct = (model(x_BCHW).argmax(1) == torch.as_tensor(labels)).sum().item()

    assert len(images) == facts["test"]["images"] == 500
    assert facts["test"]["top1"] >= 97.5
    # Two images of leeway: kernels differ between machines.
    assert 100 * correct / len(images) == pytest.approx(facts["test"]["top1"], abs=0.41)


def test_import_is_lean():
    heavy = {"torch", "torchvision", "timm", "sklearn", "scipy", "plotly", "optuna", "accelerate"}
    code = "import sys, vitailor; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert heavy.isdisjoint(output.split())
