"""Small prepared folders, for the tests of what happens to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dti_model.data import prepare


def prepare_small(out: Path, raw: Path, **settings: Any) -> None:
    prepare("ml-1m", out, raw, subset=True, vocab_size=270, **settings)


def content_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def as_version_1(path: Path) -> None:
    """Rewrite stats.json and the token cache as version 1 of the format had them."""
    stats = json.loads((path / "stats.json").read_text())
    del stats["sha256"]
    stats["format_version"] = 1
    stats["files"] = {name: facts["bytes"] for name, facts in stats["files"].items()}
    (path / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    for cache in (path / "tokens").iterdir():
        cache.rename(cache.with_name(f"{cache.name[:16]}.arrow"))
