"""Tasks of the package ``lm-eval``, from its own collection, from a file of the user's, or from local data."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuqi_serve.errors import UsageError

# Kinds of local data: LAMBADA as JSON lines with "text"; PIQA as a folder with valid.jsonl and valid-labels.lst.
LOCAL_KINDS = ("lambada", "piqa")
_LAMBADA = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
_PIQA = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{goal}}\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
TaskScores = dict[str, dict[str, float]]


def require_lm_eval() -> None:
    """Refuse at the start what could not run at the end.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models import huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"expected the package lm-eval for --tasks, got none that imports ({error}). Install it: pip install "
            "'lm-eval[hf]', or the locked requirements/eval.txt; or leave --tasks out."
        ) from None


def run_tasks(
    models: Sequence[Any], tokenizer: Any, names: Sequence[str], limit: int | None = None
) -> list[TaskScores]:
    """Score models; return task → metric → value for each of them, with ``<metric>_stderr`` beside each.

    ``names``: tasks of lm-eval; ``lambada:FILE`` or ``piqa:FOLDER`` for local data; or a YAML file that defines a task.
    ``limit``: documents of each task, None for all.

    Raises:
        UsageError: an unknown task, local data that is not there, or a data set that cannot be fetched.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    # It reports every default at level "warning".
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="neuqi-tasks-") as folder:
        tasks: list[Any] = [_task(name, Path(folder), number) for number, name in enumerate(names)]
        named = [task for task in tasks if isinstance(task, str)]
        # Reading its whole collection takes seconds.
        manager = TaskManager(include_defaults=bool(named))
        known = set(manager.all_tasks) if named else set()
        unknown = [task for task in named if task not in known]
        if unknown:
            raise UsageError(
                f"expected tasks of lm-eval, {' or '.join(f'{kind}:PATH' for kind in LOCAL_KINDS)}, or a YAML file, "
                f"got {unknown}. `lm-eval ls tasks` lists them."
            )
        return [_scores(model, tokenizer, tasks, manager, limit) for model in models]


def _scores(model: Any, tokenizer: Any, tasks: list[Any], manager: Any, limit: int | None) -> TaskScores:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        # It prints what it is about; our standard output may be JSON.
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                runner,
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,
                verbosity="ERROR",
            )
    except (ConnectionError, OSError) as error:
        raise UsageError(
            f"expected the data of {tasks}, got an error while fetching it ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Without a network, give local data: "
            "lambada:FILE or piqa:FOLDER."
        ) from None
    scores: TaskScores = {}
    for task, metrics in found["results"].items():
        numbers = {
            name.replace(",none", ""): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name.endswith(",none")
        }
        scores[task] = numbers
    return scores


def _task(name: str, folder: Path, number: int) -> Any:
    """A name that lm-eval knows, or the definition of a task."""
    kind, colon, place = name.partition(":")
    if colon and kind in LOCAL_KINDS:
        return _local_task(kind, Path(place), folder / f"{number}.jsonl")
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(
                f"expected a file that defines a task, got no such file: {name}. Check the path."
            )
        from lm_eval.utils import load_yaml_config

        return load_yaml_config(yaml_path=name)
    return name


def _local_task(kind: str, place: Path, written: Path) -> dict[str, Any]:
    if kind == "lambada":
        documents = _json_lines(place)
        body: dict[str, Any] = _LAMBADA
    else:
        documents = _json_lines(place / "valid.jsonl")
        labels = _lines(place / "valid-labels.lst")
        if len(labels) != len(documents) or not set(labels) <= {"0", "1"}:
            raise UsageError(
                f"expected a label 0 or 1 for each of {len(documents)} questions in {place}, got {len(labels)} lines."
            )
        documents = [{**one, "label": int(label)} for one, label in zip(documents, labels, strict=True)]
        body = _PIQA
    wanted = {"lambada": ("text",), "piqa": ("goal", "sol1", "sol2")}[kind]
    if not documents or any(key not in one for one in documents for key in wanted):
        raise UsageError(f"expected JSON lines with {list(wanted)} in {place}, got others. Check the file.")
    written.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
    return {
        "task": f"{kind}_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(written)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **body,
    }


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"expected the data of a task, got no such file: {path}. Check the path.")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        documents = [json.loads(line) for line in _lines(path)]
    except ValueError as error:
        raise UsageError(
            f"expected JSON lines in {path}, got something else ({error}). Check the file."
        ) from None
    if not all(isinstance(one, dict) for one in documents):
        raise UsageError(f"expected a JSON object in every line of {path}, got others. Check the file.")
    return documents
