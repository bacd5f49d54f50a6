"""Artifacts on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ..errors import ArtifactError
from .folders import current
from .store import CARD, PLAN, RECORD, WEIGHTS, load, save

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model compressed by vitailor",
    token: str | None = None,
) -> str:
    """Save a model as an artifact in a repository of the Hugging Face Hub, made if need be.

    Args:
        model, repo_id: what to upload, and where: "owner/name".
        private: whether a repository that is made is private; None is the owner's default.
        revision: branch to write to; the main one by default.
        commit_message: first line of the commit's message.
        token: access token; the stored login by default.

    Returns:
        address of the commit.

    Raises:
        ArtifactError: when the upload fails, with the hub's reason.
        UnsupportedModelError: when the model cannot be saved.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as temporary:
        folder = save(model, Path(temporary) / "artifact")
        try:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        except Exception as error:  # of several HTTP libraries, depending on the hub's version
            raise ArtifactError(
                f"Cannot upload to {repo_id}: {_first_line(error)}",
                "Check the repository, the network and the login (`hf auth login`).",
            ) from error
    return str(commit)


def from_pretrained(
    repo_id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    token: str | None = None,
) -> nn.Module:
    """Load an artifact from a folder or from the Hugging Face Hub.

    Args:
        repo_id_or_path: a folder, or "owner/name" of a repository; a folder wins.
        revision: branch, tag or commit of the repository.
        device: where to put the model; the CPU by default.
        token: access token; the stored login by default.

    Raises:
        ArtifactError, PlanError: as `load`, and when the repository cannot be had.
    """
    name = os.fspath(repo_id_or_path)
    if current(Path(name)).is_dir() or not REPOSITORY.fullmatch(name):
        return load(name, device)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, token=token, allow_patterns=[PLAN, WEIGHTS, RECORD, CARD]
        )
    except Exception as error:  # of several HTTP libraries, depending on the hub's version
        raise ArtifactError(
            f"Cannot get {name}, which is no folder here, from the hub: {_first_line(error)}",
            "Check the name and the network.",
        ) from error
    return load(folder, device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
