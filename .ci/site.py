"""Hook of MkDocs: the one picture that lies beside the benchmarks that draw it, not in docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PICTURE = "benchmarks/results/performance.png"


def on_files(files: Any, config: Any) -> Any:
    """Add the picture to the site."""
    source = Path(config["config_file_path"]).parent / PICTURE
    files.append(File.generated(config, source.name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_rest: Any) -> str:
    """Let pages find it there."""
    return markdown.replace(f"../{PICTURE}", Path(PICTURE).name)
