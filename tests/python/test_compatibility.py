"""docs/compatibility.md names all that coremltools.optimize.coreml offers, and nothing else."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import attrs
import pytest

from milpress import coreml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools.optimize.coreml as reference

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CONFIGS = [name for name in dir(reference) if name.startswith("Op") and name.endswith("Config")]


def rows() -> dict[str, str]:
    found = re.findall(r"^\| `([\w.]+)` \| ([a-z ]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def offered() -> set[str]:
    """Return every public name of coremltools, and the fields and methods of its configs."""
    names = {
        name
        for name in dir(reference)
        if not name.startswith("_") and (name.islower() or name.endswith(("Config", "MetaData")))
    }
    for name in CONFIGS:
        if name != "OptimizationConfig":
            names.discard(name)
            fields = attrs.fields(getattr(reference, name))
            names.update(f"{name}.{field.name}" for field in fields)
    methods = ("set_global", "set_op_type", "set_op_name", "from_dict", "from_yaml")
    return names | {f"OptimizationConfig.{method}" for method in methods}


def test_every_public_name_and_field_of_coremltools_has_a_row_and_no_other():
    assert set(rows()) == offered()


def test_what_a_row_calls_offered_is_there():
    for name, verdict in rows().items():
        assert verdict in ("same", "better", "different", "not offered")
        owner, _, member = name.partition(".")
        found = hasattr(coreml, owner)
        if found and member:
            config = getattr(coreml, owner)
            fields = {field.name for field in attrs.fields(config)}
            found = member in fields or hasattr(config, member)
        assert found == (verdict != "not offered"), name
