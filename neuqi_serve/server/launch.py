"""``neuqi serve``: check, choose, then hand over to vLLM's own server."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from neuqi_serve.config import EMBEDDING, LM_HEAD, SUPPORTED_GROUP_SIZES
from neuqi_serve.env import SANITY_CHECK, read_environment
from neuqi_serve.errors import UsageError
from neuqi_serve.format.online_settings import (
    ADDITIONAL_CONFIG,
    ADDITIONAL_CONFIG_KEY,
    QUANTIZATION_CONFIG,
    settings_object,
)
from neuqi_serve.server import vllm_start
from neuqi_serve.server.admission.keys import KeyFile
from neuqi_serve.server.admission.settings import admit
from neuqi_serve.server.cached_weights import CachedWeights, Request, conflict, no_widths
from neuqi_serve.server.command_line import (
    DEFAULT_HOST,
    DESCRIPTION,
    EPILOG,
    EarlyArguments,
    OwnOptions,
    add_own_options,
    merged_overrides,
    own_parser,
    read_early,
)
from neuqi_serve.server.defaults import Choice, choose_defaults
from neuqi_serve.server.engine_process import EngineProcesses
from neuqi_serve.server.listen_address import ListenAddress
from neuqi_serve.server.load_timeline import LoadTimeline
from neuqi_serve.server.machine import Machine, detect_machine
from neuqi_serve.server.operation import Operation
from neuqi_serve.server.process_environment import (
    apply_environment,
    explain_environment,
    vllm_environment,
)
from neuqi_serve.server.served_model import ServedModel, check_on_the_fly, find_model, local_folder
from neuqi_serve.server.start_summary import print_summary, vocabulary_width
from neuqi_serve.server.status.process import StatusProcess
from neuqi_serve.server.termination import end_on_sigterm

# Options of vLLM whose value depends on the machine and the model; unset ones get a default of ours.
_CHOSEN = (
    "compilation_config",
    "data_parallel_size",
    "distributed_executor_backend",
    "enforce_eager",
    "ir_op_priority",
    "kv_cache_dtype",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_queued_reqs",
    "max_num_seqs",
    "nnodes",
    "optimization_level",
    "pipeline_parallel_size",
    "shutdown_timeout",
    "tensor_parallel_size",
)
_MODEL_MISSING = "expected MODEL: a folder, a name on the Hugging Face hub, or 'demo'. Try: neuqi serve demo"


def serve(arguments: Sequence[str]) -> int:
    """Run the server until it is told to stop; return the exit code.

    Raises:
        NeuqiError: what the class says, before anything heavy is started wherever it can be known then.
    """
    if any(word in ("-h", "--help") for word in arguments):
        own_parser().print_help()
        return 0
    if any(word.startswith("--help=") for word in arguments):
        parse(arguments)  # prints vLLM's help of a section or flag, ours included, and exits
    if not arguments:
        raise UsageError(_MODEL_MISSING)
    early = read_early(arguments)
    if not early.headless:
        early.address.check_free()
    if early.operation.api_key_file is not None:
        KeyFile(early.operation.api_key_file)  # a mistake in it must not cost a load
    status = None if early.headless else early.operation.status_address(early.address)
    with StatusProcess(status, required=early.operation.status_port is not None) as process:
        end_on_sigterm()
        return _serve(arguments, early, process.line)


def _serve(arguments: Sequence[str], early: EarlyArguments, status: str) -> int:
    machine = detect_machine()
    offline = early.model is not None and early.hub_free and local_folder(early.model) is not None
    if early.operation.sanity_check is not None:
        os.environ[SANITY_CHECK] = early.operation.sanity_check  # the workers read it
    # Before anything imports torch or numpy, which read some of these variables.
    applied = apply_environment(vllm_environment(machine, offline))
    model = _check_early(early)
    with CachedWeights() as cached, EngineProcesses() as processes:
        if model is not None:
            own = with_environment(early.own, model)
            look_into_cache(cached, model, own, early.revision, early.options, machine)
        return _start(
            arguments, early, model, machine, processes, cached, explain_environment(applied), status
        )


def _check_early(early: EarlyArguments) -> ServedModel | None:
    if early.model is None:
        return None
    model = find_model(early.model, early.revision)
    check_settings(model, with_environment(early.own, model), early.method)
    return model


def with_environment(own: OwnOptions, model: ServedModel) -> OwnOptions:
    """Complete the options by ``NEUQI_BITS`` and its kin, if the model is quantized while it loads."""
    if model.kind != "unquantized" or not own.quantize:
        return own
    return own.completed_by(read_environment().quantization)


def look_into_cache(
    cached: CachedWeights,
    model: ServedModel,
    own: OwnOptions,
    revision: str | None,
    options: frozenset[str],
    machine: Machine,
) -> None:
    """Start to look for the packed weights of an unquantized model, if they are wanted and would be the same."""
    if model.kind != "unquantized" or not own.quantize:
        return
    reason = "--no-cache was given" if not own.cache else conflict(model, options)
    budget = own.budget()
    if reason is not None:
        if budget is not None:
            raise no_widths(budget, reason)
        cached.refuse(reason)
        return
    cached.start(
        Request(
            model.reference,
            revision,
            own.spec(),
            own.preset,
            own.importance,
            machine.runs_on_cpu,
            own.vocabulary(),
            budget,
            SUPPORTED_GROUP_SIZES if own.group_size is None else (own.group_size,),
        )
    )


def check_settings(model: ServedModel, own: OwnOptions, method: str | None) -> None:
    """Refuse bits and groups that contradict the model.

    Raises:
        UsageError: ``--bits`` or its kin given for a packed or a foreign checkpoint, or with ``--no-quantize``; no
            such importance file.
        UnsupportedModelError: a model that cannot be quantized while it loads.
    """
    asked = {
        "--bits": own.bits,
        "--fit": own.fit,
        "--group-size": own.group_size,
        "--scale-dtype": own.scale_dtype,
        "--preset": own.preset,
        "--importance": own.importance,
        "--lm-head-bits": own.lm_head_bits,
        "--embedding-bits": own.embedding_bits,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    if model.kind == "packed" and model.spec is not None:
        stored = {
            "--bits": model.spec.bits,
            "--group-size": model.spec.group_size,
            "--scale-dtype": model.spec.scale_dtype,
            "--lm-head-bits": vocabulary_width(model, LM_HEAD),
            "--embedding-bits": vocabulary_width(model, EMBEDDING),
        }
        if own.preset is not None:
            raise UsageError(
                f"expected no --preset, got {own.preset}: {model.name} is packed, nothing is searched. Leave it "
                "out, or give the original model to quantize it anew."
            )
        if own.importance is not None:
            raise UsageError(
                f"expected no --importance, as {model.name} is packed already, got {own.importance}. Leave it out, or "
                "give the original model to quantize it anew."
            )
        if own.fit is not None:
            raise UsageError(
                f"expected no --fit, got {own.fit}: {model.name} is packed, its widths are chosen. Leave it out, or "
                "give the original model to quantize it anew."
            )
        for option, value in given.items():
            if value != stored[option]:
                raise UsageError(
                    f"expected {option} {stored[option]}, as {model.name} is packed, got {value}. Leave {option} "
                    "out, or give the original model to quantize it anew."
                )
        if not own.quantize:
            raise UsageError(
                f"expected an unquantized model with --no-quantize, got {model.name}, which is packed."
            )
    elif model.kind == "foreign" or (method not in (None, "neuqi")) or not own.quantize:
        why = "--no-quantize" if not own.quantize else f"the method {model.method or method!r}"
        if given:
            raise UsageError(
                f"expected no {', '.join(given)} with {why}: {model.name} is not quantized by neuqi. Leave it out, or "
                "give the original model."
            )
    else:
        if own.importance is not None and not own.importance.is_file():
            raise UsageError(
                f"expected an importance file, got {own.importance}, which is none. Check the path."
            )
        if own.budget() is None or own.group_size is not None:
            check_on_the_fly(model, own.spec())
        own.vocabulary().resolved(model.is_tied)


def _start(
    arguments: Sequence[str],
    early: EarlyArguments,
    model: ServedModel | None,
    machine: Machine,
    processes: EngineProcesses,
    cached: CachedWeights,
    environment: Sequence[str],
    status: str,
) -> int:
    timeline = LoadTimeline()
    with timeline.phase("import"):
        vllm_start.import_heavy(model.config if model else {}, on_cpu=machine.runs_on_cpu)
    why_spawned = processes.fork() if machine.runs_on_cpu else "vLLM starts it on accelerators"
    args, given = parse(arguments)
    if model is None:
        model = _check_late(args)
        late = with_environment(OwnOptions.from_namespace(args), model)
        look_into_cache(cached, model, late, args.revision, early.options, machine)
    vllm_start.check_architecture(model.config)
    vllm_start.check_tracing(args)
    own = OwnOptions.from_namespace(args)
    quantized = model.kind == "unquantized" and own.quantize
    with timeline.phase("cache") if cached.reason is None else contextlib.nullcontext():
        model = cached.model(model)
    timeline.cache_found, timeline.cache_peak_bytes = cached.found, cached.peak_bytes
    choices = choose_defaults(machine, model.text_config, model.weight_bytes, given)
    complete(args, model, own, choices)
    own = with_environment(own, model)
    admitted = admit(args, Operation.from_namespace(args))
    print_summary(
        machine, model, own, [*map(str, choices), *environment], why_spawned, cached if quantized else None
    )
    print("\n".join([*admitted, *([status] if status else [])]), flush=True)
    timeline.attach(args)
    return vllm_start.run(args, processes)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """Parse with vLLM's own parser; return the arguments, and those of the chosen options that the user gave."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="neuqi")
    serve_parser = ServeSubcommand().subparser_init(parser.add_subparsers(dest="verb"))
    add_own_options(serve_parser)
    serve_parser.usage = "neuqi serve MODEL [--bits 2|3|4|8] [--group-size 128] [any flag of vllm serve]"
    serve_parser.description, serve_parser.epilog = DESCRIPTION, EPILOG
    unset = object()
    defaults = {option: serve_parser.get_default(option) for option in _CHOSEN}
    serve_parser.set_defaults(**dict.fromkeys(_CHOSEN, unset), host=DEFAULT_HOST, allowed_origins=[])
    args = parser.parse_args(["serve", *arguments])
    given = {option: getattr(args, option) for option in _CHOSEN if getattr(args, option) is not unset}
    if args.drain_timeout is not None:
        if given.setdefault("shutdown_timeout", args.drain_timeout) != args.drain_timeout:
            raise UsageError(
                f"expected one time to drain, got --drain-timeout {args.drain_timeout} and --shutdown-timeout "
                f"{given['shutdown_timeout']}, which mean the same. Remove one of them."
            )
        args.shutdown_timeout = args.drain_timeout
    for option in _CHOSEN:
        if option not in given:
            setattr(args, option, defaults[option])
    return args, given


def _check_late(args: argparse.Namespace) -> ServedModel:
    """Check what could not be read before vLLM's parser: MODEL after other arguments, or in a --config file."""
    name = args.model_tag
    if not name:
        raise UsageError(
            "expected MODEL: a folder, a name on the Hugging Face hub, or 'demo'. Try: neuqi serve demo"
        )
    model = find_model(name, args.revision)
    own = OwnOptions.from_namespace(args)
    own.spec()
    check_settings(model, with_environment(own, model), args.quantization)
    if not args.headless:
        ListenAddress(args.host or "", args.port, args.uds, bool(args.ssl_keyfile)).check_free()
    return model


def complete(
    args: argparse.Namespace, model: ServedModel, own: OwnOptions, choices: Sequence[Choice]
) -> None:
    """Fill in the arguments: the defaults chosen, the model's folder, and the on-the-fly settings."""
    for choice in choices:
        setattr(args, choice.option, choice.value)
    args.model_tag = args.model = model.reference
    if not args.served_model_name:
        args.served_model_name = [model.served_name or model.name]
    # Here, as it imports torch, which has to wait for the environment.
    from neuqi_serve.vllm_plugin.folder import check_packed_settings

    more = _more_settings(args)
    if model.kind == "packed" and model.recipe is not None:
        for where, settings in more:
            check_packed_settings(model.recipe, settings, where)
        args.quantization_config = None
    elif model.kind == "unquantized" and own.quantize and args.quantization in (None, "neuqi"):
        args.quantization = "neuqi"
        args.hf_overrides = merged_overrides(args.hf_overrides, own, more, read_environment().quantization)
        # In vLLM this option knows vLLM's own methods only.
        args.quantization_config = None


def _more_settings(args: argparse.Namespace) -> list[tuple[str, Mapping[str, Any]]]:
    """Settings of neuqi in options of vLLM other than ``--hf-overrides``."""
    additional = getattr(args, "additional_config", None)
    ours = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, Mapping) else None
    sources = ((QUANTIZATION_CONFIG, getattr(args, "quantization_config", None)), (ADDITIONAL_CONFIG, ours))
    return [(where, settings_object(given, where)) for where, given in sources if given]
