"""Which checkpoint counts, and which may go; no model is needed for that."""

import json
import os
import shutil
import zlib

import pytest
import torch

from data.documents import check_sum
from post_training.checkpoint import store
from post_training.errors import SetupError
from tests.helpers.models import edit_json

FACTS = {"consumed_samples": 4}


def save(folder, iteration, *, finish=True):
    """A checkpoint of two files, saved as a run does; `finish=False`: killed before it was complete."""
    checkpoint = store.begin_save(folder, iteration)
    (checkpoint / "__0_0.distcp").write_bytes(b"weights" * 100)
    (checkpoint / "modelopt_state").mkdir()
    (checkpoint / "modelopt_state/state.pt").write_bytes(b"state")
    if finish:
        store.finish_save(folder, iteration, FACTS)
    return checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")


def newest(folder):
    """The folder of the newest complete checkpoint."""
    found = store.latest_checkpoint(folder)
    return found and found.path


def tracked(folder):
    return (folder / store.TRACKER).read_text()


def test_nothing_there(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_a_complete_checkpoint(tmp_path):
    path = save(tmp_path, 5)
    assert store.find_checkpoint(tmp_path) == (store.Checkpoint.at(path), None)
    assert tracked(tmp_path) == "5" and names(tmp_path) == ["iter_0000005"]
    manifest = store.read_manifest(path)
    assert manifest is not None and manifest.pop("manifest_crc32")
    assert manifest == {
        "iteration": 5,
        **FACTS,
        "files": {"__0_0.distcp": 700, "modelopt_state/state.pt": 5},
        "crc32": {
            "__0_0.distcp": zlib.crc32(b"weights" * 100),
            "modelopt_state/state.pt": zlib.crc32(b"state"),
        },
    }


def test_release_and_checkpoints_of_plain_megatron_are_taken_as_the_tracker_says(tmp_path):
    (tmp_path / store.TRACKER).write_text("release")
    (tmp_path / "release").mkdir()
    (tmp_path / "release/metadata.json").write_text("{}")
    assert newest(tmp_path) == tmp_path / "release"
    (tmp_path / store.TRACKER).write_text("7\n")
    assert newest(tmp_path) is None
    (tmp_path / "iter_0000007").mkdir()
    assert newest(tmp_path) is None, "empty"
    (tmp_path / "iter_0000007/metadata.json").write_text("{}")
    assert newest(tmp_path) == tmp_path / "iter_0000007"


def test_a_save_that_did_not_finish_never_counts(tmp_path):
    save(tmp_path, 5, finish=False)
    assert newest(tmp_path) is None
    old = save(tmp_path, 3)
    assert newest(tmp_path) == old
    (tmp_path / store.TRACKER).write_text("5")  # not even if somebody says so
    found, complaint = store.find_checkpoint(tmp_path)
    assert found is not None and found.path == old and complaint is not None
    assert "iter_0000005: its save did not finish" in complaint


def spoil(path, how):
    file = path / "__0_0.distcp"
    if how == "cut off":
        os.truncate(file, 699)
    elif how == "missing":
        file.unlink()
    elif how == "gone":
        shutil.rmtree(path)
    elif how == "manifest cut off":
        os.truncate(path / store.MANIFEST, 30)
    elif how == "manifest missing":
        (path / store.MANIFEST).unlink()
    elif how == "zeroed":
        file.write_bytes(bytes(700))
    return {
        "cut off": "__0_0.distcp has 699 of 700 bytes",
        "missing": "__0_0.distcp cannot be read (No such file or directory)",
        "gone": "it is not there",
        "manifest cut off": "its manifest.json cannot be read",
        "manifest missing": "it has no manifest.json",
        "zeroed": "__0_0.distcp does not hold what was saved",
    }[how]


@pytest.mark.parametrize(
    "how", ["cut off", "missing", "gone", "manifest cut off", "manifest missing", "zeroed"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    before = save(tmp_path, 5)
    reason = spoil(save(tmp_path, 10), how)
    found, complaint = store.find_checkpoint(tmp_path)
    assert found is not None and found.path == before and complaint is not None
    assert complaint.endswith(f"iter_0000010: {reason}")
    spoil(before, "missing")
    with pytest.raises(SetupError, match=r"(?s)iter_0000010: .*no older complete checkpoint"):
        store.chosen_checkpoint(tmp_path, None)


def test_a_tracker_that_names_a_release_that_is_gone_gives_way(tmp_path):
    path = save(tmp_path, 5)
    (tmp_path / store.TRACKER).write_text("release")
    found, complaint = store.find_checkpoint(tmp_path)
    assert found is not None and found.path == path and complaint and "release" in complaint


@pytest.mark.parametrize("data", [{"begins_at": "x"}, {"made_of": [1]}, {"made_of": {}}])
def test_a_manifest_of_an_old_version_with_other_types_cannot_be_read(tmp_path, data):
    before, path = save(tmp_path, 5), save(tmp_path, 10)
    manifest = json.loads((path / store.MANIFEST).read_text())
    del manifest["manifest_crc32"]
    (path / store.MANIFEST).write_text(json.dumps(manifest | {"data": data}))
    found, complaint = store.find_checkpoint(tmp_path)
    assert found is not None and found.path == before and complaint is not None


def damage(file, place):
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"x")


@pytest.mark.parametrize("place", [0, 100_000, 199_999])
def test_damage_anywhere_is_found(tmp_path, place):
    checkpoint = store.begin_save(tmp_path, 5)
    (checkpoint / "__0_0.distcp").write_bytes(bytes(200_000))
    store.finish_save(tmp_path, 5, FACTS)
    assert store.defect(checkpoint) is None
    damage(checkpoint / "__0_0.distcp", place)
    assert store.defect(checkpoint) == "__0_0.distcp does not hold what was saved"


def test_of_large_files_a_part_is_read(tmp_path, monkeypatch):
    """And `.metadata` as a whole: the rest of a file says where it is."""
    monkeypatch.setattr(check_sum, "_WHOLE", 100_000)
    monkeypatch.setattr(check_sum, "_STRETCH", 64_000)
    monkeypatch.setattr(check_sum, "_PIECE", 1_000)
    checkpoint = store.begin_save(tmp_path, 5)
    shard, metadata = checkpoint / "__0_0.distcp", checkpoint / ".metadata"
    for file in (shard, metadata):
        file.write_bytes(bytes(200_000))
    store.finish_save(tmp_path, 5, FACTS)
    damage(shard, 100_000)
    assert store.defect(checkpoint) is None, "the price of reading little"
    for place in (0, 999, 64_000, 128_999, 199_000, 199_999):
        shard.write_bytes(bytes(200_000))
        damage(shard, place)
        assert store.defect(checkpoint) == "__0_0.distcp does not hold what was saved"
    shard.write_bytes(bytes(200_000))
    damage(metadata, 100_000)
    assert store.defect(checkpoint) == ".metadata does not hold what was saved"


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["__0_0.distcp"]},
        {"files": None},
        {"crc32": {}},
        {"crc32": [1]},
        {"consumed_samples": -4},
        {"iteration": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_damaged(tmp_path, change):
    """Valid JSON though it is: everything in it is part of its own check sum."""
    path = save(tmp_path, 5)
    edit_json(path / store.MANIFEST, **change)
    assert store.defect(path) == "its manifest.json cannot be read"
    # Older versions wrote no sums.
    path = save(tmp_path, 10)
    edit_json(path / store.MANIFEST, manifest_crc32=None, crc32=None)
    assert store.read_manifest(path) is not None


def test_of_plain_megatron_its_own_table_of_contents_is_compared(tmp_path):
    """And of versions whose manifests hold no check sums."""
    from torch.distributed import checkpoint as dcp

    path = tmp_path / "iter_0000007"
    dcp.save({"weight": torch.ones(9)}, checkpoint_id=str(path), no_dist=True)
    (tmp_path / store.TRACKER).write_text("7")
    assert newest(tmp_path) == path
    (path / "metadata.json").write_text("{")
    assert store.defect(path) == "metadata.json cannot be read (JSONDecodeError)"
    (path / "metadata.json").unlink()
    shard = path / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"of {shard.stat().st_size + 1} bytes" in (store.defect(path) or "")
    (path / ".metadata").write_bytes(b"nonsense")
    assert ".metadata cannot be read (" in (store.defect(path) or "")
    assert newest(tmp_path) is None
    (path / store.MANIFEST).write_text(json.dumps({"iteration": 7, "files": {}}))
    assert ".metadata cannot be read (" in (store.defect(path) or "")


@pytest.mark.parametrize("tracker", ["", "garbled", "²", b"\xff\xfe4", None])
def test_without_a_readable_tracker_the_newest_complete_one_counts(tmp_path, tracker):
    save(tmp_path, 5)
    last = save(tmp_path, 10)
    save(tmp_path, 15, finish=False)
    if tracker is None:
        (tmp_path / store.TRACKER).unlink()
    else:
        tracker = tracker if isinstance(tracker, bytes) else tracker.encode()
        (tmp_path / store.TRACKER).write_bytes(tracker)
    (tmp_path / "iter_²").mkdir()
    assert newest(tmp_path) == last
    told = None if tracker is None else f"{tmp_path / store.TRACKER} cannot be read"
    assert store.find_checkpoint(tmp_path)[1] == told
    # Damage is named, and a folder with nothing but damage is no fresh one.
    spoil(last, "zeroed")
    found, complaint = store.find_checkpoint(tmp_path)
    assert found and found.iteration == 5 and complaint is not None
    assert told or "iter_0000010: __0_0.distcp does not hold" in complaint
    spoil(found.path, "manifest missing")
    with pytest.raises(SetupError, match="no older complete checkpoint"):
        store.chosen_checkpoint(tmp_path, None)


def test_an_older_number_in_the_tracker_goes_back(tmp_path):
    old = save(tmp_path, 5)
    save(tmp_path, 10)
    store.point_at(tmp_path, 5)
    assert newest(tmp_path) == old


def test_an_iteration_that_was_asked_for(tmp_path):
    old, new = save(tmp_path, 5), save(tmp_path, 10)
    assert store.chosen_checkpoint(tmp_path, 5) == (store.Checkpoint.at(old), None)
    spoil(new, "cut off")
    with pytest.raises(SetupError, match="of iteration 10: .*699 of 700"):
        store.chosen_checkpoint(tmp_path, 10)
    with pytest.raises(SetupError, match="of iteration 7: it is not there"):
        store.chosen_checkpoint(tmp_path, 7)


class Killed(BaseException):
    pass


STEPS_OF_A_SAVE = ("mark", "mkdir", "files", "manifest", "tracker", "unmark")


@pytest.mark.parametrize("last", STEPS_OF_A_SAVE)
def test_killed_after_any_step_of_a_save(tmp_path, monkeypatch, last):
    """A run killed there finds a whole checkpoint, and its clean-up removes what is not one."""
    save(tmp_path, 5)
    stale = save(
        tmp_path, 10
    )  # of a course of training that was left: the same name is saved again
    store.point_at(tmp_path, 5)
    path = tmp_path / "iter_0000010"
    assert stale == path

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if last == "mark":
            patch.setattr(type(path), "mkdir", killed)
        elif last == "files":
            patch.setattr(store, "_replace", killed)
        elif last == "manifest":
            patch.setattr(store, "point_at", killed)
        elif last == "tracker":
            patch.setattr(type(path), "unlink", killed)
        with pytest.raises(Killed):
            store.begin_save(tmp_path, 10)
            if last == "mkdir":
                raise Killed
            (path / "__0_0.distcp").write_bytes(b"new" * 100)
            store.finish_save(tmp_path, 10, FACTS)
            raise Killed
    complete = last in ("manifest", "tracker", "unmark")
    expected = "iter_0000010" if complete else "iter_0000005"
    for again in (False, True):
        found, complaint = store.find_checkpoint(tmp_path)
        assert found is not None and found.path == tmp_path / expected and complaint is None
        removed = store.clean_up(tmp_path)
        assert removed == ([] if complete or again else [10])
        store.point_at(tmp_path, 10 if complete else 5)
    assert names(tmp_path) == ["iter_0000005"] + ["iter_0000010"] * complete


def test_a_kill_while_one_is_removed_leaves_nothing_that_counts(tmp_path, monkeypatch):
    save(tmp_path, 5)
    last = save(tmp_path, 10)
    with monkeypatch.context() as patch:

        def killed(path):
            (path / "__0_0.distcp").unlink()
            raise Killed

        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            store.remove_old(tmp_path, newest=10, keep=1, retain_interval=None)
    assert newest(tmp_path) == last
    assert names(tmp_path) == ["iter_0000005.removed", "iter_0000010"]
    store.clean_up(tmp_path)
    assert names(tmp_path) == ["iter_0000010"]


def test_clean_up_leaves_what_it_did_not_make(tmp_path):
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / "iter_0000007/mp_rank_00.pt").write_text("of plain Megatron")
    (tmp_path / "notes.saving").write_text("mine")
    save(tmp_path, 9, finish=False)
    assert store.clean_up(tmp_path) == [9]
    assert names(tmp_path) == ["iter_0000007", "notes.saving"]


@pytest.mark.parametrize(
    ("keep", "retain", "expected"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (1, None, [10]),
        (2, None, [8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
        (None, 4, [4, 8, 10]),
        (2, 4, [4, 8, 10]),
        (1, 6, [6, 10]),
    ],
)
def test_old_checkpoints_go(tmp_path, keep, retain, expected):
    for iteration in (2, 4, 6, 8, 10):
        save(tmp_path, iteration)
    removed = store.remove_old(tmp_path, newest=10, keep=keep, retain_interval=retain)
    left = [int(path.name[5:]) for path in sorted(tmp_path.glob("iter_*"))]
    assert left == expected and sorted(removed + left) == [2, 4, 6, 8, 10]


def test_what_is_kept_is_whole_and_later_ones_stay(tmp_path):
    for iteration in (2, 4, 6, 8, 20):
        save(tmp_path, iteration)
    spoil(tmp_path / "iter_0000006", "cut off")  # does not count as one of the two
    store.point_at(tmp_path, 8)  # somebody went back: 20 belongs to another course of training
    store.remove_old(tmp_path, newest=8, keep=2, retain_interval=None)
    left = [int(path.name[5:]) for path in sorted(tmp_path.glob("iter_*"))]
    assert left == [4, 6, 8, 20]


def test_a_linked_checkpoint_is_not_removed_at_its_other_place(tmp_path):
    archive, here = tmp_path / "archive", tmp_path / "here"
    archive.mkdir()
    here.mkdir()
    elsewhere = save(archive, 2)
    (here / "iter_0000002").symlink_to(elsewhere)
    save(here, 4)
    store.remove_old(here, newest=4, keep=1, retain_interval=None)
    assert store.defect(here / "iter_0000002") is None
    store.begin_save(here, 2)
    assert store.defect(elsewhere) is None


def test_manifest_is_plain_json(tmp_path):
    manifest = json.loads((save(tmp_path, 5) / store.MANIFEST).read_text())
    assert manifest["files"]["__0_0.distcp"] == 700
