import pytest

from data.errors import DataError
from data.sources.files import resolve_files


def test_folders_and_globs_are_expanded_in_a_stable_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.parquet", "notes.txt"):
        (tmp_path / name).write_text("x")
    for hidden in (".ipynb_checkpoints/a-checkpoint.jsonl", ".hidden.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("{}\n")
    names = [path.name for path in resolve_files([str(tmp_path)])]
    assert names == ["a.jsonl", "b.jsonl", "c.parquet"]
    assert [p.name for p in resolve_files([f"{tmp_path}/*.jsonl"])] == ["a.jsonl", "b.jsonl"]


def test_one_file_under_several_names_is_read_once(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    files = [str(tmp_path / "b.jsonl"), "*.jsonl", "b.jsonl", f"{tmp_path}/b.jsonl"]
    assert [str(p) for p in resolve_files(files)] == [str(tmp_path / "b.jsonl"), "a.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.jsonl", "no such file"), ("*.jsonl", "no such"), ("x.txt", "unknown file type"),
     ("empty.jsonl", "is empty"), ("folder", "holds no file")],
)  # fmt: skip
def test_wrong_paths_are_refused_with_the_flag(tmp_path, name, message):
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    if name == "empty.jsonl":
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"--finetune-data-files .*{message}"):
        resolve_files([str(tmp_path / name)])
