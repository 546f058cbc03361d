"""``neuqi doctor``: what keeps the server from running well here."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import TextIO

from neuqi_serve.doctor.finding import LEVELS, Finding, Level
from neuqi_serve.env import read_environment

_DESCRIPTION = """Look at Python, vLLM and the packages, the processor or GPU, memory, the kernels
that will run, the cache and the address to listen on; say of each what there
is and what to do. The exit code is 1 if the server cannot run. What it prints
belongs into a report of a fault; --json gives versions besides."""
_MARKS: dict[Level, str] = {"ok": "ok", "note": "note", "warning": "WARN", "error": "FAIL"}
_COLORS: dict[Level, str] = {"ok": "32", "note": "36", "warning": "33", "error": "31"}
_WIDTH = 80
_SUBJECT = 15


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "doctor", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to look at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to look at (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if one is an error."""
    from neuqi_serve.doctor.examine import examine
    from neuqi_serve.doctor.packages import package_versions

    color = uses_color(sys.stdout)
    findings = []
    for finding in examine(args.host, args.port):
        findings.append(finding)
        if not args.json:
            print(rendered(finding, color), flush=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    if args.json:
        body = {
            "ok": not counts["error"],
            "versions": dict(package_versions()),
            "findings": [finding.to_dict() for finding in findings],
        }
        print(json.dumps(body, indent=2))
    else:
        print(summary(counts))
    return 1 if counts["error"] else 0


def summary(counts: dict[Level, int]) -> str:
    """One line over all findings."""
    if counts["error"]:
        return f"{counts['error']} of these keep the server from running."
    if counts["warning"]:
        return f"The server runs here; {counts['warning']} of these make it run worse than it could."
    return "The server runs here."


def rendered(finding: Finding, color: bool) -> str:
    """A finding as lines of at most 80 columns."""
    mark = f"{_MARKS[finding.level]:<4}"
    if color:
        mark = f"\x1b[{_COLORS[finding.level]}m{mark}\x1b[0m"
    indent = " " * (5 + _SUBJECT)
    text = finding.found if not finding.remedy else f"{finding.found}\n→ {finding.remedy}"
    lines = [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part, _WIDTH - len(indent), break_long_words=False) or [""]
    ]
    subject = finding.subject
    if len(subject) >= _SUBJECT:
        lines.insert(0, "")
    first = f"{mark} {subject:<{_SUBJECT}}{lines[0]}".rstrip()
    return "\n".join([first, *(indent + line for line in lines[1:])])


def uses_color(stream: TextIO) -> bool:
    """Whether to color: on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb says no."""
    return stream.isatty() and not read_environment().plain
