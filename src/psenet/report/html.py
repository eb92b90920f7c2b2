"""A report as one HTML file that needs nothing else: no network, no other files.

Everything that comes from the run is escaped: by the template in the page, by `_embedded` in the data of charts, and by
`psenet.report.drawings` where plotly reads tags. The page's policy lets no script run but the two written here.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from psenet.report.blocks import Bar, Chart, Report, Section, Slider

if TYPE_CHECKING:
    from markupsafe import Markup


def html(report: Report) -> str:
    """Return the report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("psenet.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = lambda value: Markup(_embedded(value))
    environment.tests["bar"] = lambda cell: isinstance(cell, Bar)
    has_charts = any(isinstance(block, Chart) for section in report.sections for block in section.blocks)
    scripts = [*([get_plotlyjs()] if has_charts else []), _script("report.js")]
    return environment.get_template("template.html.j2").render(
        report=report,
        kind=lambda block: type(block).__name__,
        chart_spec=_chart_spec,
        slider_spec=_slider_spec,
        policy=_policy(scripts := [_as_parsed(script) for script in scripts]),
        scripts=[_script_markup(script) for script in scripts],
        style=Markup(_script("report.css")),
        charts_by_section=_counted(report.sections),
    )


def _counted(sections: Sequence[Section]) -> Mapping[str, bool]:
    return {section.name: any(isinstance(block, Chart) for block in section.blocks) for section in sections}


def _script(name: str) -> str:
    return files("psenet.report").joinpath(name).read_text(encoding="utf-8")


def _as_parsed(script: str) -> str:
    """Return a script as a browser reads it, which is what its hash is of."""
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    # Inside a script element only this ends it; within a JavaScript string or comment the escape means the same.
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _script_markup(script: str) -> "Markup":
    from markupsafe import Markup

    return Markup(script)


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: nothing is loaded, and no script runs but these."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embedded(value: Any) -> str:
    """Return JSON that is safe inside a script element, whatever is in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _chart_spec(chart: Chart) -> dict[str, Any]:
    return {"data": chart.data, "layout": chart.layout}


def _slider_spec(slider: Slider) -> dict[str, Any]:
    return {
        "chart": slider.chart,
        "trace": slider.trace,
        "full": list(slider.groups.values()),
        "choices": [
            {"share": one.share, "score": one.score, "facts": one.facts, "widths": one.widths} for one in slider.choices
        ],
    }
