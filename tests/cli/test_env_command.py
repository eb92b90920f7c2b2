"""`psenet env`, as text and as JSON."""

import json
import re
from importlib.metadata import version

import torch
from commandline import psenet


def test_the_report_is_printed_as_text():
    ended = psenet("env")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(rf"^  torch: {re.escape(version('torch'))}$", ended.out, re.MULTILINE)
    assert re.search(r"^  output is a terminal: no$", ended.out, re.MULTILINE)
    assert ended.out.startswith("psenet:\n  version: ")


def test_the_report_is_printed_as_json():
    ended = psenet("env", "--json")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["torch"]["version"] == torch.__version__ and report["torch"]["threads"] == 1
