from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.format import staging
from neuqi_serve.format.staging import staged_folder


def always(_: Path) -> bool:
    return True


def never(_: Path) -> bool:
    return False


def fill(destination: Path, text: str, overwrite: bool = False) -> None:
    with staged_folder(destination, overwrite, always) as folder:
        (folder / "file").write_text(text)


def stop_halfway(destination: Path, error: type[BaseException]) -> None:
    with staged_folder(destination, True, always) as folder:
        (folder / "file").write_text("half")
        raise error


def test_folder_appears_complete(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "out"
    with staged_folder(destination, False, never) as folder:
        (folder / "file").write_text("new")
        assert not destination.exists()
    assert (destination / "file").read_text() == "new"
    assert os.listdir(destination.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        stop_halfway(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_exception_keeps_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        stop_halfway(tmp_path / "out", RuntimeError)
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with staged_folder(tmp_path / "out", True, always) as folder:
        (folder / "file").write_text("new")
        assert (tmp_path / "out" / "file").read_text() == "old"
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_works_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_exchange_names", lambda first, second: False)
    fill(tmp_path / "out", "old")
    fill(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_failed_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange_names", lambda first, second: False)
    fill(tmp_path / "out", "old")
    rename = Path.rename

    def fail_on_partial(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_partial)
    with pytest.raises(OSError, match="no"):
        fill(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_destination_with_content_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="--overwrite"):
        fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_overwrite_refuses_a_folder_that_it_may_not_replace(tmp_path: Path) -> None:
    fill(tmp_path / "out", "precious")
    with pytest.raises(UsageError, match="will not be removed"), staged_folder(tmp_path / "out", True, never):
        pass
    assert (tmp_path / "out" / "file").read_text() == "precious"


def test_file_as_destination_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file"), staged_folder(tmp_path / "out", True, always):
        pass


def test_empty_destination_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", False, never) as folder:
        (folder / "file").write_text("first")
        with (
            pytest.raises(UsageError, match="another process"),
            staged_folder(tmp_path / "out", False, never),
        ):
            pass
        assert (folder / "file").read_text() == "first"
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_killed_writer_leaves_nothing_under_the_name_and_its_rest_is_cleared(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom neuqi_serve.format.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), False, lambda p: False) as folder:\n"
        "    (folder / 'sub').mkdir()\n    (folder / 'half').touch()\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.listdir(tmp_path) == [".out.partial"]
    fill(tmp_path / "out", "new")
    assert os.listdir(tmp_path / "out") == ["file"]
    assert os.listdir(tmp_path) == ["out"]


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", False, never):
        raise RuntimeError
    (tmp_path / ".out.partial").mkdir()
    descriptor = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
