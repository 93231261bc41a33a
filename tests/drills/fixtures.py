"""What the drills compare: the content of an artifact, byte for byte, whichever attempt wrote it."""

from __future__ import annotations

from flywheel_tasks.core.store import Artifact


def content(artifact: Artifact) -> dict[str, bytes]:
    """Path below the attempt → bytes, of every committed file."""
    found = {}
    for output in artifact.manifest.outputs.values():
        for file in output.files:
            data = artifact.storage.read(f"{artifact.manifest.folder}/{file.path}")
            if data is None:
                raise AssertionError(f"{file.path} is not there")
            found[file.path.split("/", 1)[1]] = data
    return found
