"""Entry point of ``vllm.general_plugins``.

vLLM imports this module in every process, also for ``--help``, and logs and swallows an ImportError of the import
itself; so it imports nothing heavy, and ``register`` does the real imports, where an error surfaces with its cause.
"""


def register() -> None:
    """Register the quantization method ``neuqi`` with vLLM; safe to call any number of times."""
    from neuqi_serve.vllm_plugin import compat
    from neuqi_serve.vllm_plugin.cpu_norms import register_cpu_norms
    from neuqi_serve.vllm_plugin.rank_failures import report_failures

    compat.check_version()
    compat.register_method()
    compat.attach_worker_report()
    compat.track_missing_tensors()
    compat.receive_between_stages()
    report_failures()
    register_cpu_norms()
