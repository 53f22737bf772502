import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from release_checkpoints import contents, copy_release, read_tensors, release, write_release

from illada.conversion import CheckpointError, convert, converting, writing


@pytest.fixture(scope="module")
def kill_reports(tmp_path_factory):
    script = Path(__file__).with_name("conversion_kills.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("kills"))]
    paths = [str(script.parent), str(script.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("point", "out"),
    [
        ("first shard", "old"),
        ("last shard", "old"),
        ("config", "old"),
        ("verified", "old"),
        ("moved away", "absent"),
        ("moved in", "new"),
    ],
)
def test_killed_at(kill_reports, point, out):
    report = kill_reports[point]
    assert report["killed"] and report["out"] == out
    assert all(name.startswith(".out.") for name in report["leftovers"])
    assert report.get("complete", True)
    assert report["second run"] and report["source untouched"] and report["left after it"] == []


@pytest.mark.parametrize("share", ["10 %", "25 %", "50 %"])
def test_killed_at_any_moment(kill_reports, share):
    report = kill_reports[share]
    assert report["out"] in ("old", "new") and report.get("complete", True)
    assert report["killed"] or report["out"] == "new"  # the machine was faster than when it was measured
    assert report["second run"] and report["source untouched"] and report["left after it"] == []


def assert_refused(source, tmp_path, error, message, **arguments):
    before = contents(source)
    with pytest.raises(error, match=message) as refusal:
        convert(source, tmp_path / "out", **arguments)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    assert contents(source) == before


def test_a_missing_shard(tmp_path):
    source = copy_release(tmp_path / "source", "illada")
    (source / "model-00002-of-00002.safetensors").unlink()
    message = "index.json names files that are missing: model-00002-of-00002.safetensors"
    assert_refused(source, tmp_path, FileNotFoundError, message)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x", "..", ""])
def test_an_index_that_leaves_the_folder(tmp_path, name):
    source = copy_release(tmp_path / "source", "illada")
    shutil.copy(release("llada") / "model.safetensors", tmp_path / "x.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name files of its own folder, got '.*'\.$"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}])
def test_an_index_of_another_form(tmp_path, weight_map):
    source = copy_release(tmp_path / "source", "illada")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(source, tmp_path, ValueError, "`weight_map` in .* must map tensor names to file names")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file(tmp_path, kept):
    source = copy_release(tmp_path / "source", "llada")
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:kept])
    assert_refused(source, tmp_path, ValueError, "model.safetensors is damaged or no safetensors file")


def test_a_written_file_that_differs_is_noticed(tmp_path, monkeypatch):
    """Verification reads the disk: a bit that flips on the way there is found."""
    save = writing._save_shard

    def save_and_damage(tensors, path):
        save(tensors, path)
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            (last,) = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(writing, "_save_shard", save_and_damage)
    source = copy_release(tmp_path / "source", "llada")
    assert_refused(source, tmp_path, CheckpointError, "written differently: model")


@pytest.mark.parametrize(
    ("lost", "dtype"), [({"rms_norm_eps": 1e-3}, "float32"), ({"rope_full_precision": False}, "bfloat16")]
)
def test_a_setting_that_is_lost_on_the_way_is_noticed(tmp_path, monkeypatch, lost, dtype):
    """Equal tensors under another configuration give other logits."""
    original = converting.standard_config

    def lossy(*arguments):
        config = original(*arguments)
        config.update(lost)
        return config

    monkeypatch.setattr(converting, "standard_config", lossy)
    source = copy_release(tmp_path / "source", "llada")
    assert_refused(source, tmp_path, ValueError, "The logits of .* differ from those of ", dtype=dtype)


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    source = copy_release(tmp_path / "source", "llada")
    assert_refused(source, tmp_path, OSError, "must have 261,312 bytes free, and has 1,000")


def test_a_full_disk(tmp_path, monkeypatch):
    source = copy_release(tmp_path / "source", "llada")
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mount.stderr.strip()}")
    try:
        with pytest.raises(FileExistsError, match="`out` must be a new folder, .* a mount point"):
            convert(source, small)
        with pytest.raises(OSError, match="must have .* bytes free"):
            convert(source, small / "out", max_shard_size="50KB")
        assert not list(small.iterdir())
        # The same when the space goes while writing.
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
        with pytest.raises(OSError, match=r"model-0000\d-of-00007.safetensors could not be written: .*No space left"):
            convert(source, small / "out", max_shard_size="50KB")
        assert not list(small.iterdir())
        assert contents(source) == contents(release("llada"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_quota(tmp_path):
    """Where nothing may be mounted: the system refuses to write a file beyond a limit."""
    source = copy_release(tmp_path / "source", "llada")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert_refused(source, tmp_path, OSError, f"could not be written: .*os error {errno.EFBIG}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_runs_do_not_write_to_the_same_folder(tmp_path):
    source = copy_release(tmp_path / "source", "llada")
    with FileLock(tmp_path / ".out.lock"):
        with pytest.raises(OSError, match="`out` .* is being written by another run"):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_save_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(release("llada"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_shard_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """The tensors that are alive when a shard is saved are those of that shard."""
    alive, sizes = {}, []
    save, read = writing._save_shard, writing.CheckpointTensors.read

    def watched_read(self, names):
        tensors = read(self, names)
        for name, tensor in tensors.items():
            alive[name] = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
        return tensors

    def watched_save(tensors, path):
        held = sum(not reference.expired() for reference in alive.values())
        sizes.append((held, len(tensors)))
        save(tensors, path)

    monkeypatch.setattr(writing.CheckpointTensors, "read", watched_read)
    monkeypatch.setattr(writing, "_save_shard", watched_save)
    source = write_release(tmp_path / "source", "llada", num_files=2)
    convert(source, tmp_path / "out", max_shard_size="50KB")
    assert len(sizes) == 7 and sum(count for _, count in sizes) == len(read_tensors(source))
    assert all(held == count for held, count in sizes)
