"""The engine process: forked once, early, and its failure told to the parent."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError
from neuqi_serve.server.engine_process import EngineFailure, EngineProcesses, reason_not_to_fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def _run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own: the tests' process has threads, so it cannot fork safely."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )


def test_a_second_thread_is_a_reason_not_to_fork() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert "threads" in (reason_not_to_fork() or "")
    finally:
        release.set()
        thread.join()


def test_the_forked_engine_runs_its_job_with_the_parents_later_environment() -> None:
    done = _run("""
        import multiprocessing, os
        from neuqi_serve.server.engine_process import EngineProcesses
        def job(word):
            print(word, os.environ["LATER"], os.getpid(), multiprocessing.current_process().name, flush=True)
        with EngineProcesses() as processes:
            assert processes.fork() is None
            os.environ["LATER"] = "yes"
            context = processes.context(multiprocessing.get_context("spawn"))
            process = context.Process(target=job, name="EngineCore", kwargs={"word": "hello"})
            process.start()
            process.join(20)
            print("ended", process.pid, process.exitcode, processes.failure())
    """)
    word, later, child, name = done.stdout.splitlines()[0].split()
    assert (word, later, name) == ("hello", "yes", "EngineCore"), done.stderr
    assert done.stdout.splitlines()[1] == f"ended {child} 0 None"


def test_a_failure_reaches_the_parent_with_its_message_and_code() -> None:
    done = _run("""
        import multiprocessing
        from neuqi_serve.errors import IntegrityError
        from neuqi_serve.server.engine_process import EngineProcesses
        def job():
            try:
                raise IntegrityError("shard 2 is damaged")
            except IntegrityError as error:
                raise RuntimeError("loading failed") from error
        with EngineProcesses() as processes:
            processes.fork()
            process = processes.context(multiprocessing).Process(target=job, name="EngineCore", kwargs={})
            process.start()
            process.join(20)
            print(process.exitcode, processes.failure())
    """)
    failure = EngineFailure("IntegrityError", "shard 2 is damaged", 5)
    assert done.stdout.splitlines()[-1] == f"1 {failure}", done.stderr


def test_a_forked_engine_without_a_job_ends_with_its_parent() -> None:
    done = _run("""
        from neuqi_serve.server.engine_process import EngineProcesses
        with EngineProcesses() as processes:
            assert processes.fork() is None
            child = processes._forked
        print(child.exitcode)
    """)
    assert done.stdout == "0\n", done.stderr


def test_a_killed_parent_takes_the_engine_with_it() -> None:
    done = _run("""
        import multiprocessing, os, signal, time
        from neuqi_serve.server.engine_process import EngineProcesses
        def job():
            time.sleep(600)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        parent = os.fork()
        if parent == 0:
            processes = EngineProcesses()
            assert processes.fork() is None
            process = processes.context(multiprocessing).Process(target=job, name="EngineCore", kwargs={})
            process.start()
            sender.send(process.pid)
            time.sleep(600)
        engine = receiver.recv()
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        for _ in range(200):
            try:
                os.kill(engine, 0)
                state = open(f"/proc/{engine}/stat").read().rsplit(")", 1)[1].split()[0]
            except (ProcessLookupError, FileNotFoundError):
                state = "gone"
            if state in ("gone", "Z"):
                break
            time.sleep(0.1)
        print(state)
    """)
    assert done.stdout.strip() in ("gone", "Z"), done.stderr


def test_a_process_of_the_original_context_reports_too() -> None:
    with EngineProcesses() as processes:
        context: Any = processes.context(multiprocessing.get_context("spawn"))
        # A new process can import the package's own callables only.
        process = context.Process(target=WeightSpec, name="EngineCore", kwargs={"bits": 5})
        process.start()
        process.join(30)
        assert process.exitcode == 1
        failure = processes.failure()
    assert failure is not None
    assert (failure.kind, failure.exit_code) == ("UsageError", 2)
    assert "got 5" in failure.message


def test_the_rest_of_the_context_is_the_original() -> None:
    original = multiprocessing.get_context("spawn")
    context = EngineProcesses().context(original)
    assert context.get_start_method() == original.get_start_method() == "spawn"


def test_failure_names_the_deepest_error_of_ours_or_the_error_itself() -> None:
    outer = ValueError("outer")
    outer.__cause__ = IntegrityError("inner")
    assert EngineFailure.of(outer) == EngineFailure("IntegrityError", "inner", 5)
    assert EngineFailure.of(ValueError("alone")) == EngineFailure("ValueError", "alone", 1)
