"""The outcome of a check as JUnit XML, which CI systems show together with test results."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from manifests.check_report import Check, CheckReport

__all__ = ["junit_xml"]

# Characters that XML 1.0 cannot represent.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(report: CheckReport, describe: str = "check") -> str:
    """Write a report as JUnit XML: each check is a test case, and a broken limit is a failure.

    Args:
        report: the outcome of all checks.
        describe: name of the test suite.
    """
    failures = sum(not check.passed for check in report.checks)
    counts = {"tests": str(len(report.checks)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": describe, **counts})
    for check in report.checks:
        names = {"classname": _clean(f"{describe}.{report.artifact}"), "name": _clean(check.name)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if not check.passed:
            message = _clean(f"{check.name}: {check.value:.4g} {check.unit}, the limit is {check.limit:.4g}")
            failure = ElementTree.SubElement(case, "failure", {"message": message, "type": "limit"})
            failure.text = _clean(_details(report, check))
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(_details(report, check))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _details(report: CheckReport, check: Check) -> str:
    lines = [f"{report.artifact} against {report.baseline}: {check.value:.6g} {check.unit}", check.note]
    if check.name not in {"size", "latency"}:
        lines.append(f"data: {report.data}")
        if not check.passed and report.worst_block:
            lines.append(f"worst block: {report.worst_block}")
    return "\n".join(line for line in lines if line)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
