"""What Hydra makes of a configuration, and OmegaConf of `${...}`."""

import pytest

from post_training.errors import SetupError
from post_training.recipes.hydra import composed, interpolated
from post_training.recipes.recipe import read_yaml


def compose(tmp_path, text, **files):
    (tmp_path / "group").mkdir(exist_ok=True)
    for name, content in files.items():
        (tmp_path / name.replace("__", "/")).with_suffix(".yaml").write_text(content)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return composed(read_yaml(path), path, read_yaml)


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        ("[group: a]", {"x": 1, "group": {"a": 1, "b": {"c": 2, "d": 3}}}),
        ("[group/a]", {"x": 1, "group": {"a": 1, "b": {"c": 2, "d": 3}}}),
        ("[_self_, group/a]", {"x": 1, "group": {"a": 1, "b": {"c": 1, "d": 3}}}),
        ("['group/a@actor.fsdp']", {"actor": {"fsdp": {"a": 1, "b": {"c": 1, "d": 3}}}}),
        ("['group@_global_': a]", {"a": 1, "b": {"c": 1, "d": 3}}),
        ("[plain, override hydra/job_logging: stdout, hydra/output: x]", {"y": 5}),
        ("[group: [a], optional other: none, group: null]", {"group": {"a": 1}}),
    ],
)
def test_defaults(tmp_path, defaults, expected):
    text = f"defaults: {defaults}\nx: 1\ngroup: {{b: {{c: 2}}}}\n"
    found = compose(tmp_path, text, plain="y: 5", group__a="a: 1\nb: {c: 1, d: 3}")

    def holds(part, whole):
        return all(
            holds(v, whole[k]) if isinstance(v, dict) else whole[k] == v for k, v in part.items()
        )

    assert holds(expected, found) and "defaults" not in found


@pytest.mark.parametrize(
    ("defaults", "told"),
    [
        ("[group: nothing]", "nothing.yaml: No such file"),
        ("[override group: a]", "name the option where group stands first"),
        ("[3]", "3 is no entry"),
        ("[run]", "includes itself"),
    ],
)
def test_defaults_that_cannot_be(tmp_path, defaults, told):
    with pytest.raises(SetupError, match=told):
        compose(tmp_path, f"defaults: {defaults}\nx: 1\n")


def test_interpolation(monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    content = {"a": {"b": 3}, "c": "${a.b}", "d": "${oc.env:PLACE}/x"}
    assert interpolated(content, "f") == {"a": {"b": 3}, "c": 3, "d": "here/x"}
    for wrong, told in (("${a.z}", "a.z"), ("???", "mandatory"), ("${now:%Y}", "now")):
        with pytest.raises(SetupError, match=told):
            interpolated({"a": {"b": 3}, "c": wrong}, "f")
